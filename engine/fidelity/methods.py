"""The methods that are compared unless told otherwise."""

from __future__ import annotations

from gradsift.engine.fidelity.baselines import BASELINES
from gradsift.engine.fidelity.bench import Bench
from gradsift.engine.fidelity.candidates import (
    Candidate,
    alone,
    coded,
    corrected,
    decided,
    exact,
    exact_fisher,
    sketched,
)
from gradsift.engine.fidelity.exact import By

__all__ = ["MODELS", "standard"]

MODELS = 3
"""Trainings whose scores one row averages."""

_SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_DIMS = (1024, 4096, 8192)
_SIZES = (128, 256, 512)
_DECIDED = (128, 256)
_METRICS: tuple[By, ...] = ("layer", "number")


def standard(bench: Bench) -> list[Candidate]:
    """All that may fit a case; what does not is named when it is tried."""
    dot, fisher = exact("dot"), exact_fisher(1.0)
    dims = [dim for dim in _DIMS if dim < bench.parameters] or [_DIMS[0]]  # a sketch longer than a gradient is none
    usual = dims[min(1, len(dims) - 1)]
    found = [*BASELINES, dot, exact("cosine")]
    found += [exact_fisher(k) for k in _SWEEP]
    found += [exact_fisher(1.0, labels) for labels in (1, 2, 4) if labels * bench.case.examples < bench.labels]
    found += [exact_fisher(k, by=by) for by in _METRICS for k in (1.0, 3.0)]
    found.append(exact_fisher(1.0, models=MODELS))
    found += [corrected("ekfac", k) for k in (0.3, 1.0, 3.0)]
    found.append(corrected("ggn", 1.0))
    for dim in dims:
        found += [sketched("dot", dim, truth=dot), sketched("fisher", dim, 1.0, truth=fisher)]
    found += [sketched("fisher", dim, 0.3, truth=exact_fisher(0.3)) for dim in dims]
    for size in _SIZES:
        codes = coded("fisher", usual, size, 1.0, truth=fisher)
        found += [coded("dot", usual, size, truth=dot), codes]
        if size in _DECIDED:
            found.append(decided(codes, fisher))
    found += [coded("fisher", usual, size, 0.3, truth=exact_fisher(0.3)) for size in _SIZES]
    found += [sketched("trak", usual), sketched("datainf", 1024, grouped=True)]
    if bench.case.checkpoints is not None:
        found += [sketched("dot", usual, along="plain"), sketched("less", usual, along="adam")]
    if "timesteps" in bench.case.measures:
        found.append(sketched("dmin", usual, measure="timesteps"))
    if "squared_prediction" in bench.case.measures:
        found.append(sketched("dtrak", usual, measure="squared_prediction"))
    if bench.case.wrong is not None:
        found += [alone("self", usual), alone("self_fisher", usual)]
    return found
