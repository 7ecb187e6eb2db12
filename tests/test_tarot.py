"""TAROT: the metric, the transport, the layers and the number of rows, each against a dense computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import pytest
import torch
from stores import MemoryStore, random_rows
from torch import Tensor

import gradsift as gs
from gradsift.engine.selectors.neighbours import Neighbours
from gradsift.engine.selectors.transport import BLUR, transport
from gradsift.engine.selectors.whitening import Whitening

ROWS, DIM = 60, 12
SKEW = torch.logspace(0, 1.5, DIM)


def rows() -> Tensor:
    return random_rows(ROWS, DIM) * SKEW + 1


def targets(count: int = 3) -> Tensor:
    return random_rows(count, DIM, 1) * SKEW + 1


def dense(rows: Tensor, targets: Tensor, damping: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosines (q, n) and distances after whitening, by an inverse root of the pooled covariance."""
    pool = torch.cat([rows, targets]).double().numpy()
    centred = pool - pool.mean(axis=0)
    sigma = centred.T @ centred / len(pool)
    sigma += damping * np.trace(sigma) / len(pool) * np.eye(DIM)
    values, vectors = np.linalg.eigh(sigma)
    white = centred @ vectors / np.sqrt(values)
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    cosine = white[len(rows) :] @ white[: len(rows)].T
    return cosine, np.sqrt(np.clip(2 - 2 * cosine, 0, 4))


def layers(cosine: np.ndarray, distance: np.ndarray, budget: int) -> list[int]:
    """The rows of the first layers that fit, then those of the layer that overflows, by potential."""
    order = np.stack([np.lexsort((np.arange(len(c)), -c)) for c in cosine])
    taken: set[int] = set()
    for depth in range(order.shape[1]):
        fresh = sorted(set(order[:, depth].tolist()) - taken)
        if len(taken) + len(fresh) > budget:
            pool = np.array([*sorted(taken), *fresh])
            f = dict(zip(pool.tolist(), transport(distance[:, pool].T).f, strict=True))
            return sorted([*taken, *sorted(fresh, key=lambda row: (-round(f[row], 9), row))[: budget - len(taken)]])
        taken |= set(fresh)
    return sorted(taken)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("budget", [1, 2, 3, 10, 40, 60])
def test_layers_equal_a_brute_force(block: int, budget: int) -> None:
    cosine, distance = dense(rows(), targets())
    chosen = gs.select(MemoryStore(rows(), block), targets(), budget, "tarot")
    assert sorted(chosen.rows.tolist()) == layers(cosine, distance, budget)
    assert chosen.weights is not None
    assert len(chosen.weights) == budget
    np.testing.assert_allclose(chosen.scores[: min(budget, 2)].max(), cosine[:, chosen.rows].max(), atol=1e-6)
    if budget >= 3:
        assert set(cosine.argmax(axis=1).tolist()) <= set(chosen.rows.tolist())


def test_deeper_lists_than_were_kept_are_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gs.select(MemoryStore(rows()), targets(1), 50, "tarot").rows
    monkeypatch.setattr("gradsift.engine.selectors.neighbours._DEPTH", 2)
    np.testing.assert_array_equal(gs.select(MemoryStore(rows()), targets(1), 50, "tarot").rows, whole)


def test_reasons_name_the_neighbour() -> None:
    cosine, _ = dense(rows(), targets())
    chosen = gs.select(MemoryStore(rows()), targets(), 3, "tarot")
    first = int(cosine.max(axis=1).argmax())
    assert chosen.reasons is not None
    assert chosen.reasons[0] == f"neighbour 1 of target {first}"
    named = gs.select(MemoryStore(rows()), targets(), 3, "tarot", tasks=["x", "y", "x"])
    assert named.reasons == [f"{reason}, task {'xyx'[int(reason[-1])]!r}" for reason in chosen.reasons]


def test_whitened_rows_have_unit_covariance_and_mahalanobis_products() -> None:
    keep, asked = np.ones(ROWS, dtype=bool), targets()[:, None].double()
    white = Whitening(MemoryStore(rows(), 7), asked, keep, 1e-12)
    pool = torch.cat([rows().double()[:, None], asked])
    factor, mean = white.factors[0], white.mean[0]
    raw = torch.linalg.solve_triangular(factor, (pool[:, 0] - mean).T, upper=False).T
    torch.testing.assert_close(raw.T @ raw / len(raw), torch.eye(DIM, dtype=torch.float64), atol=1e-5, rtol=0)
    unit = white(pool)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(pool), dtype=torch.float64))
    sigma = factor @ factor.T
    a, b = pool[0, 0] - mean, pool[1, 0] - mean
    product = a @ torch.linalg.solve(sigma, b)
    length = (a @ torch.linalg.solve(sigma, a)).sqrt() * (b @ torch.linalg.solve(sigma, b)).sqrt()
    assert float(unit[0] @ unit[1]) == pytest.approx(float(product / length), rel=1e-9)


def test_distances_are_between_0_and_2() -> None:
    keep, asked = np.ones(ROWS, dtype=bool), rows()[:4, None].double()
    store = MemoryStore(rows())
    white = Whitening(store, asked, keep, 1.0)
    found = Neighbours(store, keep, white, white(asked)).distances(np.arange(ROWS))
    assert found.min() >= 0
    assert found.max() <= 2
    np.testing.assert_allclose(np.diag(found[:4]), 0, atol=2e-6)


def test_several_checkpoints_have_a_metric_each() -> None:
    """Twice the same checkpoint is one, whatever the scale of the second."""
    parts = [{"checkpoint": "a"}, {"checkpoint": "b"}]
    two = torch.stack([rows(), 30 * rows()], dim=1)
    once = gs.select(MemoryStore(rows()), targets(), 10, "tarot")
    twice = gs.select(MemoryStore(two, parts=parts), torch.stack([targets(), 30 * targets()], dim=1), 10, "tarot")
    np.testing.assert_array_equal(twice.rows, once.rows)
    np.testing.assert_allclose(twice.scores, once.scores, atol=1e-6)


def test_groups_of_one_checkpoint_are_summed() -> None:
    parts: list[dict[str, Any]] = [{"group": "a"}, {"group": "b"}]
    zero = torch.zeros(ROWS, DIM)
    split = torch.stack([torch.where(torch.arange(DIM) < 5, rows(), zero), zero], dim=1)
    split[:, 1] = rows() - split[:, 0]
    asked = torch.stack([targets(), torch.zeros(3, DIM)], dim=1)
    whole = gs.select(MemoryStore(rows()), targets(), 10, "tarot")
    np.testing.assert_array_equal(
        gs.select(MemoryStore(split, parts=parts), asked, 10, "tarot").rows,
        whole.rows,
    )


def test_transport_is_the_exact_one_within_its_blur() -> None:
    cost = np.random.default_rng(0).uniform(0, 2, (30, 7))
    moved = transport(cost)
    exact = ot.emd2(np.full(30, 1 / 30), np.full(7, 1 / 7), cost)
    assert exact <= moved.distance <= exact + BLUR * np.log(30 * 7)
    assert moved.f.mean() == pytest.approx(moved.g.mean())
    plan = np.exp((moved.f[:, None] + moved.g - cost) / BLUR) / (30 * 7)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / 7, rtol=5e-3)
    np.testing.assert_allclose(plan.sum(axis=1), 1 / 30, rtol=1e-9)
    value = (plan * cost).sum() + BLUR * (plan * np.log(plan * 30 * 7 + 1e-300)).sum()
    assert moved.distance == pytest.approx(value, rel=1e-4)


def test_otm_equals_a_brute_force_and_gives_the_ratio() -> None:
    asked = torch.cat([targets(3) + 4 * SKEW, targets(3) - 4 * SKEW])
    pool = torch.cat([rows(), random_rows(20, DIM, 3) * SKEW + 4 * SKEW, random_rows(20, DIM, 4) * SKEW - 4 * SKEW])
    cosine, distance = dense(pool, asked)
    order = np.stack([np.lexsort((np.arange(len(c)), -c)) for c in cosine])
    expected: set[int] = set()
    for held in np.array_split(np.random.default_rng(42).permutation(6), 3):
        others = np.setdiff1d(np.arange(6), held)
        best, least = set(), np.inf
        for depth in range(len(pool)):
            near = {int(order[t, d]) for t in held for d in range(depth + 1) if cosine[t, order[t, d]] > 0}
            if not near:
                break
            found = transport(distance[others][:, sorted(near)].T).distance
            if not found < least:
                break
            best, least = near, found
        expected |= best
    chosen = gs.select(MemoryStore(pool, 9), asked, None, "tarot", rule="otm", folds=3)
    assert set(chosen.rows.tolist()) == expected
    assert chosen.facts["ratio"] == len(expected) / len(pool)


def test_targets_at_right_angles_to_all_rows_choose_nothing() -> None:
    """Rows at -e1, targets at +e1: after centring they point away from each other."""
    base = torch.zeros(10, DIM)
    base[:, 0] = -1
    asked = -base[:4] + 0.01 * random_rows(4, DIM)
    with pytest.raises(gs.DataError, match="no row is nearer"):
        gs.select(MemoryStore(base + 0.01 * random_rows(10, DIM, 2)), asked, None, "tarot", rule="otm")
