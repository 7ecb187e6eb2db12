"""Selectors: which rows are chosen, from their scores."""
