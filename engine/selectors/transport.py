"""Entropic optimal transport between uniform weights, by POT's Sinkhorn in the log domain in float64."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np

from gradsift.engine.extras import require

__all__ = ["BLUR", "Transport", "transport"]

logger = logging.getLogger(__name__)

BLUR = 0.01
"""The entropic scale, in units of the cost, as in TAROT's code."""

_SCALING = 0.5
"""What the scale is multiplied by at each step from the largest cost down to ``BLUR``."""

_ON_THE_WAY, _AT_LAST = 100, 2_000
"""Iterations at each coarser scale, whose potentials only start the next, and at the last."""

_MARGIN = 1e-3
"""Error of the marginals, relative to them, at which the plan counts as found: potentials are then within 1e-5."""


class Transport(NamedTuple):
    """A plan's value and its dual potentials.

    Attributes:
        distance: ``<P, cost> + blur KL(P | a b')``, which is ``mean(f) + mean(g)``.
        f: float64 (m,), potential of each source: what moving a little more mass from it would cost.
        g: float64 (q,), of each sink. A constant can go from one to the other; both means are half the distance.
    """

    distance: float
    f: np.ndarray
    g: np.ndarray


def transport(cost: np.ndarray) -> Transport:
    """Move a uniform distribution over m sources to one over q sinks.

    Args:
        cost: float64 (m, q), not negative.

    Cost: O(m q) memory and per iteration. Source: Cuturi 2013; Feydy et al. 2019 for the descending scales.
    """
    ot = require("ot")
    m, q = cost.shape
    a, b = np.full(m, 1 / m), np.full(q, 1 / q)
    scale, start = max(float(cost.max()), BLUR), None
    while True:
        last = scale <= BLUR
        _, log = ot.bregman.sinkhorn_log(
            a,
            b,
            cost,
            max(scale, BLUR),
            numItermax=_AT_LAST if last else _ON_THE_WAY,
            stopThr=_MARGIN / q**0.5,
            log=True,
            warn=False,
            warmstart=start,
        )
        if last:
            break
        # Potentials are in units of the scale: the next one is finer.
        finer = max(scale * _SCALING, BLUR)
        start = (log["log_u"] * (scale / finer), log["log_v"] * (scale / finer))
        scale = finer
    error = float(log["err"][-1]) * q**0.5
    if error > 30 * _MARGIN:
        logger.warning("the transport between %d rows and %d targets is off by %.1e of its mass", m, q, error)
    f, g = BLUR * (log["log_u"] - np.log(a)), BLUR * (log["log_v"] - np.log(b))
    distance = float(f.mean() + g.mean())
    return Transport(distance, f - f.mean() + distance / 2, g - g.mean() + distance / 2)
