"""A vector as a mixture of a few rows: weights on the simplex, and how good the mixture is.

Source: arXiv 2601.03786 and loris3/ceelm for ``paper``; Wolfe 1976, "Finding the nearest point in a polytope", for
``exact``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from gradsift.kernels.errors import ShapeError, SpecError

__all__ = ["Rebuilt", "nearest_mixture", "project_to_simplex", "rebuild"]

_ROUNDING = 1e-12
"""Relative size below which a step or a weight is rounding."""


class Rebuilt(NamedTuple):
    """A query's gradient rebuilt from rows.

    Attributes:
        weights: float64 (k,), none negative, sum 1.
        quality: ``10 log10(var(g) / (var(g - A'w) + 1e-8 var(g)))`` in dB, variances over coordinates: above 0 is
            better than the zero vector, 80 is exact. The 1e-8 is relative here, so that units of gradients do not
            matter; in the paper it is not.
        error: squared distance ``|g - A'w|^2``.
    """

    weights: np.ndarray
    quality: float
    error: float


def rebuild(rows: np.ndarray, query: np.ndarray, simplex: Literal["exact", "paper"] = "exact") -> Rebuilt:
    """Mix rows to come near to a query's gradient.

    Args:
        rows: A, float64 (k, d). query: g, float64 (d,).
        simplex: "exact" is least squares on the simplex; "paper" projects ``pinv(A') g`` on it, which is another
            point and never nearer.
    """
    if simplex not in ("exact", "paper"):
        raise SpecError(f"simplex is {simplex!r}, expected 'exact' or 'paper'")
    if rows.ndim != 2 or not len(rows) or query.shape != rows.shape[1:]:
        raise ShapeError(f"rows {rows.shape} and query {query.shape} do not fit, expected (k, d) and (d,)")
    if simplex == "paper":
        weights = project_to_simplex(np.linalg.lstsq(rows.T, query, rcond=None)[0])
    else:
        weights = nearest_mixture(rows, query)
    left = query - weights @ rows
    spread = query.var()
    quality = 10 * np.log10(spread / (left.var() + 1e-8 * spread)) if spread > 0 else 0.0
    return Rebuilt(weights, float(quality), float(left @ left))


def project_to_simplex(values: np.ndarray) -> np.ndarray:
    """The nearest point of the unit simplex, by sorting (Held, Wolfe and Crowder 1974)."""
    descending = np.sort(values)[::-1]
    above = (np.cumsum(descending) - 1) / np.arange(1, len(values) + 1)
    last = int(np.flatnonzero(descending > above)[-1])
    return np.asarray(np.maximum(values - above[last], 0.0))


def nearest_mixture(rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Weights of the nearest point to the query in the hull of the rows, exact up to rounding."""
    points = rows - query
    gram = points @ points.T
    gram /= float(np.diag(gram).max()) or 1.0
    support = [int(np.argmin(np.diag(gram)))]
    weights = np.ones(1)
    for _ in range(10 * len(rows) + 10):
        slopes = gram[:, support] @ weights
        best = int(np.argmin(slopes))
        if best in support or slopes[best] >= slopes[support] @ weights - _ROUNDING:
            break
        support, weights = _settled(gram, [*support, best], np.append(weights, 0.0))
    out = np.zeros(len(rows))
    out[support] = weights
    return np.asarray(out / out.sum())


def _settled(gram: np.ndarray, support: list[int], weights: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The best affine mixture of the support that is a convex one, dropping points on the way."""
    while True:
        k = len(support)
        system = np.ones((k + 1, k + 1))
        system[:k, :k], system[k, k] = gram[np.ix_(support, support)], 0.0
        aim = np.linalg.lstsq(system, np.append(np.zeros(k), 1.0), rcond=None)[0][:k]
        if (aim > _ROUNDING).all():
            return support, aim
        out = aim <= _ROUNDING
        step = float(np.min(weights[out] / np.maximum(weights[out] - aim[out], _ROUNDING)))
        weights = np.maximum((1 - step) * weights + step * aim, 0.0)
        weights[int(np.flatnonzero(out)[np.argmin(weights[out])])] = 0.0
        stay = weights > _ROUNDING
        support, weights = [place for place, keep in zip(support, stay, strict=True) if keep], weights[stay]
