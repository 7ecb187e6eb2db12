"""Influence-driven curriculum: an order of all rows for every epoch.

Source: arXiv 2508.15475 and loris3/babylm; there over gradients of the input embeddings.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.selectors.protocol import Choice, Targets
from gradsift.engine.selectors.rows import (
    allowed_rows,
    best_first,
    checkpoint_names,
    norms_by_checkpoint,
    stream,
    unit_scores,
)
from gradsift.kernels.errors import DataError, SpecError

__all__ = ["Order"]


class Order:
    """Rows of every epoch sorted by how much they agree with the whole training set at that epoch's checkpoint.

    ``s_i^c = <g_i^c / |g_i^c|, u_c>``, u_c the mean of all unit rows at checkpoint c, made unit again.

    Args:
        direction: "falling" starts an epoch with the rows that agree most, "rising" with those that agree least.
        bins: shuffle rows inside neighbouring bins of this many (1000 in the paper); None keeps the sorted order.
        seed: of the shuffle.

    Attributes:
        scores: after ``prepare``: float64 (n, checkpoints).
    """

    about = Method(
        name="order",
        formula="rows of epoch c sorted by <g_i^c/|g_i^c|, u_c>, u_c the unit mean of unit rows at checkpoint c",
        needs="a checkpoint per epoch",
        cost="2 passes, O(n checkpoints) memory",
        source="Influence-driven curriculum learning, arXiv 2508.15475",
        published="more than 10 points over random order on BabyLM-type tests",
    )

    needs_targets: ClassVar[bool] = False

    def __init__(
        self, direction: Literal["falling", "rising"] = "falling", bins: int | None = None, seed: int = 0
    ) -> None:
        if direction not in ("falling", "rising"):
            raise SpecError(f"direction is {direction!r}, expected 'falling' or 'rising'")
        if bins is not None and bins < 2:
            raise SpecError(f"bins is {bins}, expected at least 2 rows to shuffle, or None")
        self.direction, self.bins, self.seed = direction, bins, seed

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Two passes; targets and scorer have no part in it."""
        self._allowed = allowed_rows(store)
        self._names = checkpoint_names(store)
        norms = norms_by_checkpoint(store)
        total: Tensor = torch.zeros(())
        for start, rows in stream(store, "order"):
            total = total + _unit(rows, start, norms).sum(dim=0)
        length = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        if not bool((length > 0).all()):
            raise DataError("the store's gradients cancel out at a checkpoint, so nothing agrees with their mean")
        mean = total / length
        self.scores = np.zeros((len(store), len(self._names)))
        for start, rows in stream(store, "order"):
            agreement = (_unit(rows, start, norms) * mean).sum(dim=2)
            self.scores[start : start + len(rows)] = unit_scores(agreement)

    def choose(self, budget: int | None) -> Choice:
        """The epochs one after the other: the same rows in each, in its own order.

        Args:
            budget: rows of an epoch: those with the largest sum of scores over the checkpoints; None takes all.
        """
        kept = self._allowed
        if budget is not None:
            kept = np.sort(kept[best_first(self.scores[kept].sum(axis=1), kept)[:budget]])
        epochs = [self._epoch(c, kept) for c in range(len(self._names))]
        rows = np.concatenate(epochs)
        scores = np.concatenate([self.scores[epoch, c] for c, epoch in enumerate(epochs)])
        words = [f"epoch {c + 1}" + ("" if name is None else f", {name}") for c, name in enumerate(self._names)]
        return Choice(rows, scores, [word for word in words for _ in kept], facts={"epochs": len(epochs)})

    def _epoch(self, c: int, kept: np.ndarray) -> np.ndarray:
        scores = self.scores[kept, c]
        rows: np.ndarray = kept[best_first(scores if self.direction == "falling" else -scores, kept)]
        if self.bins is not None:
            draw = np.random.default_rng((self.seed, c))
            pieces = [rows[i : i + self.bins] for i in range(0, len(rows), self.bins)]
            rows = np.concatenate([draw.permutation(piece) for piece in pieces])
        return rows


def _unit(rows: Tensor, start: int, norms: np.ndarray | None) -> Tensor:
    """Rows (m, checkpoints, dim) over their exact norms, or over their own where those are not known."""
    if norms is None:
        length = torch.linalg.vector_norm(rows, dim=2)
    else:
        length = torch.from_numpy(norms[start : start + len(rows)])
    return rows * torch.where(length > 0, 1 / length, 0.0)[..., None]
