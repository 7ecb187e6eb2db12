"""Recall of a compacted store on held-out queries, before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.given import Given
from gradsift.engine.answers.queries import AnyScorer, prepare
from gradsift.engine.answers.scan import Best, best_streamed
from gradsift.engine.answers.search import ExactScores, find, topk
from gradsift.engine.compaction.axes import Axes
from gradsift.engine.compaction.codes import decode, encode
from gradsift.engine.compaction.units import Units
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import SpecError, StoreError

__all__ = ["HELD", "SHORTLIST", "Coding", "K", "Question", "Recall", "ask", "held_rows", "measure"]

K = 10
SHORTLIST = 100
"""Rows that are scored again, of which the best K answer."""

HELD = 64
"""Rows held out of the axes at most, a tenth of the store at most."""

Tick = Callable[[int], None]
"""Called with the rows that are done."""


@dataclass(frozen=True, slots=True)
class Recall:
    """How many of the whole sketch's best K rows a compacted store finds, on average over queries.

    Attributes:
        alone: by its codes.
        listed: among its best ``SHORTLIST`` rows, when these are scored again.
        judge: what scored them again: "sketch", the whole rows; or "exact gradients", after which the truth is what
            exact gradients say of the whole sketch's own short list.
        queries: how many were asked.
        asked: "held-out rows" of the store itself, each without its own row; or "given".
        scorer: whose answers were compared.
        bytes, axes, bits: as of ``About``.
    """

    alone: float
    listed: float
    judge: str
    queries: int
    asked: str
    scorer: str
    bytes: int
    axes: int
    bits: int


@dataclass(frozen=True, slots=True)
class Coding:
    """One way to code rows."""

    axes: Axes
    bits: int
    bytes: int

    def encode(self, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of rows (m, checkpoints * dim)."""
        return encode(self.axes.project(rows), self.bits)


@dataclass(frozen=True, slots=True)
class Question:
    """Queries, with what the whole sketch answers.

    Attributes:
        given: as they were given, or the held-out rows.
        scorer: what compares them.
        name: of the scorer that is used.
        directions, weights: what is asked of rows whose parts were summed.
        own: int64 (q,), each query's own row, -1 where it is none of the store's.
        truth: int64 (q, m), the store's best rows, the query's own left out.
    """

    given: Given
    scorer: AnyScorer
    name: str
    directions: Tensor
    weights: np.ndarray | None
    own: np.ndarray
    truth: np.ndarray


def held_rows(store: FeatureStore) -> list[int]:
    """Rows to be held out, the same for the same store: at random among those with a gradient.

    Raises:
        StoreError: there are too few.
    """
    norms = np.asarray(store.grad_norm, dtype=np.float64).reshape(len(store), -1)
    usable = np.flatnonzero(~(norms == 0).all(axis=1))
    count = min(HELD, len(usable) // 10)
    if not count:
        raise StoreError(
            f"'{store.path}' holds {len(usable)} rows with a gradient, too few to hold some out and measure what "
            "compaction loses: expected at least 10"
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(0))
    return sorted(usable[order[:count].numpy()].tolist())


def ask(store: FeatureStore, units: Units, scorer: AnyScorer, queries: Given | None, held: Sequence[int]) -> Question:
    """Put queries, or held-out rows, to the whole store.

    Raises:
        SpecError: the scorer's scores are no products with rows.
        StoreError: the scorer asks for parts of rows that compaction sums.
    """
    given = torch.from_numpy(store.features[list(held)]) if queries is None else queries
    prepared = prepare(store, given, scorer)
    if prepared.directions is None:
        raise SpecError(
            f"scores of {prepared.name!r} are no products of directions with rows, which is all that codes keep: "
            "compact for 'fisher', 'dot' or 'cosine'"
        )
    directions, weights = units.queries(prepared.directions, prepared.weights)
    own = np.asarray(held) if queries is None else np.full(len(directions), -1)
    truth = _others(find(prepared, min(SHORTLIST + 1, len(store))).rows, own)
    return Question(given, scorer, prepared.name, directions, weights, own, truth)


def measure(
    store: FeatureStore, units: Units, question: Question, coding: Coding, rescore: ExactScores | None, tick: Tick
) -> Recall:
    """Code every row, and compare what the codes answer with what the whole rows do; one pass, nothing is written.

    Args:
        rescore: exact scores of given queries; the whole rows' own where it is None.
    """
    asked = coding.axes.turn(question.directions)
    best = best_streamed(_scores(store, units, question.weights, asked, coding, tick), min(SHORTLIST + 1, len(store)))
    found = _others(best.rows, question.own)
    truth = question.truth[:, :K]
    alone = _share(found[:, :K], truth)
    if rescore is None:
        listed = _share(found, truth)
    else:
        whole = Best(np.zeros(question.truth.shape), question.truth)
        exact = [
            topk(_Listed(store, some), question.given, K, question.scorer, rescore=rescore, shortlist=SHORTLIST).rows
            for some in (Best(np.zeros(found.shape), found), whole)
        ]
        listed = _share(*exact)
    return Recall(
        alone=alone,
        listed=listed,
        judge="sketch" if rescore is None else "exact gradients",
        queries=len(asked),
        asked="held-out rows" if (question.own >= 0).any() else "given",
        scorer=question.name,
        bytes=coding.bytes,
        axes=len(coding.axes),
        bits=coding.bits,
    )


def _scores(
    store: FeatureStore, units: Units, weights: np.ndarray | None, asked: Tensor, coding: Coding, tick: Tick
) -> Iterator[tuple[int, np.ndarray]]:
    """First row and float64 (q, rows), by what the codes stand for."""
    for first, block in store.blocks():
        rows = decode(*coding.encode(units.fold(block).flatten(1)), coding.bits).to(torch.float64)
        scores = (asked @ rows.T).numpy()
        if weights is not None:
            scores *= weights[first : first + len(block)]
        yield first, scores
        tick(first + len(block))


def _others(rows: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Best rows without the queries' own: one column fewer, where there was one too many."""
    kept = [row[row != this][:SHORTLIST] for row, this in zip(rows, own, strict=True)]
    width = min(len(row) for row in kept)
    return np.stack([row[:width] for row in kept])


def _share(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the true rows that were found."""
    return float(np.mean([np.isin(wanted, some).mean() for some, wanted in zip(found, truth, strict=True)]))


class _Listed:
    """A store whose search was made: exact scores order what it found."""

    def __init__(self, store: FeatureStore, best: Best) -> None:
        self._store, self._best = store, best

    def __len__(self) -> int:
        return len(self._store)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def search(self, directions: Tensor, k: int, **options: Any) -> Best:
        """What was found, whatever is asked."""
        return Best(self._best.scores[:, :k], self._best.rows[:, :k])
