"""The exact scan with weights of rows or of their parts: float32 products that are wrong still find the best rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stores import MemoryStore, dense_order, random_rows
from torch import Tensor

from gradsift.engine.answers.scan import scan

ROWS, PARTS = 120, 3


def cancelling(n: int, seed: int) -> Tensor:
    """Rows (n, 64) whose product with a row of ones is small beside the float32 rounding of its terms."""
    large = 1e4 * random_rows(n, 31, seed)
    return torch.cat([large, -large.flip(1), random_rows(n, 2, seed + 1) / 64], dim=1)


@pytest.mark.parametrize("block", [1, 7, ROWS])
@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_weights_keep_the_search_exact(block: int, parts: int, each: bool, known: bool, together: bool) -> None:
    rows = cancelling(ROWS * parts, 0).view(ROWS, parts, 64)
    rows = rows if parts > 1 else rows[:, 0]
    directions = torch.ones(2, *rows.shape[1:], dtype=torch.float64)
    directions[1] *= 3
    drawn = np.random.default_rng(0)
    shape = (ROWS, parts) if each and parts > 1 else (ROWS,)
    weights = drawn.choice([-1.0, 1.0], shape) * 10.0 ** drawn.uniform(-2, 2, shape)
    weights[::9] = 0
    wide = weights.reshape(*shape, *[1] * (rows.ndim - len(shape)))
    expected = torch.einsum("q...,n...->qn", directions, rows.double() * torch.from_numpy(wide)).numpy()
    fast = torch.einsum("q...,n...->qn", directions.float(), rows * torch.from_numpy(wide).float()).numpy()
    assert (dense_order(fast, 8) != dense_order(expected, 8)).any()
    expected = expected.max(axis=0, keepdims=True) if together else expected
    norms = rows.norm(dim=-1).numpy() if known else np.full(rows.shape[:-1], np.nan, np.float32)
    best = scan(
        MemoryStore(rows, block), directions, 8, norms=norms, weights=weights, together=together, memory=1 << 20
    )
    np.testing.assert_array_equal(best.rows, dense_order(expected, 8))
    np.testing.assert_allclose(best.scores, np.take_along_axis(expected, best.rows, 1), rtol=1e-7, atol=1e-9)
