"""float16 rows with a scale each: rows of norm 1e-5 would lose a sixth of their entries to zero without one."""

from __future__ import annotations

import numpy as np

__all__ = ["from_half", "to_half"]

_TOP = 15
"""Scaled rows have their largest entry in [2**14, 2**15), a factor of two below float16's limit."""

_SMALLEST = -126
"""Exponent of the smallest normal float32: a smaller scale could be flushed to zero."""


def to_half(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale by powers of two, which costs no precision, then round.

    Args:
        rows: float32, shape (..., dim), finite.

    Returns:
        float16 of the same shape, and float32 scales of shape (...): ``rows ~ half * scale``, each entry to 2**-11
        of itself or 2**-39 of the row's largest.
    """
    largest = np.abs(rows).max(axis=-1, initial=0.0)
    exponent = np.maximum(np.frexp(largest)[1] - _TOP, _SMALLEST)
    scale = np.where(largest > 0, np.ldexp(np.float32(1), exponent), np.float32(1)).astype(np.float32)
    return (rows / scale[..., None]).astype(np.float16), scale


def from_half(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 rows of the same shape."""
    out = rows.astype(np.float32)
    out *= scale[..., None]
    return out
