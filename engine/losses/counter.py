"""Random numbers that depend on a seed and a counter and on nothing else: no generator has a state."""

from __future__ import annotations

import numpy as np

__all__ = ["counter_uniform"]


def counter_uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One uniform number in [0, 1) for each (seed, counter), by a 64-bit mix of both and nothing else.

    Args:
        seeds: integers, taken modulo 2**64.
        counters: non-negative integers, of a shape that broadcasts with ``seeds``.

    Returns:
        float64, 53 random bits each.

    Source: Steele et al. 2014 (SplitMix64).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    bits = _mix64(_mix64(seeds.astype(np.uint64)) + counters.astype(np.uint64) * golden)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def _mix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
