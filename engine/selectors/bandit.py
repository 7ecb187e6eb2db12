"""Clusters as the arms of a bandit: only rows that are drawn are ever scored.

Every round takes the clusters of highest ``mean + alpha sqrt(2 ln(sum T) / T)``, scores a few rows of each, and goes on
until enough rows help. Untouched clusters come first, ties by number.

Source: Quad, arXiv 2409.16986; its alpha, threshold and rows per draw were not found, so they are options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gradsift.engine.selectors.labels import grouped
from gradsift.kernels.errors import SpecError

__all__ = ["Drawn", "draw_clusters"]


class Drawn(NamedTuple):
    """What the bandit kept, best first.

    Attributes:
        rows, scores, clusters, rounds: (m,) each: the row, its influence, its cluster, and when it was drawn, from 1.
        scored: how many rows were scored in all.
    """

    rows: np.ndarray
    scores: np.ndarray
    clusters: np.ndarray
    rounds: np.ndarray
    scored: int


def draw_clusters(
    clusters: np.ndarray,
    influence: Callable[[np.ndarray], np.ndarray],
    budget: int,
    *,
    alpha: float = 1.0,
    threshold: float = 0.0,
    per_draw: int = 8,
    at_once: int = 8,
    seed: int = 0,
) -> Drawn:
    """Draw rows until ``budget`` of them have an influence above the threshold and no cluster is untouched.

    Args:
        clusters: int64 (n,), the cluster of each row; -1 leaves a row out.
        influence: ``influence(rows) -> float64 (m,)``; it may compute gradients, as it is asked for drawn rows only.
        alpha: weight of curiosity, in standard deviations of the first round's influences: 0 is greedy.
        threshold: influence above which a row is kept.
        per_draw: rows of a cluster that are drawn at a time. at_once: clusters per round.
        seed: of the order in which a cluster's rows are drawn.
    """
    if min(per_draw, at_once) < 1 or not alpha >= 0:
        raise SpecError(
            f"per_draw, at_once and alpha are {per_draw}, {at_once} and {alpha}, expected 1, 1 and 0 or more"
        )
    rows_in = np.flatnonzero(clusters >= 0)
    names, index = np.unique(clusters[rows_in], return_inverse=True)
    left = [
        np.random.default_rng((seed, int(name))).permutation(members).tolist()
        for name, members in zip(names, grouped(rows_in, index, len(names)), strict=True)
    ]
    total, times = np.zeros(len(names)), np.zeros(len(names))
    rows: list[int] = []
    scores: list[float] = []
    rounds: list[int] = []
    turn, helpful, scale = 0, 0, 1.0
    while any(left) and ((times == 0).any() or helpful < budget):
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = total / times / scale + alpha * np.sqrt(2 * np.log(max(times.sum(), 1)) / times)
        worth[times == 0] = np.inf
        worth[[not rest for rest in left]] = -np.inf
        arms = [arm for arm in np.argsort(-worth, kind="stable")[:at_once].tolist() if left[arm]]
        taken = [left[arm][:per_draw] for arm in arms]
        found = np.asarray(influence(np.concatenate([np.array(part, dtype=np.int64) for part in taken])), dtype=float)
        if turn == 0:
            scale = float(found.std()) or 1.0
        turn, helpful = turn + 1, helpful + int((found > threshold).sum())
        for arm, part, gained in zip(
            arms, taken, np.split(found, np.cumsum([len(p) for p in taken])[:-1]), strict=True
        ):
            left[arm] = left[arm][len(part) :]
            total[arm] += gained.sum()
            times[arm] += len(part)
            rows += part
            scores += gained.tolist()
            rounds += [turn] * len(part)
    kept = np.flatnonzero(np.array(scores) > threshold)
    chosen, worths = np.array(rows, dtype=np.int64)[kept], np.array(scores)[kept]
    order = np.lexsort((chosen, -worths))[:budget]
    chosen = chosen[order]
    return Drawn(chosen, worths[order], clusters[chosen], np.array(rounds)[kept][order], len(rows))
