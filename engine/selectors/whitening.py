"""Whitened unit rows: gradients in the metric of their own pooled second moment, where distances are comparable.

Rows of a store and its targets are pooled and centred, ``Sigma = X'X/N + lambda I`` with ``lambda = damping *
trace(Sigma)/N``, ``Sigma = L L'``; a row becomes ``L^-1 (x - mean)`` over its length. With several checkpoints each
has a Sigma of its own and their unit rows lie side by side over sqrt(checkpoints): the cosine of two rows is the mean
of their cosines at each.

Source: TAROT, arXiv 2412.00420; the damping relative to the trace is ours, theirs is 1e-5.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.moment import second_moment
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.parts import parts_of
from gradsift.engine.selectors.rows import stream
from gradsift.kernels.errors import ShapeError

__all__ = ["Whitening"]


class Whitening:
    """The metric of a store's rows pooled with its targets.

    Args:
        store: the rows; one pass per checkpoint.
        targets: float64 (q, checkpoints, dim).
        keep: bool (n,), rows that count.
        damping: see above.

    Attributes:
        mean: float64 (checkpoints, dim). factors: float64 (checkpoints, dim, dim), lower triangular.
    """

    def __init__(self, store: RowStore, targets: Tensor, keep: np.ndarray, damping: float) -> None:
        if not damping > 0:
            raise ShapeError(f"damping is {damping}, expected a positive multiple of trace/N such as 1")
        pairs = [self._fit(store, targets, keep, damping, c) for c in range(parts_of(store).checkpoints)]
        self.mean = torch.stack([mean for mean, _ in pairs])
        self.factors = torch.stack([factor for _, factor in pairs])

    @staticmethod
    def _fit(store: RowStore, targets: Tensor, keep: np.ndarray, damping: float, c: int) -> tuple[Tensor, Tensor]:
        pooled = targets[:, c]
        total, count = pooled.sum(dim=0), int(keep.sum()) + len(pooled)

        def rows(block: Tensor, start: int) -> Tensor:
            nonlocal total
            kept = block[torch.from_numpy(keep[start : start + len(block)])]
            total = total + kept.sum(dim=0)
            return kept

        # Float32 products of a block are off by 1e-7 of the trace, far below lambda; float64 ones take twice as long.
        moment, _ = second_moment(rows(block[:, c], start).float() for start, block in stream(store, "tarot"))
        moment += pooled.T @ pooled
        mean = total / count
        sigma = moment / count - torch.outer(mean, mean)
        trace = float(sigma.trace())
        if not trace > 0:
            raise ShapeError("rows and targets are all the same gradient, which has no distances: look at the data")
        sigma.diagonal().add_(damping * trace / count)
        return mean, torch.linalg.cholesky(sigma)

    def __call__(self, rows: Tensor) -> Tensor:
        """Unit rows, float64 (m, checkpoints * dim), of rows (m, checkpoints, dim)."""
        white = torch.linalg.solve_triangular(self.factors, (rows - self.mean).movedim(0, 2), upper=False)
        length = torch.linalg.vector_norm(white, dim=1, keepdim=True)
        unit = torch.where(length > 0, white / length, 0.0)
        joined: Tensor = unit.movedim(2, 0).flatten(1) / len(self.factors) ** 0.5
        return joined
