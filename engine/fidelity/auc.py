"""How well one number per example tells the wrong ones from the right: Mann-Whitney's AUC."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.engine.fidelity.intervals import Interval, bootstrap, interval
from gradsift.kernels.errors import ShapeError

__all__ = ["AUC", "auc"]


@dataclass(frozen=True, slots=True)
class AUC:
    """The chance that a positive example has the higher score, ties counting half.

    Attributes:
        value: .5 is no information.
        interval: by a bootstrap over the examples.
    """

    value: float
    interval: Interval


def auc(scores: np.ndarray, positive: np.ndarray, seed: int = 0) -> AUC:
    """AUC of one score per example.

    Args:
        scores: (n,), higher = more likely positive.
        positive: bool (n,).
        seed: of the bootstrap.

    Raises:
        ShapeError: shapes differ, a score is not finite, or all examples are of one kind.
    """
    scores, positive = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if scores.ndim != 1 or scores.shape != positive.shape or not np.isfinite(scores).all():
        raise ShapeError(
            f"scores of shape {scores.shape} and labels of {positive.shape}: expected one finite score per example"
        )
    if positive.all() or not positive.any():
        raise ShapeError(f"{int(positive.sum())} of {len(positive)} examples are positive: an AUC needs both kinds")
    value = _auc(scores, positive)

    def resampled(rows: np.ndarray) -> float:
        return _auc(scores[rows], positive[rows])

    return AUC(value, interval(value, bootstrap(len(scores), resampled, seed), 0.0, 1.0))


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """By counting, for each positive score, the other scores below it; NaN when all are of one kind."""
    ours, others = scores[positive], np.sort(scores[~positive])
    if not len(ours) or not len(others):
        return float("nan")
    below, up_to = np.searchsorted(others, ours, "left"), np.searchsorted(others, ours, "right")
    return float((below + up_to).mean() / (2 * len(others)))
