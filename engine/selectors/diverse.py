"""Compact explanations: a few rows that together account for a query, helpful and unlike each other.

Source: arXiv 2601.03786 and loris3/ceelm.
"""

from __future__ import annotations

import heapq
from typing import Any, Literal

import numpy as np

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.answers.search import MEMORY
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import parts_of
from gradsift.engine.selectors.influence import Influence
from gradsift.engine.selectors.protocol import Choice, Targets, wanted
from gradsift.engine.selectors.rows import allowed_rows, best_first, fetch, plain_rows, settle
from gradsift.engine.selectors.simplex import rebuild
from gradsift.engine.selectors.top import best_rows
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = ["Diverse", "cover"]


class Diverse:
    """Greedy facility location among the most influential rows.

    Each step takes the row of largest ``(gain + 1)^lam / cost^(1 - lam)``: gain is how much better the candidates are
    covered, by cosine with their nearest chosen row; cost is the influence scaled to [1, m], 1 for the most helpful.

    Args:
        lam: 0 takes the most influential rows, 1 only covers.
        candidates: m, rows of highest influence that are looked at; unless given, 100 or twice the budget if larger.
        simplex: how the query is rebuilt from the rows, see ``rebuild``: the mixture is the choice's weights, its
            quality the fact "quality_db".
        damping: of the scorer, where it has one. memory: bytes to work in.
    """

    about = Method(
        name="diverse",
        formula="greedy argmax (gain of coverage + 1)^lam / cost^(1-lam) among the m most influential rows",
        needs="targets of one query",
        cost="1 pass after the scorer's, O(m (m + dim))",
        source="Compact example-based explanations, arXiv 2601.03786",
        published="for small k the most influential rows are often worse than random ones, the balanced are not",
    )

    def __init__(
        self,
        lam: float = 0.5,
        candidates: int | None = None,
        simplex: Literal["exact", "paper"] = "exact",
        damping: float | None = None,
        memory: int = MEMORY,
    ) -> None:
        if not 0 <= lam <= 1:
            raise SpecError(f"lam is {lam}, expected 0 (influence) to 1 (coverage)")
        if simplex not in ("exact", "paper"):
            raise SpecError(f"simplex is {simplex!r}, expected 'exact' or 'paper'")
        self.lam, self.candidates, self.simplex = lam, candidates, simplex
        self.damping, self.memory = damping, memory

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Prepare the scorer for the mean of the targets, which is the query."""
        if targets is None:
            raise DataError("method 'diverse' explains a query: give it as targets")
        if targets.tasks.named and len(targets.tasks) > 1:
            raise DataError(
                f"method 'diverse' explains one query but {len(targets.tasks)} tasks were given: choose for each alone"
            )
        plain_rows(store, "diverse")
        self._influence = Influence(store, targets, scorer, self.damping)
        self.scorer, self._store, self._allowed = self._influence.name, store, allowed_rows(store)
        query = parts_of(store).by_checkpoint(targets.queries.values.mean(dim=0, keepdim=True))
        self._query = query.flatten().numpy()
        if not self._query.any():
            raise ShapeError("the targets' gradients cancel out, so there is no query to explain: give fewer")

    def choose(self, budget: int | None) -> Choice:
        """Rows in the order in which they were taken, their influences, and how well they rebuild the query."""
        count = min(wanted(budget, "diverse"), len(self._allowed))
        most = min(self.candidates or max(100, 2 * count), len(self._allowed))
        if most < count:
            raise DataError(
                f"there are {most} candidates for a budget of {count} rows: give candidates={count} or more"
            )
        rows, influence = self._candidates(most)
        features = fetch(self._store, rows).flatten(1).numpy()
        length = np.linalg.norm(features, axis=1, keepdims=True)
        unit = np.divide(features, length, out=np.zeros_like(features), where=length > 0)
        order, gains = cover(unit @ unit.T, influence, count, self.lam)
        rebuilt = rebuild(features[order], self._query, self.simplex)
        reasons = [f"covers {gain:.3g} of {most} candidates more" for gain in gains]
        facts = {"quality_db": rebuilt.quality, "candidates": float(most)}
        return Choice(rows[order], influence[order], reasons, rebuilt.weights, facts)

    def _candidates(self, most: int) -> tuple[np.ndarray, np.ndarray]:
        directions = self._influence.directions
        if directions is not None:
            mean = directions.mean(dim=0, keepdim=True)
            best = best_rows(self._influence, mean, most, self._allowed, self.memory, together=True)
            return best.rows[0], best.scores[0]
        every = np.concatenate([block.mean(axis=1) for _, block in self._influence.by_task()])
        scores = settle(every[self._allowed])
        order = best_first(scores)[:most]
        return self._allowed[order], scores[order]


def cover(similarity: np.ndarray, influence: np.ndarray, count: int, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Greedy facility location, lazily: gains only fall, so a row whose old worth is below the best is not looked at.

    Args:
        similarity: float64 (m, m); an uncovered row counts as 0, and negative similarity covers nothing.
        influence: float64 (m,), of the candidates in the order in which equal ones are taken.

    Returns:
        places in the order in which they are taken, and the gain of each, both (count,).
    """
    size = len(influence)
    low, high = float(influence.min()), float(influence.max())
    cost = 1 + (size - 1) * ((high - influence) / (high - low) if high > low else np.zeros(size))
    covered = np.zeros(size)

    def gain(place: int) -> float:
        return float(np.maximum(similarity[place] - covered, 0).sum())

    def worth(place: int, gained: float) -> float:
        return float(np.round((gained + 1) ** lam / cost[place] ** (1 - lam), 12))

    first = [gain(place) for place in range(size)]
    heap = [(-worth(place, first[place]), place, 0, first[place]) for place in range(size)]
    heapq.heapify(heap)
    places: list[int] = []
    gains: list[float] = []
    while len(places) < count:
        _, place, seen, gained = heapq.heappop(heap)
        if seen < len(places):
            gained = gain(place)
            heapq.heappush(heap, (-worth(place, gained), place, len(places), gained))
            continue
        places.append(place)
        gains.append(gained)
        covered = np.maximum(covered, similarity[place])
    return np.array(places, dtype=np.int64), np.array(gains)
