"""Random numbers that depend on a key and a counter and on nothing else: no generator has a state."""

from __future__ import annotations

import hashlib

import numpy as np

__all__ = ["counter_key", "counter_normal", "counter_uniform"]


def counter_key(*parts: int | str) -> int:
    """A key in [0, 2**63) from integers and text: blake2b of their types and values."""
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"gradsift.counter")
    return int.from_bytes(digest.digest(), "little") >> 1


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


def counter_normal(keys: np.ndarray, numbers: int) -> np.ndarray:
    """Independent standard normal numbers, the same first ones for any ``numbers`` that is asked for.

    Args:
        keys: integers of shape (rows,), taken modulo 2**64.
        numbers: how many per key.

    Returns:
        float64, shape (rows, numbers).

    Source: Box & Muller 1958: numbers 2j and 2j + 1 come from the uniform numbers 2j and 2j + 1 of their key.
    """
    pairs = -(-numbers // 2)
    uniform = counter_uniform(keys[:, None], np.arange(2 * pairs)[None]).reshape(len(keys), pairs, 2)
    radius = np.sqrt(-2.0 * np.log1p(-uniform[..., 0]))
    angle = 2.0 * np.pi * uniform[..., 1]
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return normal.reshape(len(keys), 2 * pairs)[:, :numbers]


def _mix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))
