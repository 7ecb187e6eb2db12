"""Shares turned into whole numbers of rows."""

from __future__ import annotations

import numpy as np

__all__ = ["quotas"]


def quotas(shares: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """How many rows of each group, by largest remainders; what a group lacks goes to the others in their shares.

    Args:
        shares: float64 (K,), none negative. sizes: int64 (K,), rows that each group has.
        total: rows in all; fewer are given where the groups with a share have fewer.

    Returns:
        int64 (K,).
    """
    given = np.zeros(len(shares), dtype=np.int64)
    while (left := total - int(given.sum())) > 0:
        open_ = np.where(given < sizes, shares, 0.0)
        if not open_.sum() > 0:
            break
        ideal = np.minimum(open_ / open_.sum() * left, sizes - given)
        whole = np.floor(ideal + 1e-9).astype(np.int64)
        rest = min(left, int(np.floor(ideal.sum() + 1e-9))) - int(whole.sum())
        order = np.argsort(-np.where(whole < sizes - given, ideal - whole, -1.0), kind="stable")
        whole[order[:rest]] += 1
        if not whole.any():
            whole[order[0]] = 1
        given += whole
    return given
