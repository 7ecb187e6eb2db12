"""Selectors: how rows of a store are chosen."""
