"""The methods that are compared unless told otherwise."""

from __future__ import annotations

from gradsift.engine.fidelity.baselines import BASELINES
from gradsift.engine.fidelity.bench import LABELS, Bench
from gradsift.engine.fidelity.candidates import Candidate, exact, exact_fisher, sketched

__all__ = ["standard"]

_SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_DIMS = (1024, 4096, 8192)


def standard(bench: Bench) -> list[Candidate]:
    """All that fits a case, those that keep whole gradients where these are few enough."""
    dot, default = exact("dot"), exact_fisher(1.0)
    found = [*BASELINES, dot, exact("cosine")]
    found += [exact_fisher(k) for k in _SWEEP]
    found += [exact_fisher(1.0, labels) for labels in (1, 2, 4) if labels < LABELS]
    for dim in _DIMS:
        found += [sketched("dot", dim, truth=dot), sketched("fisher", dim, 1.0, truth=default)]
    found += [sketched("fisher", dim, 0.3, truth=exact_fisher(0.3)) for dim in _DIMS]
    return found
