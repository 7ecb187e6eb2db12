"""Intervals by resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap", "interval"]

_DRAWS = 1000


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


def interval(value: float, draws: np.ndarray, least: float = -np.inf, most: float = np.inf) -> Interval:
    """A figure plus and minus 1.96 standard errors, these from resamples; NaN where no resample is defined.

    Not their percentiles: what is drawn twice counts as one, so resampled correlations lie a little lower.

    Args:
        least, most: what the figure can be.
    """
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return Interval(float("nan"), float("nan"))
    half = 1.96 * float(defined.std())
    return Interval(max(value - half, least), min(value + half, most))


def bootstrap(count: int, figure: Callable[[np.ndarray], float], seed: int = 0, draws: int = _DRAWS) -> np.ndarray:
    """A figure over resamples of ``count`` things, drawn with replacement: (draws,).

    Args:
        figure: gets the drawn positions, int64 (count,).
    """
    rng = np.random.default_rng(seed)
    return np.array([figure(rng.integers(count, size=count)) for _ in range(draws)])
