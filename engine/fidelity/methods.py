"""The methods that are compared unless told otherwise."""

from __future__ import annotations

from gradsift.engine.fidelity.baselines import BASELINES
from gradsift.engine.fidelity.bench import LABELS, Bench
from gradsift.engine.fidelity.candidates import Candidate, alone, exact, exact_fisher, sketched

__all__ = ["standard"]

_SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_DIMS = (1024, 4096, 8192)
_MODELS = 3


def standard(bench: Bench) -> list[Candidate]:
    """All that may fit a case; what does not is named when it is tried."""
    dot = exact("dot")
    found = [*BASELINES, dot, exact("cosine")]
    found += [exact_fisher(k) for k in _SWEEP]
    found += [exact_fisher(1.0, labels) for labels in (1, 2, 4) if labels < LABELS]
    found.append(exact_fisher(1.0, models=_MODELS))
    for dim in _DIMS:
        found += [sketched("dot", dim, truth=dot), sketched("fisher", dim, 1.0, truth=exact_fisher(1.0))]
    found += [sketched("fisher", dim, 0.3, truth=exact_fisher(0.3)) for dim in _DIMS]
    found += [sketched("trak", 4096), sketched("datainf", 1024, grouped=True)]
    if bench.case.checkpoints is not None:
        found += [sketched("dot", 4096, along="plain"), sketched("less", 4096, along="adam")]
    if hasattr(bench.case.loss, "parts"):
        found += [sketched("dmin", 4096)]
    if bench.case.wrong is not None:
        found += [alone("self"), alone("self_fisher")]
    return found
