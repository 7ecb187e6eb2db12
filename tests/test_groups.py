"""Groups of rows: their influence, the mixture, quotas, the bandit, and clusters."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from stores import MemoryStore, random_rows

import gradsift as gs
from gradsift.engine.answers.given import checked
from gradsift.engine.selectors.bandit import draw_clusters
from gradsift.engine.selectors.clusters import clusters_of
from gradsift.engine.selectors.groups import Groups
from gradsift.engine.selectors.mixture import best_mixture
from gradsift.engine.selectors.protocol import Targets
from gradsift.engine.selectors.quotas import quotas
from gradsift.engine.selectors.tasks import Tasks

ROWS, DIM = 80, 16
LABELS = np.random.default_rng(0).choice(["wiki", "code", "talk"], ROWS).tolist()
MATRIX = np.random.default_rng(1).standard_normal((4, 6))


def objective(matrix: np.ndarray, w: np.ndarray) -> float:
    s = matrix / matrix.std(axis=1, keepdims=True) @ w
    return float(s.mean() - s.std() - (w * np.log(np.maximum(w, 1e-300))).sum() / np.log(len(w)))


def test_influence_of_a_group_is_the_sum_of_its_members_per_token() -> None:
    rows, asked = random_rows(ROWS, DIM), random_rows(4, DIM, 1)
    tokens = np.random.default_rng(2).integers(1, 9, ROWS)
    store = MemoryStore(rows, 7, loss_tokens=tokens)
    found = Groups(LABELS)
    found.prepare(store, Targets(asked, checked(store, asked), Tasks.of(["x", "y", "x", "x"], 4)), "dot")
    scores = (asked.double() @ rows.double().T).numpy()
    per_task = np.stack([scores[[0, 2, 3]].mean(axis=0), scores[1]])
    for place, name in enumerate(found.names):
        members = [i for i, label in enumerate(LABELS) if label == name]
        expected = per_task[:, members].sum(axis=1) / tokens[members].sum()
        np.testing.assert_allclose(found.influence[:, place], expected, rtol=1e-9)


def test_the_mixture_is_better_than_any_drawn_one_and_harms_no_task() -> None:
    now = np.full(6, 1 / 6)
    best = best_mixture(MATRIX, now)
    assert best.min() >= 0
    assert best.sum() == pytest.approx(1)
    scaled = MATRIX / MATRIX.std(axis=1, keepdims=True)
    floor = scaled @ now
    assert (scaled @ best >= floor - 1e-6).all()
    drawn = np.random.default_rng(3).dirichlet(np.ones(6), 20_000)
    # Most of the simplex harms a task, so draws near the answer are compared too.
    drawn = np.concatenate([drawn, 0.9 * best + 0.1 * drawn, 0.99 * best + 0.01 * drawn])
    feasible = drawn[((drawn @ scaled.T) >= floor).all(axis=1)]
    assert len(feasible) > 100
    assert objective(MATRIX, best) >= max(objective(MATRIX, w) for w in feasible) - 1e-6


def test_one_term_alone_gives_its_own_answer() -> None:
    now = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    even = best_mixture(MATRIX, now, diversity=1e4, no_loss=False)
    np.testing.assert_allclose(even, 1 / 6, atol=1e-3)
    vertex = best_mixture(MATRIX, now, evenness=0.0, diversity=0.0, no_loss=False)
    best = int((MATRIX / MATRIX.std(axis=1, keepdims=True)).mean(axis=0).argmax())
    np.testing.assert_allclose(vertex, np.eye(6)[best], atol=1e-6)


def test_the_scale_of_a_task_changes_no_mixture() -> None:
    now = np.full(6, 1 / 6)
    scaled = best_mixture(MATRIX * np.array([1, 100, 0.01, 3.0])[:, None], now)
    np.testing.assert_allclose(scaled, best_mixture(MATRIX, now), atol=1e-4)


def test_rows_are_drawn_in_the_mixtures_shares_of_tokens() -> None:
    rows, asked = random_rows(400, DIM), random_rows(3, DIM, 1)
    labels = ["long"] * 100 + ["short"] * 300
    tokens = np.where(np.array(labels) == "long", 30, 10)
    chosen = gs.select(MemoryStore(rows, loss_tokens=tokens), asked, 80, "groups", scorer="dot", groups=labels)
    weights: Any = chosen.weights
    assert set(weights) == {"long", "short"}
    assert len(set(chosen.rows.tolist())) == 80
    share = tokens[chosen.rows][chosen.rows < 100].sum() / tokens[chosen.rows].sum()
    assert share == pytest.approx(weights["long"], abs=0.03)
    again = gs.select(MemoryStore(rows, loss_tokens=tokens), asked, 80, "groups", scorer="dot", groups=labels)
    np.testing.assert_array_equal(again.rows, chosen.rows)
    assert chosen.reasons is not None
    assert "of tokens" in chosen.reasons[0]


def test_rows_without_gradient_have_no_part_in_influence_or_shares() -> None:
    rows, asked = random_rows(400, DIM), random_rows(3, DIM, 1)
    labels = ["long"] * 100 + ["short"] * 300
    tokens = np.where(np.array(labels) == "long", 30, 10)
    rows[50:100], tokens[50:100] = 0, 1  # half of the long ones are empty, and short
    chosen = gs.select(MemoryStore(rows, loss_tokens=tokens), asked, 80, "groups", scorer="dot", groups=labels)
    kept = [*range(50), *range(100, 400)]
    alone = MemoryStore(rows[kept], loss_tokens=tokens[kept])
    without = gs.select(alone, asked, 80, "groups", scorer="dot", groups=[labels[i] for i in kept])
    weights: Any = chosen.weights
    assert weights == pytest.approx(without.weights)
    share = tokens[chosen.rows][chosen.rows < 100].sum() / tokens[chosen.rows].sum()
    assert share == pytest.approx(weights["long"], abs=0.03)


def test_rows_of_mean_losses_count_as_one_each() -> None:
    rows, asked = random_rows(ROWS, DIM), random_rows(3, DIM, 1)
    tokens = np.random.default_rng(2).integers(1, 9, ROWS)
    means = MemoryStore(rows, loss_tokens=tokens, metadata={"loss": {"sums_tokens": False}})
    options: dict[str, Any] = {"groups": LABELS, "scorer": "dot"}
    assert gs.select(means, asked, 9, "groups", **options).weights == pytest.approx(
        gs.select(MemoryStore(rows), asked, 9, "groups", **options).weights
    )


def test_a_mixture_that_cannot_fill_the_budget_says_so(caplog: pytest.LogCaptureFixture) -> None:
    best: dict[str, Any] = {"evenness": 0.0, "diversity": 0.0, "no_loss": False}
    with caplog.at_level(logging.WARNING):
        chosen = gs.select(
            MemoryStore(random_rows(ROWS, DIM)),
            random_rows(1, DIM, 1),
            70,
            "groups",
            scorer="dot",
            groups=LABELS,
            **best,
        )
    assert len(chosen.rows) < 70
    assert f"the budget is 70 rows but the groups with a weight hold only {len(chosen.rows)}" in caplog.text


@pytest.mark.parametrize("label", [["a"], {"a": 1}, np.array([1, 2])])
def test_labels_that_are_no_values_are_refused(label: Any) -> None:
    with pytest.raises(gs.DataError, match=r"row 3 has a \w+ in groups, expected text or a number"):
        labels = [*LABELS[:3], label, *LABELS[4:]]
        gs.select(MemoryStore(random_rows(ROWS, DIM)), random_rows(1, DIM, 1), 9, "groups", scorer="dot", groups=labels)


@pytest.mark.parametrize(
    ("shares", "sizes", "total", "expected"),
    [
        ([0.5, 0.5], [9, 9], 5, [3, 2]),
        ([0.7, 0.2, 0.1], [99, 99, 99], 10, [7, 2, 1]),
        ([0.7, 0.2, 0.1], [3, 99, 99], 10, [3, 5, 2]),
        ([1.0, 0.0], [3, 9], 5, [3, 0]),
        ([0.2, 0.3, 0.5], [1, 1, 1], 3, [1, 1, 1]),
    ],
)
def test_quotas(shares: list[float], sizes: list[int], total: int, expected: list[int]) -> None:
    assert quotas(np.array(shares), np.array(sizes), total).tolist() == expected


def test_quotas_never_exceed_anything() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        k = int(draw.integers(1, 8))
        sizes, total = draw.integers(0, 12, k), int(draw.integers(1, 40))
        given = quotas(draw.dirichlet(np.ones(k)), sizes, total)
        assert (given <= sizes).all()
        assert given.sum() == min(total, sizes.sum())


def drawn(**options: Any) -> Any:
    values = np.random.default_rng(5).standard_normal(60) + np.repeat([0.0, 2.0, -1.0], 20)
    asked: list[int] = []

    def influence(rows: np.ndarray) -> np.ndarray:
        asked.extend(rows.tolist())
        return values[rows]

    return draw_clusters(np.repeat([0, 1, 2], 20), influence, **{"budget": 10, "per_draw": 2, **options}), values, asked


def test_the_bandit_scores_what_it_draws_only_and_prefers_the_good_cluster() -> None:
    found, values, asked = drawn(at_once=1)
    assert found.scored == len(asked) == len(set(asked)) < 60
    assert (values[found.rows] > 0).all()
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert np.bincount(found.clusters, minlength=3)[1] > 5
    again, _, _ = drawn(at_once=1)
    np.testing.assert_array_equal(again.rows, found.rows)


def test_untouched_clusters_come_first_in_order() -> None:
    _, _, asked = drawn(at_once=1)
    assert [row // 20 for row in asked[:6]] == [0, 0, 1, 1, 2, 2]


def test_without_curiosity_it_is_greedy_and_with_much_it_goes_round() -> None:
    _, _, greedy = drawn(at_once=1, alpha=0.0)
    assert {row // 20 for row in greedy[6:]} == {1}
    _, _, round_robin = drawn(at_once=1, alpha=1e6, threshold=9.0)
    arms = [row // 20 for row in round_robin[::2]]
    assert all(sorted(arms[i : i + 3]) == [0, 1, 2] for i in range(0, 30, 3))


def test_one_row_per_cluster_ends_as_top_k() -> None:
    values = np.random.default_rng(6).standard_normal(50)
    found = draw_clusters(np.arange(50), lambda rows: values[rows], 7)
    np.testing.assert_array_equal(found.rows, np.argsort(-values)[:7])
    assert found.scored == 50


def test_the_bandit_over_a_store_reads_drawn_rows_only(caplog: pytest.LogCaptureFixture) -> None:
    rows, asked = random_rows(ROWS, DIM), random_rows(3, DIM, 1)
    read: list[int] = []

    class Features:
        def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
            read.extend(wanted.tolist())
            return rows.numpy()[wanted]

    store = MemoryStore(rows, features=Features())
    options: dict[str, Any] = {"groups": LABELS, "rule": "bandit", "scorer": "dot", "per_draw": 3}
    chosen = gs.select(store, asked, 6, "groups", **options)
    influence = (asked.double() @ rows.double().T).mean(dim=0).numpy()
    np.testing.assert_allclose(chosen.scores, influence[chosen.rows], rtol=1e-6)
    assert chosen.facts["scored"] == len(read) < ROWS
    with caplog.at_level(logging.WARNING):
        few = gs.select(store, asked, 70, "groups", **options)
    assert len(few.rows) == int((influence > 0).sum())
    assert "only" in caplog.text


def test_clusters_are_directions() -> None:
    centres = torch.eye(3, DIM)
    truth = np.random.default_rng(7).integers(0, 3, 90)
    rows = (centres[truth] + 0.05 * random_rows(90, DIM)) * torch.rand(
        90, 1, generator=torch.Generator().manual_seed(1)
    )
    names, index = clusters_of(MemoryStore(rows, 7), 3, seed=0)
    assert names == (0, 1, 2)
    assert len({(a, b) for a, b in zip(truth.tolist(), index.tolist(), strict=True)}) == 3
    np.testing.assert_array_equal(clusters_of(MemoryStore(rows, 90), 3, seed=0)[1], index)
    chosen = gs.select(
        MemoryStore(rows), centres[:1], 9, "groups", scorer="cosine", groups=3, rule="bandit", threshold=0.5
    )
    assert set(truth[chosen.rows].tolist()) == {0}
