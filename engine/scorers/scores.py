"""Scores of every row of a store, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradsift.engine.answers.given import Given
from gradsift.engine.answers.queries import AnyScorer, prepare
from gradsift.engine.answers.scan import RowStore

__all__ = ["stream_scores"]


def stream_scores(
    store: RowStore, queries: Given | None, scorer: AnyScorer = "fisher", *, damping: float | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Scores of all rows, in one pass after the scorer's own; queries and scorer are checked at once.

    Args:
        store, queries, scorer, damping: as of ``topk``.

    Yields:
        first row and float64 (q, rows), in order, covering every row; (1, rows) for a scorer without queries.

    Raises:
        SpecError, ShapeError, StoreError: as of ``topk``.
    """
    return prepare(store, queries, scorer, damping=damping).stream()
