"""How much a query's loss rises when the examples that scores name are removed and the model is trained again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.engine.fidelity.cache import Run
from gradsift.engine.fidelity.intervals import Interval, bootstrap, interval
from gradsift.engine.fidelity.recall import best_rows
from gradsift.kernels.errors import ShapeError

__all__ = ["QLD", "qld", "removals"]


@dataclass(frozen=True, slots=True)
class QLD:
    """Rise of a query's own loss without the examples named for it.

    Attributes:
        mean: over queries and seeds, in units of the loss.
        per_query: (q,).
        interval: of the mean, by a bootstrap over queries.
        draws: (draws,) the mean in each resample, the same resamples for all scores.
    """

    mean: float
    per_query: np.ndarray
    interval: Interval
    draws: np.ndarray


def removals(scores: np.ndarray, share: float, seeds: int) -> list[Run]:
    """The retrainings that scores ask for: without the top share of each query, under each seed; query by query.

    Raises:
        ShapeError: the share is less than one example, or all of them.
    """
    n = scores.shape[1]
    count = int(share * n)
    if not 0 < count < n:
        raise ShapeError(f"a share of {share} is {count} of {n} examples: expected at least 1 and not all")
    runs = []
    for named in best_rows(scores, count):
        kept = np.ones(n, dtype=bool)
        kept[named] = False
        rows = tuple(np.flatnonzero(kept).tolist())
        runs += [(rows, seed) for seed in range(seeds)]
    return runs


def qld(whole: np.ndarray, without: np.ndarray, seed: int = 0) -> QLD:
    """Query loss difference.

    Args:
        whole: (seeds, q) losses of the queries after training on everything.
        without: (q, seeds, q) losses after training without what was named for the first axis's query.
        seed: of the bootstrap.
    """
    q = whole.shape[1]
    if without.shape != (q, len(whole), q):
        raise ShapeError(f"losses {whole.shape} and {without.shape}: expected (seeds, q) and (q, seeds, q)")
    own = without[np.arange(q), :, np.arange(q)]
    per_query = (own - whole.T).mean(axis=1)
    draws = bootstrap(q, lambda rows: float(per_query[rows].mean()), seed)
    mean = float(per_query.mean())
    return QLD(mean, per_query, interval(mean, draws), draws)
