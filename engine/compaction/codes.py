"""Codes: a row of numbers as a few bits each and one scale.

A row y of k numbers becomes u in {0 .. 2^b - 1}^k and one float32 scale s, and reads y ~ s v, v = u - (2^b - 1) / 2.
The levels are those of the best uniform quantiser of a normal variable, which is what a number of a row is like after a
random rotation; s = |y|^2 / <v, y>, so that products with s v are unbiased over rotations. Codes are packed
little end first: number j of a row lies in bits j b .. j b + b - 1.

As a sum over bits t of weight 2^t, v = sum_t 2^(t-1) (+-1): codes of b bits are codes of one bit, b times as many, for
directions that repeat their numbers with weights 2^(t-1). So one search serves all of them.

Sources: Max 1960, Quantizing for minimum distortion; Gao & Long 2024, RaBitQ, arXiv 2405.12497.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["BITS", "code_bytes", "decode", "encode", "expand", "signs"]

_STEPS = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Distance between levels over the standard deviation of what is coded."""

BITS = tuple(_STEPS)
"""Bits per number that there are codes of."""


def code_bytes(axes: int, bits: int) -> int:
    """Bytes of the codes of a row of ``axes`` numbers, a multiple of ``8 / bits``."""
    return axes * bits // 8


def encode(rows: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Code rows.

    Args:
        rows: finite, shape (m, k), k a multiple of ``8 / bits``.

    Returns:
        uint8 (m, k bits / 8), and float32 scales (m,), 0 for rows of length 0.
    """
    y = rows.to(torch.float64)
    levels = 1 << bits
    deviation = torch.linalg.vector_norm(y, dim=1, keepdim=True) / y.shape[1] ** 0.5
    step = torch.where(deviation > 0, _STEPS[bits] * deviation, 1.0)
    codes = (torch.floor(y / step) + levels // 2).clamp_(0, levels - 1)
    inner = ((codes - (levels - 1) / 2) * y).sum(dim=1)
    scale = torch.where(inner > 0, y.square().sum(dim=1) / inner, 0.0)
    together = codes.to(torch.uint8).numpy().reshape(len(y), -1, 8 // bits)
    packed = np.zeros(together.shape[:2], dtype=np.uint8)
    for place in range(8 // bits):
        packed |= together[:, :, place] << np.uint8(bits * place)
    return packed, scale.to(torch.float32).numpy()


def decode(codes: np.ndarray, scale: np.ndarray, bits: int) -> Tensor:
    """What the codes stand for, float32 (m, k)."""
    values = _table(bits)[codes].reshape(len(codes), -1)
    values *= scale[:, None]
    return torch.from_numpy(values)


@cache
def _table(bits: int) -> np.ndarray:
    """The numbers that each byte holds, float32 (256, 8 / bits)."""
    shifts = bits * np.arange(8 // bits)
    return (((np.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)) - ((1 << bits) - 1) / 2).astype(np.float32)


def signs(codes: np.ndarray) -> np.ndarray:
    """The bits of codes as +1 and -1, float32 (m, 8 bytes)."""
    out = np.unpackbits(codes, axis=1, bitorder="little").astype(np.float32)
    out *= 2
    out -= 1
    return out


def expand(directions: np.ndarray, bits: int) -> np.ndarray:
    """Directions whose products with ``signs`` of codes are those of the directions with what these stand for.

    Args:
        directions: shape (q, k).

    Returns:
        of the same dtype, shape (q, k bits), for scales of 1.
    """
    weights = (2.0 ** (np.arange(bits) - 1)).astype(directions.dtype)
    return np.asarray((directions[:, :, None] * weights).reshape(len(directions), -1))
