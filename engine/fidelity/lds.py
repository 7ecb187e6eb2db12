"""The linear datamodelling score: do scores add up to what retraining on random halves of the data does?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.engine.fidelity.intervals import Interval, interval
from gradsift.kernels.errors import ShapeError

__all__ = ["LDS", "lds", "reliability", "subsets"]

_DRAWS = 400
"""Of the bootstrap."""


def subsets(examples: int, count: int, alpha: float = 0.5, seed: int = 0) -> np.ndarray:
    """Subsets of ``floor(alpha * examples)`` examples, each drawn uniformly: bool (count, examples).

    Raises:
        ShapeError: a subset would be empty or everything.
    """
    size = int(alpha * examples)
    if not 0 < size < examples or count < 2:
        raise ShapeError(
            f"{count} subsets of {size} out of {examples} examples: expected at least 2, none empty and none of all"
        )
    rng = np.random.default_rng(seed)
    chosen = np.zeros((count, examples), dtype=bool)
    for row in chosen:
        row[rng.choice(examples, size, replace=False)] = True
    return chosen


@dataclass(frozen=True, slots=True)
class LDS:
    """How well scores predict retraining.

    Attributes:
        mean: over the queries whose correlation is defined; NaN when none is.
        per_query: (q,) Spearman correlations over the subsets, NaN where scores or losses are constant.
        interval: of the mean, by a bootstrap over queries and subsets.
        draws: (draws,) the mean in each resample; the same resamples for all scores of one protocol, so the
            difference of two is a paired one.
    """

    mean: float
    per_query: np.ndarray
    interval: Interval
    draws: np.ndarray

    @property
    def undefined(self) -> int:
        """Queries without a correlation."""
        return int(np.isnan(self.per_query).sum())


def lds(scores: np.ndarray, chosen: np.ndarray, losses: np.ndarray, seed: int = 0) -> LDS:
    """Spearman correlation, per query and over subsets, of summed scores with what retraining measured.

    Args:
        scores: (q, n), positive = training on the example lowers the query's loss.
        chosen: bool (m, n), the subsets.
        losses: (m, q), each query's loss after retraining on each subset, averaged over seeds.
        seed: of the bootstrap.

    Source: Ilyas et al. 2202.00622, Park et al. 2303.14186; the Spearman correlation is taken per query, then averaged.

    Raises:
        ShapeError: the shapes do not fit, or scores are not finite.
    """
    q, n = scores.shape
    if chosen.shape != (len(losses), n) or losses.shape[1] != q:
        raise ShapeError(
            f"scores {scores.shape}, subsets {chosen.shape} and losses {losses.shape} do not fit: "
            "expected (q, n), (m, n) and (m, q)"
        )
    if not np.isfinite(scores).all():
        raise ShapeError("scores hold NaN or infinity: expected one finite score per query and example")
    predicted = chosen.astype(np.float64) @ np.asarray(scores, dtype=np.float64).T
    measured = -np.asarray(losses, dtype=np.float64)
    per_query = spearman(predicted, measured)
    rng = np.random.default_rng(seed)
    draws = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        rows, columns = rng.integers(len(losses), size=len(losses)), rng.integers(q, size=q)
        draws[draw] = _mean(spearman(predicted[rows], measured[rows])[columns])
    mean = _mean(per_query)
    return LDS(mean, per_query, interval(mean, draws, -1.0, 1.0), draws)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman correlation of the columns of (m, q) arrays, average ranks for ties: (q,), NaN for a constant column."""
    a, b = _centred_ranks(a), _centred_ranks(b)
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return np.asarray(np.divide((a * b).sum(axis=0), scale, out=np.full(a.shape[1], np.nan), where=scale > 0))


def reliability(losses: np.ndarray) -> float:
    """The LDS that a perfect prediction could reach: how much of the measured order is order and not the seed.

    Args:
        losses: (seeds, m, q).

    Returns:
        root of the reliability of the mean over seeds, from the mean correlation of two seeds by Spearman and Brown's
        formula; NaN with one seed.
    """
    seeds = len(losses)
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    if not pairs:
        return float("nan")
    one = max(0.0, float(np.mean([_mean(spearman(losses[i], losses[j])) for i, j in pairs])))
    return float(np.sqrt(seeds * one / (1 + (seeds - 1) * one)))


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of each column, equal values sharing their mean rank, less the column's mean."""
    m = len(values)
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    new = np.ones(values.shape, dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    place = np.arange(m)[:, None]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=0)
    after = np.ones(values.shape, dtype=bool)
    after[:-1] = new[1:]
    last = np.minimum.accumulate(np.where(after, place, m)[::-1], axis=0)[::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=0)
    return np.asarray(ranks - ranks.mean(axis=0))


def _mean(values: np.ndarray) -> float:
    """Mean of what is defined."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")
