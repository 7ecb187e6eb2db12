"""The damping that examples the model has not seen speak for, without any retraining.

Removing example i from training raises its own loss by its influence on itself: to first order by
``g_i' (F + lambda I)^-1 g_i / n``. The mean of that over the training set is what seeing an example is worth, and that
can be measured another way: it is how much higher the loss is on examples that were not seen. So lambda is taken where
the two agree. A model that was trained longer has the larger gap and gets the smaller lambda, as it must.

Checked where retraining truth is known: on nine small networks and softmax regressions on digits (30 to 400 steps of
Adam, 1 or 4 labels drawn per example) the k found this way had .96 to 1 of the best LDS of any k, though that best k
went from .01 to 1. A fixed k of 1 had .76 to 1 of it, of .1 .88 to 1; the likelihood of held-out curvature rows, which
also depends on the sketch's size, .8 to 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.curvature.fisher import Fisher
from gradsift.kernels.errors import ShapeError

__all__ = ["SWEEP", "Evidence", "choose"]

SWEEP = tuple(float(f"{10 ** (e / 4):.3g}") for e in range(-12, 9))
"""k that are tried: .001 to 100, four a decade."""

logger = logging.getLogger(__name__)


class Evidence(NamedTuple):
    """Which k was chosen, and why.

    Attributes:
        k: where prediction and observation agree.
        observed: mean loss of unseen examples less that of the training set, per example.
        predicted: for each k of the sweep the mean influence of a training example on its own loss.
    """

    k: float
    observed: float
    predicted: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return (
            f"k = {self.k:.3g}: unseen examples lose {self.observed:.3g} more than training examples, as the influence "
            "of these on themselves predicts at this damping"
        )


def choose(fisher: Fisher, blocks: Iterable[Tensor], examples: int, observed: float) -> Evidence:
    """The k at which training examples' influence on themselves is the gap that is observed.

    Args:
        fisher: of the sketched curvature rows, at k = 1.
        blocks: sketched rows of training examples, (m, dim) or (m, parts, dim), in all of the store or some of it.
        examples: n, that the model was trained on.
        observed: mean loss of unseen examples less that of training examples.

    Returns:
        k, interpolated between those of the sweep; the largest when unseen examples lose no more than others, and the
        nearest end when the gap is beyond all of them, with a warning.

    Raises:
        ShapeError: there is no row, or the gap is not finite.
    """
    if not np.isfinite(observed):
        raise ShapeError(f"the gap between unseen and training losses is {observed}, expected a finite number")
    rows = fisher.rows.to(torch.float64)
    count = len(rows)
    dual = count < rows.shape[1]
    values, vectors = torch.linalg.eigh((rows @ rows.T if dual else rows.T @ rows) / count)
    values = values.clamp_min(0)
    inside, total, seen = torch.zeros_like(values), 0.0, 0
    for block in blocks:
        phi = (block if block.ndim == 2 else block.sum(dim=1)).to(torch.float64)
        along = phi @ rows.T @ vectors / count**0.5 if dual else phi @ vectors
        inside += along.square().sum(0)
        total += float(phi.square().sum())
        seen += len(phi)
    if not seen:
        raise ShapeError("there is no training row to choose a damping by: extract something first")

    def predicted(k: float) -> float:
        damping = k * fisher.damping
        if not dual:
            return float((inside / (values + damping)).sum()) / seen / examples
        return (total - float((inside / (values + damping)).sum())) / damping / seen / examples

    curve = tuple((k, predicted(k)) for k in SWEEP)
    return Evidence(_crossing(curve, observed), observed, curve)


def _crossing(curve: tuple[tuple[float, float], ...], observed: float) -> float:
    """k where the falling curve meets the observation, on logarithmic axes."""
    (least, highest), (most, lowest) = curve[0], curve[-1]
    if observed <= lowest:
        logger.warning(
            "unseen examples lose %.3g more than training examples, which asks for a damping above all of the sweep: "
            "k = %g; influences on a model that learned so little from single examples are small",
            observed,
            most,
        )
        return most
    if observed >= highest:
        logger.warning(
            "unseen examples lose %.3g more than training examples, which asks for a damping below all of the sweep: "
            "k = %g; see whether they are of the same kind",
            observed,
            least,
        )
        return least
    k, gap = (np.log(np.array(side)) for side in zip(*curve, strict=True))
    return float(np.exp(np.interp(-np.log(observed), -gap, k)))
