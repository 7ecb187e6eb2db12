"""The second moment of a store's rows, in one streamed pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError

__all__ = ["second_moment"]


def second_moment(blocks: Iterable[Tensor], prepare: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, int]:
    """Sum of the outer products of rows with themselves, not divided by their number.

    Products of a block are float32, their sum over blocks is float64; float64 blocks are multiplied in float64.

    Args:
        blocks: (rows, d) each, such as ``block for _, block in store.blocks()``.
        prepare: what is done to a block first, such as scaling its rows.

    Returns:
        (d, d) float64, and the number of rows.

    Raises:
        ShapeError: there is no row, or blocks are no matrices.
    """
    total: Tensor | None = None
    count = 0
    for block in blocks:
        rows = block if prepare is None else prepare(block)
        if rows.ndim != 2:
            raise ShapeError(f"a block of rows has shape {tuple(rows.shape)}, expected (rows, dim)")
        if total is None:
            total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        total += rows.T @ rows
        count += len(rows)
    if total is None or not count:
        raise ShapeError("there is no row to take a moment of: extract something first")
    return total, count
