"""Scorers: how rows of a store are compared with queries."""
