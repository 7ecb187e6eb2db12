"""Capture: per-example gradient rows from a batched backward pass, one's own or somebody else's."""
