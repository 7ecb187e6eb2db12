"""Choices by rows alone and choices for one query: order, vog, lobass, diverse, with the parts they are made of."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from stores import MemoryStore, random_rows
from torch import Tensor

import gradsift as gs
from gradsift.engine.selectors.diverse import cover
from gradsift.engine.selectors.gumbel import gumbel_top
from gradsift.engine.selectors.simplex import nearest_mixture, project_to_simplex, rebuild

ROWS, DIM = 50, 16
PARTS = [{"checkpoint": "first"}, {"checkpoint": "last"}]


def two_checkpoints(seed: int = 0) -> Tensor:
    return random_rows(ROWS, 2 * DIM, seed).unflatten(1, (2, DIM))


def store(rows: Tensor, block: int = 7, **more: Any) -> MemoryStore:
    return MemoryStore(rows, block, parts=PARTS, **more)


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_order_sorts_by_agreement_with_the_mean_direction(block: int, direction: Any) -> None:
    rows = two_checkpoints()
    unit = rows.double() / rows.double().norm(dim=2, keepdim=True)
    mean = unit.mean(dim=0)
    scores = (unit * (mean / mean.norm(dim=1, keepdim=True))).sum(dim=2).numpy()
    sign = -1 if direction == "falling" else 1
    expected = [np.lexsort((np.arange(ROWS), sign * scores[:, c])) for c in (0, 1)]
    chosen = gs.select(store(rows, block), None, None, "order", direction=direction)
    np.testing.assert_array_equal(chosen.rows, np.concatenate(expected))
    np.testing.assert_allclose(chosen.scores, np.concatenate([scores[e, c] for c, e in enumerate(expected)]), atol=1e-6)
    assert chosen.facts["epochs"] == 2
    assert chosen.reasons is not None
    assert (chosen.reasons[0], chosen.reasons[-1]) == ("epoch 1, first", "epoch 2, last")


def test_every_epoch_is_a_permutation_and_bins_partition_it() -> None:
    plain = gs.select(store(two_checkpoints()), None, None, "order").rows.reshape(2, ROWS)
    mixed = gs.select(store(two_checkpoints()), None, None, "order", bins=8, seed=3).rows.reshape(2, ROWS)
    assert (mixed != plain).any()
    for one, other in zip(plain, mixed, strict=True):
        assert sorted(other.tolist()) == list(range(ROWS))
        for start in range(0, ROWS, 8):
            assert set(one[start : start + 8].tolist()) == set(other[start : start + 8].tolist())
    again = gs.select(store(two_checkpoints()), None, None, "order", bins=8, seed=3).rows.reshape(2, ROWS)
    np.testing.assert_array_equal(again, mixed)


def test_a_budget_of_an_order_keeps_the_rows_of_largest_total() -> None:
    whole = gs.select(store(two_checkpoints()), None, None, "order")
    total = np.zeros(ROWS)
    np.add.at(total, whole.rows, whole.scores)
    few = gs.select(store(two_checkpoints()), None, 12, "order").rows.reshape(2, 12)
    for epoch in few:
        assert set(epoch.tolist()) == set(np.argsort(-total)[:12].tolist())


@pytest.mark.parametrize("block", [1, 7, 100])
def test_vog_is_the_variance_over_checkpoints_within_classes(block: int) -> None:
    rows, classes = two_checkpoints(), [i % 3 for i in range(ROWS)]
    variance = rows.double().var(dim=1, correction=0).sum(dim=1).numpy()
    np.testing.assert_allclose(variance, ((rows[:, 0] - rows[:, 1]).double() ** 2).sum(dim=1).numpy() / 4)
    z = np.zeros(ROWS)
    for label in range(3):
        members = [i for i in range(ROWS) if classes[i] == label]
        z[members] = (variance[members] - variance[members].mean()) / variance[members].std()
    hard = gs.select(store(rows, block), None, 10, "vog", classes=classes)
    np.testing.assert_array_equal(hard.rows, np.lexsort((np.arange(ROWS), -z))[:10])
    np.testing.assert_allclose(hard.scores, z[hard.rows], atol=1e-5)
    easy = gs.select(store(rows, block), None, 10, "vog", classes=classes, keep="easy")
    np.testing.assert_array_equal(easy.rows, np.lexsort((np.arange(ROWS), z))[:10])


def test_vog_scores_have_mean_0_and_std_1_within_a_class_and_a_single_member_scores_0() -> None:
    classes = ["odd" if i else "alone" for i in range(ROWS)]
    chosen = gs.select(store(two_checkpoints()), None, ROWS, "vog", classes=classes)
    of_row = dict(zip(chosen.rows.tolist(), chosen.scores.tolist(), strict=True))
    assert of_row.pop(0) == 0
    assert np.mean(list(of_row.values())) == pytest.approx(0, abs=1e-9)
    assert np.std(list(of_row.values())) == pytest.approx(1)


def test_rows_that_do_not_change_have_no_spread() -> None:
    constant = random_rows(ROWS, DIM)[:, None].expand(-1, 2, -1).contiguous()
    assert not gs.select(store(constant), None, ROWS, "vog").scores.any()


def test_vog_is_unbiased_in_a_sketch() -> None:
    """The mean over seeds of |.|^2 exact minus |S mean|^2 is the variance; a second moment of S alone would be too."""
    exact = random_rows(1, 128, 3).unflatten(1, (2, DIM * 4)).double()
    truth = float(exact.var(dim=1, correction=0).sum())
    norms = exact.norm(dim=2)
    found = []
    for seed in range(400):
        matrix = gs.sketch_matrix(gs.SketchSpec(dim=64, seed=seed), "w", (4, 16)).double()
        sketched = exact @ matrix.T
        found.append(float((norms**2).mean() - sketched.mean(dim=1).square().sum()))
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / 20)


def test_lobass_by_hand_matches_by_id_and_guards_small_losses(caplog: pytest.LogCaptureFixture) -> None:
    base = MemoryStore(
        random_rows(4), loss=np.array([8.0, 2.0, 3.0, 1e-9]), loss_tokens=np.array([4, 2, 1, 1]), metadata={}
    )
    tuned = MemoryStore(random_rows(5), loss=np.array([1.0, 1.5, 6.0, 9.0, 0.0]), loss_tokens=np.array([1, 1, 4, 9, 1]))
    tuned.ids = ["example 1", "example 2", "example 0", "example 9", "example 3"]
    with caplog.at_level(logging.WARNING):
        chosen = gs.select(base, None, 3, "lobass", reference=tuned)
    # per token: base 2, 1, 3; tuned 1.5, 1, 1.5
    assert chosen.rows.tolist() == [2, 0, 1]
    np.testing.assert_allclose(chosen.scores, [0.5, 0.25, 0.0])
    assert chosen.reasons is not None
    assert chosen.reasons[0] == "loss per token 3, after tuning 1.5"
    assert "row 3 (id 'example 3')" in caplog.text
    means: Any = {"loss": {"kind": "a", "sums_tokens": False}}
    base.metadata = tuned.metadata = means  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.sort(gs.select(base, None, 3, "lobass", reference=tuned).scores), [0.25, 0.5, 0.5])
    with pytest.raises(gs.StoreError, match="lacks the example 'example 9'"):
        gs.select(tuned, None, 3, "lobass", reference=base)
    base.metadata, tuned.metadata = {"loss": {"kind": "a"}}, {"loss": {"kind": "b"}}  # type: ignore[attr-defined]
    with pytest.raises(gs.StoreError, match="holds the loss 'a' but the reference 'b'"):
        gs.select(base, None, 3, "lobass", reference=tuned)


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_lazy_cover_is_the_plain_greedy_rule(lam: float) -> None:
    features = random_rows(30, 5).double().numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity, influence = unit @ unit.T, np.sort(np.random.default_rng(0).standard_normal(30))[::-1]
    cost = 1 + 29 * (influence.max() - influence) / (influence.max() - influence.min())
    taken: list[int] = []
    covered = np.zeros(30)
    for _ in range(30):
        gain = np.maximum(similarity - covered, 0).sum(axis=1)
        worth = ((gain + 1) ** lam / cost ** (1 - lam)).round(12)
        worth[taken] = -1
        taken.append(int(worth.argmax()))
        covered = np.maximum(covered, similarity[taken[-1]])
    places, gains = cover(similarity, influence, 30, lam)
    assert places.tolist() == taken
    assert (gains >= 0).all()
    if lam == 0:
        assert taken == list(range(30))


def test_diverse_rebuilds_the_mean_of_its_targets() -> None:
    rows, asked = random_rows(ROWS, DIM), random_rows(3, DIM, 1)
    scores = (asked.mean(dim=0).double() @ rows.double().T).numpy()
    candidates = np.argsort(-scores, kind="stable")[:20]
    unit = (rows / rows.norm(dim=1, keepdim=True))[candidates].double().numpy()
    places, _ = cover(unit @ unit.T, scores[candidates], 6, 0.5)
    for simplex in ("exact", "paper"):
        chosen = gs.select(MemoryStore(rows, 7), asked, 6, "diverse", scorer="dot", candidates=20, simplex=simplex)
        np.testing.assert_array_equal(chosen.rows, candidates[places])
        rebuilt = rebuild(rows[chosen.rows].double().numpy(), asked.double().mean(dim=0).numpy(), simplex)  # type: ignore[arg-type]
        np.testing.assert_allclose(chosen.weights, rebuilt.weights, atol=1e-9)
        assert chosen.facts["quality_db"] == pytest.approx(rebuilt.quality)
    top = gs.select(MemoryStore(rows, 7), asked, 6, "diverse", scorer="dot", lam=0.0)
    np.testing.assert_array_equal(top.rows, np.argsort(-scores, kind="stable")[:6])
    every = gs.select(MemoryStore(rows, 7), asked, ROWS, "diverse", scorer="dot")
    assert sorted(every.rows.tolist()) == list(range(ROWS))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 25])
def test_the_exact_mixture_is_the_least_squares_one_and_the_paper_is_never_nearer(count: int) -> None:
    for seed in range(10):
        rows, query = random_rows(count, DIM, seed).double().numpy(), random_rows(1, DIM, 99 + seed)[0].double().numpy()
        exact, paper = rebuild(rows, query), rebuild(rows, query, "paper")
        for found in (exact, paper):
            assert found.weights.min() >= 0
            assert found.weights.sum() == pytest.approx(1)
        assert exact.error <= paper.error + 1e-12
        # Optimality: no row is a better direction than the mixture itself.
        slopes = (rows - query) @ (exact.weights @ rows - query)
        assert slopes.min() >= exact.weights @ slopes - 1e-9
        solved = minimize(
            lambda w, rows=rows, query=query: ((w @ rows - query) ** 2).sum(),
            np.full(count, 1 / count),
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        assert exact.error <= solved.fun + 1e-6


@pytest.mark.parametrize("simplex", ["exact", "paper"])
def test_a_set_that_holds_the_query_rebuilds_it_at_any_scale(simplex: Any) -> None:
    rows = random_rows(5, DIM).double().numpy() * 1e-6
    found = rebuild(rows, rows[3], simplex)
    np.testing.assert_allclose(found.weights, np.eye(5)[3], atol=1e-9)
    assert found.quality == pytest.approx(80, abs=0.1)
    other = rebuild(rows, rows[3] * 0, simplex)
    assert other.quality == 0


def test_equal_rows_share_a_mixture() -> None:
    rows = random_rows(3, DIM).double().numpy()[[0, 0, 1, 1, 2]]
    query = 0.5 * rows[0] + 0.3 * rows[2] + 0.2 * rows[4]
    weights = nearest_mixture(rows, query)
    np.testing.assert_allclose(weights @ rows, query, atol=1e-9)


def test_the_projection_on_the_simplex_is_the_nearest_point_and_stays() -> None:
    for seed in range(20):
        values = np.random.default_rng(seed).standard_normal(7) * 3
        point = project_to_simplex(values)
        assert point.min() >= 0
        assert point.sum() == pytest.approx(1)
        np.testing.assert_allclose(project_to_simplex(point), point, atol=1e-12)
        others = np.random.default_rng(seed).dirichlet(np.ones(7), 500)
        assert ((others - values) ** 2).sum(axis=1).min() >= ((point - values) ** 2).sum()


def test_gumbel_top_draws_from_the_softmax_and_not_from_its_mirror() -> None:
    """Adding the noise and taking the smallest, as MATES' code does, gives .726, .264, .010 instead."""
    scores, draws = -np.array([0.0, 1.0, 3.0]), 20_000
    first = np.bincount([gumbel_top(scores, 1, 1.0, seed)[0] for seed in range(draws)], minlength=3) / draws
    np.testing.assert_allclose(first, [0.705, 0.259, 0.035], atol=4 * np.sqrt(0.25 / draws))
    assert first[2] > 0.02


def test_gumbel_top_never_draws_a_row_twice_and_ties_by_row() -> None:
    drawn = gumbel_top(np.zeros(40), 40, 1.0, 0)
    assert sorted(drawn.tolist()) == list(range(40))
    assert gumbel_top(np.zeros(5), 3, 0.0, 0).tolist() == [0, 1, 2]
    warm = [len(set(gumbel_top(np.arange(40.0), 5, t, 0).tolist()) & set(range(35, 40))) for t in (0.01, 3.0, 300.0)]
    assert all(a >= b for a, b in pairwise(warm))
