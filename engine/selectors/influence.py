"""Scores of a store's rows for tasks: what selectors of several targets start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.queries import Prepared, prepare
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.protocol import Rows, product
from gradsift.engine.selectors.protocol import Targets
from gradsift.engine.selectors.rows import raw_rows
from gradsift.engine.selectors.tasks import Tasks

__all__ = ["Influence"]

_AT_ONCE = 1024
"""Rows that are read at a time when some are asked for."""


class Influence:
    """A scorer prepared for some targets; a task's score is the mean over its targets.

    Args:
        store: the rows.
        targets: None for a scorer of rows alone, which is one task.
        scorer, damping: as of ``topk``.
        as_set: one query per task, the mean of its targets' gradients, instead of the mean of their scores. For
            scores that are linear in the query it is the same.
    """

    def __init__(
        self,
        store: RowStore,
        targets: Targets | None,
        scorer: Any,
        damping: float | None = None,
        as_set: bool = False,
    ) -> None:
        given = None if targets is None else targets.given
        self.tasks = Tasks.of(None, 1) if targets is None else targets.tasks
        if as_set and targets is not None:
            given = self.tasks.mean(targets.queries.values)
            self.tasks = replace(self.tasks, index=np.arange(len(self.tasks)))
        self.prepared: Prepared = prepare(store, given, scorer, damping=damping)

    @property
    def name(self) -> str:
        """Of the scorer that is used."""
        return self.prepared.name

    @property
    def directions(self) -> Tensor | None:
        """Of each task, float64 (T, dim), or (T, parts, dim); None unless the scorer is linear."""
        found = self.prepared.directions
        return None if found is None else self.tasks.mean(found)

    def by_target(self) -> Iterator[tuple[int, np.ndarray]]:
        """First row and float64 (m, q), in one pass."""
        for start, scores in self.prepared.stream():
            yield start, scores.T

    def by_task(self) -> Iterator[tuple[int, np.ndarray]]:
        """First row and float64 (m, T), in one pass."""
        directions = self.directions
        if directions is not None:
            for start, scores in replace(self.prepared, directions=directions).stream():
                yield start, scores.T
            return
        for start, scores in self.prepared.stream():
            yield start, self.tasks.mean(torch.from_numpy(scores)).T.numpy()

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Scores of these rows in this order, float64 (m, T); no others are read where the store can do so."""
        pieces = [self._of(rows[start : start + _AT_ONCE]) for start in range(0, len(rows), _AT_ONCE)]
        return np.concatenate(pieces) if pieces else np.empty((0, len(self.tasks)))

    def _of(self, rows: np.ndarray) -> np.ndarray:
        found = self.prepared
        values, norms = raw_rows(found.store, rows), torch.from_numpy(found.norms[rows])
        directions = self.directions
        if directions is not None:
            weights = None if found.weights is None else found.weights[rows]
            return product(directions, weights, Rows(0, values, norms)).T.numpy()
        column = getattr(found.store, "loss", None)
        loss = None if column is None else torch.from_numpy(np.asarray(column[rows]))
        each = [
            found.scorer.score(
                found.queries,  # type: ignore[arg-type]
                Rows(row, values[i : i + 1], norms[i : i + 1], None if loss is None else loss[i : i + 1]),
            )
            for i, row in enumerate(rows.tolist())
        ]
        return self.tasks.mean(torch.cat([torch.as_tensor(one).to(torch.float64) for one in each], dim=1)).T.numpy()
