"""Checks: can this model be attributed at all? One file per kind of question."""
