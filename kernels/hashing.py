"""Buckets and signs of the row-segment sketch: one law, used by every backend.

A parameter of shape (p, q) has a thin side (rows) and a long side (columns); p == q takes rows as they are.
Each row is cut into segments of 64 columns. With k0..k3 the 32-bit little-endian words of the parameter's
key and ``mix`` a 32-bit finaliser,

    t      = mix(k0 + row * segments_per_row + segment)          mod 2**32
    h      = mix(t ^ k1)
    block  = high 32 bits of h * (dim / 64)
    mask   = h & 63
    bucket = 64 * block + (lane ^ mask)
    sign   = -1 where bit `lane` of the word mix(t ^ k2) | mix(t ^ k3) << 32 is set

The signs of a projection (``project``) are drawn in the same way, under keys of their own.

Source: Charikar et al. 2002 (CountSketch); the finaliser is Wellons' `lowbias32`.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from gradsift.kernels.spec import SEGMENT, SketchSpec

__all__ = [
    "Segments",
    "buckets_and_signs",
    "expand_signs",
    "matrix_shape",
    "parameter_key",
    "segment_hashes",
    "sign_words",
]

_MASK32 = 0xFFFFFFFF


class Segments(NamedTuple):
    """Hashes of a parameter's row segments, each int64 of shape (rows, segments_per_row)."""

    block: Tensor
    mask: Tensor
    sign_low: Tensor
    sign_high: Tensor


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter as a matrix: (o, c, k, k) is (o, c*k*k), and (d,) is (1, d)."""
    if len(shape) == 1:
        return 1, shape[0]
    return shape[0], prod(shape[1:])


@lru_cache(maxsize=65536)
def parameter_key(seed: int, name: str, person: bytes = b"gradsift.sketch1") -> tuple[int, int, int, int]:
    """The four 32-bit words k0..k3 of one parameter: keyed blake2b of its name.

    Args:
        person: what the key is for, at most 16 bytes.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=16, key=seed.to_bytes(8, "little"), person=person).digest()
    k0, k1, k2, k3 = (int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4))
    return k0, k1, k2, k3


def _mix(x: Tensor) -> Tensor:
    """32-bit finaliser on int64 tensors that hold values in [0, 2**32)."""
    x = x ^ (x >> 16)
    x = _multiply(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply(x, 0x846CA68B)
    return x ^ (x >> 16)


def _multiply(x: Tensor, constant: int) -> Tensor:
    """x * constant mod 2**32 without overflowing int64."""
    low = (x & 0xFFFF) * constant
    high = ((x >> 16) * constant) & 0xFFFF
    return (low + (high << 16)) & _MASK32


def segment_hashes(spec: SketchSpec, name: str, rows: int, long: int) -> Segments:
    """Block, lane mask and sign words of every row segment of one parameter (on the CPU)."""
    key = parameter_key(spec.seed, name)
    h = _mix(_positions(key, rows, long) ^ key[1])
    return Segments((h * (spec.dim // SEGMENT)) >> 32, h & (SEGMENT - 1), *sign_words(key, rows, long))


def sign_words(key: tuple[int, int, int, int], rows: int, long: int) -> tuple[Tensor, Tensor]:
    """Low and high halves of the sign words of every row segment, as of ``Segments``."""
    t = _positions(key, rows, long)
    return _mix(t ^ key[2]), _mix(t ^ key[3])


def expand_signs(low: Tensor, high: Tensor, long: int) -> Tensor:
    """Sign words -> int64 of shape (rows, long), each 1 or -1."""
    lane = torch.arange(SEGMENT, device=low.device)
    word = torch.where(lane < 32, low[..., None], high[..., None])
    minus = (word >> (lane % 32)) & 1
    return (1 - 2 * minus).view(len(low), -1)[:, :long]


def _positions(key: tuple[int, int, int, int], rows: int, long: int) -> Tensor:
    """The t of every row segment, (rows, segments_per_row)."""
    per_row = -(-long // SEGMENT)
    index = torch.arange(rows * per_row, dtype=torch.int64).view(rows, per_row)
    return _mix((index + key[0]) & _MASK32)


@lru_cache(maxsize=4096)
def buckets_and_signs(spec: SketchSpec, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where each entry of a parameter goes.

    Returns:
        bucket, int64 of shape (p * q,) in row-major order of the parameter (the CPU adds by int32 indices
        twelve times slower); sign, float32 of that shape. Both on the CPU and shared: never written to.
    """
    p, q = matrix_shape(shape)
    rows, long = min(p, q), max(p, q)
    hashes = segment_hashes(spec, name, rows, long)
    bucket = hashes.block[..., None] * SEGMENT + (torch.arange(SEGMENT) ^ hashes.mask[..., None])
    bucket = bucket.view(rows, -1)[:, :long]
    sign = expand_signs(hashes.sign_low, hashes.sign_high, long)
    if p > q:
        bucket, sign = bucket.t(), sign.t()
    return bucket.reshape(-1), sign.reshape(-1).to(torch.float32)
