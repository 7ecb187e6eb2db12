"""The damped Fisher: primal and dual, its damping, and an identity that only the right solver and sign satisfy."""

from __future__ import annotations

import pytest
import torch
from stores import MemoryStore, random_rows

import gradsift as gs
from gradsift.engine.curvature.fisher import Fisher


@pytest.mark.parametrize(("n", "dim"), [(30, 64), (200, 64), (64, 64), (1, 64)])
def test_equals_the_dense_solve(n: int, dim: int) -> None:
    rows, queries = random_rows(n, dim), random_rows(3, dim, seed=1).double()
    fisher = Fisher(rows, damping=0.7)
    r = rows.double()
    assert fisher.damping == pytest.approx(0.7 * float(r.square().sum()) / n / n, rel=1e-12)
    dense = r.T @ r / n + fisher.damping * torch.eye(dim, dtype=torch.float64)
    torch.testing.assert_close(fisher.solve(queries), torch.linalg.solve(dense, queries.T).T, rtol=1e-9, atol=1e-10)
    gram = r @ r.T / n + fisher.damping * torch.eye(n, dtype=torch.float64)
    b = torch.linspace(-1, 1, n, dtype=torch.float64) + 2
    torch.testing.assert_close(fisher.solve_dual(b), torch.linalg.solve(gram, b), rtol=1e-9, atol=1e-10)


def test_several_draws_per_example_do_not_lower_the_damping() -> None:
    rows = random_rows(40)
    once, twice = Fisher(rows, examples=40), Fisher(torch.cat([rows, rows]), examples=40)
    assert twice.damping == pytest.approx(once.damping, rel=1e-12)
    torch.testing.assert_close(twice.solve(rows[:2]), once.solve(rows[:2]), rtol=1e-9, atol=1e-12)


def test_a_sample_of_a_large_store_is_damped_by_the_sample() -> None:
    rows = random_rows(40)
    assert Fisher(rows, examples=10**6).damping == Fisher(rows).damping


def test_strong_damping_ranks_like_dot() -> None:
    queries = random_rows(2, seed=1)
    store = MemoryStore(random_rows(60), curvature=random_rows(20, seed=2))
    dot = gs.topk(store, queries, 60, "dot")
    damped = gs.topk(store, queries, 60, Fisher(store.curvature, damping=1e9))
    assert (dot.rows == damped.rows).all()


def test_ridge_regression_leave_one_out() -> None:
    """Removing i changes the loss at x by -(y - f(x)) times the change of f(x), known in closed form for ridge.

    With A = X'X + a I, residuals r and leverage h, f(x) changes by exactly -x' A^-1 x_i r_i / (1 - h_i). Gradients of
    half squared errors are g_i = -r_i x_i; those of labels sampled from the model (prediction + unit noise e) are
    -e x_i, whose Fisher is X'X / n. So the score <g, (F + lambda I)^-1 g_i> / n, over 1 - h_i, is the rise of the
    query's loss to first order when i is left out: positive means that i helped. The test solves the ridge anew.
    """
    torch.manual_seed(0)
    n, dim = 40, 64
    x = torch.randn(n, dim, dtype=torch.float64)
    y = x @ torch.randn(dim, dtype=torch.float64) + torch.randn(n, dtype=torch.float64)
    point, target = torch.randn(dim, dtype=torch.float64), 1.5
    fisher = Fisher(x.float(), damping=1.0)
    a = n * fisher.damping
    gram = x.float().double().T @ x.float().double() + a * torch.eye(dim, dtype=torch.float64)
    x = x.float().double()
    weights = torch.linalg.solve(gram, x.T @ y)
    residual = y - x @ weights
    leverage = (x * torch.linalg.solve(gram, x.T).T).sum(dim=1)
    query = -(target - point @ weights) * point
    rows = -residual[:, None] * x
    scores = fisher.solve(query[None])[0] @ rows.T / n
    for i in range(n):
        keep = torch.arange(n) != i
        without = torch.linalg.solve(gram - torch.outer(x[i], x[i]), x[keep].T @ y[keep])
        change = point @ without - point @ weights
        rise = -(target - point @ weights) * change
        assert scores[i] / (1 - leverage[i]) == pytest.approx(float(rise), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "damping", "text"),
    [
        (torch.zeros(0, 64), 1.0, r"shape \(0, 64\)"),
        (torch.randn(64), 1.0, r"shape \(64,\)"),
        (torch.zeros(3, 64), 1.0, "mean squared norm of the curvature rows is 0"),
        (torch.full((3, 64), torch.nan), 1.0, "is nan"),
        (torch.ones(3, 64), 0.0, "damping is 0"),
    ],
)
def test_refusals(rows: torch.Tensor, damping: float, text: str) -> None:
    with pytest.raises(gs.ShapeError, match=text):
        Fisher(rows, damping)


def test_a_fisher_of_another_dim_is_refused() -> None:
    with pytest.raises(gs.SpecError, match="Fisher has dim 128"):
        gs.topk(MemoryStore(random_rows(5)), random_rows(1), 2, Fisher(random_rows(4, 128)))
