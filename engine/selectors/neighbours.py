"""Each target's nearest rows, nearest first, found in streamed passes and only as deep as somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.selectors.rows import fetch, stream, unit_scores
from gradsift.engine.selectors.whitening import Whitening

__all__ = ["Neighbours"]

_DEPTH = 64
"""Rows kept per target at first; doubled, at the cost of a pass, when they are used up."""

_AT_ONCE = 1024
"""Rows that are whitened at a time when their distances are asked for."""


class Neighbours:
    """Rows by whitened cosine with each target; equal ones by row.

    Args:
        store: the rows. keep: bool (n,), rows that count.
        white: the metric.
        goals: unit rows of the targets, (q, d).

    Memory: O(q depth) beside a block of rows; a pass costs O(n d^2).
    """

    def __init__(self, store: RowStore, keep: np.ndarray, white: Whitening, goals: Tensor) -> None:
        self._store, self._keep, self._white, self._goals = store, keep, white, goals
        self._most = int(keep.sum())
        self._cosines = self._rows = np.empty((len(goals), 0))
        self._known: dict[int, np.ndarray] = {}

    def layers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every target's nearest row and their cosines, both (q,); then every second nearest; until none is left."""
        for k in range(self._most):
            if k >= self._rows.shape[1]:
                self._deepen(min(max(_DEPTH, 2 * k), self._most))
            yield self._rows[:, k], self._cosines[:, k]

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """Whitened feature distances ``sqrt(2 - 2 cos)`` in [0, 2] to every target, float64 (m, q)."""
        new = np.array([row for row in rows.tolist() if row not in self._known], dtype=np.int64)
        for part in np.array_split(new, -(-len(new) // _AT_ONCE)) if len(new) else ():
            cosines = unit_scores(self._white(fetch(self._store, part)) @ self._goals.T)
            found = np.sqrt(np.clip(2 - 2 * cosines, 0, 4))
            self._known.update(zip(part.tolist(), found, strict=True))
        return np.stack([self._known[row] for row in rows.tolist()])

    def _deepen(self, depth: int) -> None:
        best = torch.empty(len(self._goals), 0, dtype=torch.float64)
        rows = torch.empty(len(self._goals), 0, dtype=torch.int64)
        for start, block in stream(self._store, "tarot"):
            inside = torch.from_numpy(np.flatnonzero(self._keep[start : start + len(block)]))
            cosines = torch.from_numpy(unit_scores(self._goals @ self._white(block[inside]).T))
            best = torch.cat([best, cosines], dim=1)
            rows = torch.cat([rows, (start + inside).expand(len(rows), -1)], dim=1)
            # Stable: of equal cosines the lower row stands first, as in both halves.
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, rows = best[:, :depth], rows.gather(1, order[:, :depth])
        self._cosines, self._rows = best.numpy(), rows.numpy()
