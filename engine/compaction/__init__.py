"""Compaction: stores of a few bytes per number that still find what the whole store finds."""
