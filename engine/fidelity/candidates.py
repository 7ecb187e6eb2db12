"""What is compared: ways to score every example for every query, from random numbers to exact curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradsift.engine.fidelity.bench import EXACT, Bench
from gradsift.kernels.spec import SketchSpec

__all__ = ["Candidate", "exact", "exact_fisher", "sketched"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: what it is called there.
        family: "baseline", "exact" (gradients kept whole), "sketch", "codes" (a compacted store) or "own".
        scores: ``scores(bench) -> (q, n)``, positive = training on the example lowers the query's loss.
        bytes: ``bytes(bench)``, what is kept of one example; None where that is not the point.
        truth: ``truth(bench) -> (q, n)``, the same formula by exact gradients, to say how much of it survives.
        suspicion: ``suspicion(bench) -> (n,)``, higher = more likely mislabelled; less than the mean score for the
            queries unless given.
        method: the name in `gradsift methods` of what it measures; None for baselines.
    """

    name: str
    family: str
    scores: Callable[[Bench], np.ndarray] | None
    bytes: Callable[[Bench], int] | None = None
    truth: Callable[[Bench], np.ndarray] | None = None
    suspicion: Callable[[Bench], np.ndarray] | None = None
    method: str | None = None


def exact(scorer: str) -> Candidate:
    """Exact gradients, compared by a scorer that reads no curvature sample."""
    return Candidate(
        f"exact {scorer}",
        "exact",
        lambda bench: bench.scores(scorer, EXACT),
        lambda bench: 4 * bench.parameters,
        method=scorer,
    )


def exact_fisher(damping: float, labels: int | None = None) -> Candidate:
    """Exact gradients and the damped true Fisher."""
    drawn = "" if labels is None else f", {labels} label" + "s" * (labels > 1)
    return Candidate(
        f"exact fisher, k {damping:g}{drawn}",
        "exact",
        lambda bench: bench.exact_fisher.scores(damping, labels),
        lambda bench: 4 * bench.parameters,
        suspicion=lambda bench: bench.exact_fisher.own(damping),
        method="fisher",
    )


def sketched(scorer: Any, dim: int, damping: float | None = None, truth: Candidate | None = None) -> Candidate:
    """A scorer inside a sketch, as ``topk`` uses it."""
    spec = SketchSpec(dim=dim)
    k = "" if damping is None else f", k {damping:g}"
    return Candidate(
        f"{scorer}{k}, dim {dim}",
        "sketch",
        lambda bench: bench.scores(scorer, spec, damping),
        lambda bench: 4 * dim,
        None if truth is None else truth.scores,
        method=scorer,
    )
