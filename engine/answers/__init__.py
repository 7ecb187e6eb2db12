"""Answers: retrieval, curvature, exact scores and selection over a store."""
