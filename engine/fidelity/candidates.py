"""What is compared: ways to score every example for every query, from random numbers to exact curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.engine.fidelity.bench import EXACT, Bench, Rows
from gradsift.engine.fidelity.corrected import corrected_scores
from gradsift.engine.fidelity.exact import By, ExactFisher
from gradsift.engine.fidelity.recall import best_rows
from gradsift.engine.scorers.protocol import name_of
from gradsift.kernels.errors import DataError
from gradsift.kernels.spec import SketchSpec

__all__ = ["Candidate", "alone", "coded", "corrected", "decided", "exact", "exact_fisher", "sketched"]

_DRAWN = 2
"""Labels per example behind a correction: EK-FAC averages over all positions anyway."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: what it is called there.
        family: "baseline", "exact" (gradients kept whole), "sketch", "codes" (a compacted store) or "own".
        scores: ``scores(bench) -> (q, n)``, positive = training on the example lowers the query's loss.
        bytes: ``bytes(bench)``, what is kept of one example; None where that is not the point.
        truth: the same formula by exact gradients, to say how much of it survives.
        suspicion: ``suspicion(bench) -> (n,)``, higher = more likely mislabelled; less than the mean score for the
            queries unless given.
        method: the name in `gradsift methods` of what it measures; None for baselines.
        partial: only its best examples are an answer, so its scores are not to be summed.
    """

    name: str
    family: str
    scores: Callable[[Bench], np.ndarray] | None
    bytes: Callable[[Bench], int] | None = None
    truth: Candidate | None = None
    suspicion: Callable[[Bench], np.ndarray] | None = None
    method: str | None = None
    partial: bool = False


def exact(scorer: str) -> Candidate:
    """Exact gradients, compared by a scorer that reads no curvature sample."""
    return Candidate(
        f"exact {scorer}",
        "exact",
        lambda bench: bench.scores(scorer, Rows(EXACT, curvature=False)),
        lambda bench: 4 * bench.parameters,
        method=scorer,
    )


def exact_fisher(damping: float, labels: int | None = None, models: int = 1, by: By = "all") -> Candidate:
    """Exact gradients and the damped true Fisher.

    Args:
        labels: drawn for each example. models: trained under seeds 0, 1, ...; the mean of what they say.
        by: what the damping goes with, see ``ExactFisher``.
    """
    drawn = "" if labels is None else f", {labels} label" + "s" * (labels > 1)
    how = f", {models} models" if models > 1 else "" if by == "all" else f", by {by}"

    def mean(figure: Callable[[ExactFisher], np.ndarray]) -> Callable[[Bench], np.ndarray]:
        """Over the models; the first shows whether gradients fit before another is trained."""

        def over(bench: Bench) -> np.ndarray:
            first = figure(bench.exact_fisher(by))
            others = [figure(bench.again(seed).exact_fisher(by)) for seed in range(1, models)]
            return np.asarray(np.mean([first, *others], axis=0))

        return over

    return Candidate(
        f"exact fisher, k {damping:g}{drawn}{how}",
        "exact",
        mean(lambda fisher: fisher.scores(damping, labels)),
        lambda bench: 4 * bench.parameters * models,
        suspicion=mean(lambda fisher: fisher.own(damping, labels)),
        method="fisher",
    )


def corrected(method: str, damping: float) -> Candidate:
    """Exact gradients along queries that a correction of `gradsift methods` made."""
    return Candidate(
        f"exact {method}, k {damping:g}",
        "exact",
        lambda bench: corrected_scores(bench, method, damping, _DRAWN),
        lambda bench: 4 * bench.parameters,
        method=method,
    )


def sketched(
    scorer: Any,
    dim: int,
    damping: float | None = None,
    truth: Candidate | None = None,
    *,
    grouped: bool = False,
    along: str | None = None,
    measure: str | None = None,
) -> Candidate:
    """A scorer inside a sketch, as ``topk`` uses it.

    Args:
        scorer: a name, or a scorer of your own.
        grouped, along, measure: as of ``Rows``.
    """
    own = not isinstance(scorer, str)
    rows = Rows(SketchSpec(dim=dim), grouped, along, along is None and measure is None and not grouped, measure)
    k = "" if damping is None else f", k {damping:g}"
    after = ", checkpoints" if along is not None else ""
    return Candidate(
        f"{name_of(scorer) if own else scorer}{k}{after}, dim {dim}",
        "own" if own else "sketch",
        lambda bench: bench.scores(scorer, rows, damping),
        lambda bench: int(np.prod(bench.store(rows).features.shape[1:])) * 4,
        truth,
        method=None if own else scorer,
    )


def coded(scorer: str, dim: int, size: int, damping: float | None = None, truth: Candidate | None = None) -> Candidate:
    """A scorer over a store of ``dim`` numbers that was compacted to so many bytes per example at most."""
    rows = Rows(SketchSpec(dim=dim))
    k = "" if damping is None else f", k {damping:g}"
    return Candidate(
        f"{scorer}{k}, {size} B",
        "codes",
        lambda bench: bench.coded_scores(scorer, rows, size, damping),
        lambda bench: bench.coded(scorer, rows, size).bytes,
        truth,
        method=scorer,
    )


def decided(found: Candidate, truth: Candidate, listed: int = 100) -> Candidate:
    """The answer of two stages: one method finds so many examples, exact scores put them in order."""

    def scores(bench: Bench) -> np.ndarray:
        own, true = _scores(found, bench), _scores(truth, bench)
        best = best_rows(own, min(listed, own.shape[1]))
        order = np.take_along_axis(true, best, axis=1)
        mixed: np.ndarray = (
            own - own.max(axis=1, keepdims=True) + order.min(axis=1, keepdims=True)
        )  # the others come after
        np.put_along_axis(mixed, best, order, axis=1)
        return mixed

    name = f"{found.name} + exact"
    return Candidate(name, found.family, scores, found.bytes, truth, method=found.method, partial=True)


def alone(scorer: str, dim: int) -> Candidate:
    """A scorer of examples alone: it says what is odd, not what helps whom."""
    return Candidate(
        scorer,
        "sketch",
        None,
        suspicion=lambda bench: bench.own(scorer, Rows(SketchSpec(dim=dim))),
        method=scorer,
    )


def _scores(candidate: Candidate, bench: Bench) -> np.ndarray:
    scores = bench.remembered(candidate)
    if scores is None:
        raise DataError(f"{candidate.name} scores examples alone: expected a method that scores them for queries")
    return scores
