"""Extraction: a data set to a store, resumable."""
