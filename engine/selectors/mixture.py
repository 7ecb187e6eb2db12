"""The mixture of domains that helps all tasks most, from the group influence of each domain on each task.

``max_w  a mean(s) - b std(s) + c H(w) / ln K`` over the simplex, ``s = M w`` with the rows of M scaled to unit standard
deviation, subject to ``s >= M w0``: no task may fare worse than under the present mixture.

Source: TiKMiX-D, arXiv 2508.17677; the exact terms and their weights are our reading.
"""

from __future__ import annotations

import logging

import numpy as np

from gradsift.engine.extras import require
from gradsift.kernels.errors import ShapeError

__all__ = ["best_mixture"]

logger = logging.getLogger(__name__)

_SMOOTH = 1e-12
"""Added under the root of a variance, whose slope has no limit at 0."""


def best_mixture(
    influence: np.ndarray,
    now: np.ndarray,
    *,
    benefit: float = 1.0,
    evenness: float = 1.0,
    diversity: float = 1.0,
    no_loss: bool = True,
) -> np.ndarray:
    """Weights of the domains, by sequential quadratic programming (the problem is concave) in float64.

    Args:
        influence: M, float64 (tasks, domains): what a unit of each domain does for each task.
        now: w0, float64 (domains,), the present weights; they are where the search starts.
        benefit, evenness, diversity: a, b, c.
        no_loss: whether ``s >= M w0`` binds.

    Returns:
        float64 (domains,), none negative, sum 1.

    Raises:
        ShapeError: there are fewer than two domains, or weights that are none.
    """
    tasks, domains = influence.shape
    if domains < 2:
        raise ShapeError("there is one domain, which has nothing to be mixed with: give labels of two or more")
    if now.shape != (domains,) or (now < 0).any() or not now.sum() > 0:
        raise ShapeError(f"the present mixture has shape {now.shape}, expected {(domains,)} weights, none negative")
    now = now / now.sum()
    spread = influence.std(axis=1, keepdims=True)
    matrix = np.divide(influence, spread, out=np.zeros_like(influence), where=spread > 0)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        s = matrix @ w
        deviation = s - s.mean()
        std = np.sqrt(deviation @ deviation / tasks + _SMOOTH)
        safe = np.maximum(w, 1e-300)
        entropy = -(w * np.log(safe)).sum() / np.log(domains)
        value = benefit * s.mean() - evenness * std + diversity * entropy
        slope = benefit * matrix.mean(axis=0) - evenness * matrix.T @ deviation / (tasks * std)
        slope -= diversity * (np.log(np.maximum(w, 1e-12)) + 1) / np.log(domains)
        return -float(value), -slope

    constraints = [{"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(domains)}]
    if no_loss:
        floor = matrix @ now
        constraints.append({"type": "ineq", "fun": lambda w: matrix @ w - floor, "jac": lambda w: matrix})
    found = require("scipy.optimize").minimize(
        loss,
        now,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * domains,
        constraints=constraints,
        options={"maxiter": 1000, "ftol": 1e-12},
    )
    weights = np.clip(found.x, 0.0, 1.0)
    weights = weights / weights.sum()
    if loss(weights)[0] > loss(now)[0]:
        logger.warning("no mixture better than the present one was found (%s), which is kept", found.message)
        return now
    return np.asarray(weights)
