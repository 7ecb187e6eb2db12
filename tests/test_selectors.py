"""Every selector against a brute force over dense gradients, whatever the blocks; and the protocol they share."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from stores import MemoryStore, dense_order, random_rows

import gradsift as gs
from gradsift.engine.selectors.bids import balance
from gradsift.engine.selectors.registry import SELECTORS

ROWS, DIM = 90, 16
TASKS = ["a", "b", "a", "c", "a"]


def targets(seed: int = 1) -> torch.Tensor:
    return random_rows(len(TASKS), DIM, seed)


def task_means(scores: np.ndarray) -> np.ndarray:
    """(q, n) -> (T, n), in the order of first appearance."""
    names = list(dict.fromkeys(TASKS))
    return np.stack([scores[[i for i, task in enumerate(TASKS) if task == name]].mean(axis=0) for name in names])


def cosines(rows: torch.Tensor, asked: torch.Tensor) -> np.ndarray:
    a, b = asked.double(), rows.double()
    return (a @ b.T / a.norm(dim=1)[:, None] / b.norm(dim=1)).numpy()


class Alone:
    """A scorer of one's own that is not linear."""

    def prepare(self, store: Any) -> None:
        pass

    def score(self, queries: Any, rows: Any) -> torch.Tensor:
        return torch.tanh(queries.values @ rows.values.double().T)


@pytest.mark.parametrize("block", [1, 7, 200])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_top_is_less_over_tasks_of_any_size(block: int, reduce: Any) -> None:
    rows = random_rows(ROWS, DIM)
    per_task = task_means(cosines(rows, targets()))
    expected = per_task.max(axis=0) if reduce == "max" else per_task.mean(axis=0)
    chosen = gs.select(MemoryStore(rows, block), targets(), 12, reduce=reduce, scorer="cosine", tasks=TASKS)
    np.testing.assert_array_equal(chosen.rows, dense_order(expected[None], 12)[0])
    np.testing.assert_allclose(chosen.scores, expected[chosen.rows], rtol=1e-5)
    assert chosen.reasons is not None
    if reduce == "max":
        names = list(dict.fromkeys(TASKS))
        assert chosen.reasons == [f"most for task {names[t]!r}" for t in per_task[:, chosen.rows].argmax(axis=0)]
    else:
        assert set(chosen.reasons) == {"mean over 3 tasks"}


def test_top_over_one_task_is_the_mean_and_a_task_twice_changes_nothing() -> None:
    store, asked = MemoryStore(random_rows(ROWS, DIM)), targets()
    mean = gs.select(store, asked, 9, reduce="mean", scorer="cosine")
    one = gs.select(store, asked, 9, scorer="cosine", tasks=["all"] * 5)
    np.testing.assert_array_equal(one.rows, mean.rows)
    twice = gs.select(store, asked.repeat(2, 1), 9, scorer="cosine", tasks=TASKS + [f"{task}2" for task in TASKS])
    once = gs.select(store, asked, 9, scorer="cosine", tasks=TASKS)
    np.testing.assert_array_equal(twice.rows, once.rows)


def test_top_as_a_set_compares_with_the_mean_gradient() -> None:
    """CROPI: the validation rows are averaged before they are normalised."""
    rows, asked = random_rows(ROWS, DIM), targets() * torch.tensor([1.0, 1, 20, 1, 1])[:, None]
    means = torch.from_numpy(task_means(asked.double().numpy()))
    expected = cosines(rows, means).max(axis=0)
    chosen = gs.select(MemoryStore(rows), asked, 12, scorer="cosine", tasks=TASKS, as_set=True)
    np.testing.assert_array_equal(chosen.rows, dense_order(expected[None], 12)[0])
    np.testing.assert_allclose(chosen.scores, expected[chosen.rows], rtol=1e-5)
    scaled = gs.select(MemoryStore(3 * rows), asked, 12, scorer="cosine", tasks=TASKS, as_set=True)
    np.testing.assert_array_equal(scaled.rows, chosen.rows)


@pytest.mark.parametrize("scorer", ["dot", Alone()])
def test_reciprocal_ranks_by_hand(scorer: Any) -> None:
    """Rows 0..5; lists of 3 are [0, 1, 2] and [2, 1, 4]: 2 has 1 + 1/3, 0 has 1, 1 has 1/2 + 1/2, 4 has 1/3."""
    table = torch.tensor([[0.6, 0.1], [0.5, 0.8], [0.4, 0.9], [0.3, 0.0], [0.2, 0.7], [0.1, 0.2]])
    chosen = gs.select(MemoryStore(table, 2), torch.eye(2), 3, reduce="rank", scorer=scorer)
    assert chosen.rows.tolist() == [2, 0, 1]
    np.testing.assert_allclose(chosen.scores, [4 / 3, 1, 1])
    assert chosen.reasons == [
        "rank 3 for target 0, 1 for target 1",
        "rank 1 for target 0",
        "rank 2 for target 0, 2 for target 1",
    ]
    one = gs.select(MemoryStore(table, 2), torch.eye(2)[:1], 3, reduce="rank", scorer=scorer)
    assert one.rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_top_takes_scorers_that_are_not_linear(reduce: Any) -> None:
    rows, asked = random_rows(ROWS, DIM), targets()
    per_task = task_means(np.tanh((asked.double() @ rows.double().T).numpy()))
    expected = per_task.max(axis=0) if reduce == "max" else per_task.mean(axis=0)
    chosen = gs.select(MemoryStore(rows, 7), asked, 12, scorer=Alone(), tasks=TASKS, reduce=reduce)
    np.testing.assert_array_equal(chosen.rows, dense_order(expected[None].round(12), 12)[0])
    assert chosen.scorer == "Alone"


def test_a_scorer_of_rows_alone_needs_no_targets() -> None:
    rows = random_rows(ROWS, DIM) * torch.arange(1, ROWS + 1)[:, None]
    chosen = gs.select(MemoryStore(rows, 7), None, 5, scorer="self")
    np.testing.assert_array_equal(chosen.rows, dense_order(rows.double().norm(dim=1).numpy()[None] ** 2, 5)[0])
    assert chosen.reasons == ["by itself"] * 5
    with pytest.raises(gs.SpecError, match="scores rows alone"):
        gs.select(MemoryStore(rows, 7), targets(), 5, scorer="self")


def test_seeds_rank_first_when_a_flagged_set_is_expanded() -> None:
    rows = random_rows(ROWS, DIM)
    seeds = [4, 17, 60]
    chosen = gs.select(MemoryStore(rows), rows[seeds], 10, scorer="cosine")
    assert sorted(chosen.rows[:3].tolist()) == seeds


def test_temperature_draws_and_zero_takes_the_top() -> None:
    store, asked = MemoryStore(random_rows(ROWS, DIM)), targets()
    top = gs.select(store, asked, 10, scorer="dot")
    np.testing.assert_array_equal(gs.select(store, asked, 10, scorer="dot", temperature=0.0).rows, top.rows)
    warm = gs.select(store, asked, 10, scorer="dot", temperature=3.0, seed=1)
    assert set(warm.rows.tolist()) != set(top.rows.tolist())
    np.testing.assert_array_equal(gs.select(store, asked, 10, scorer="dot", temperature=3.0, seed=1).rows, warm.rows)


@pytest.mark.parametrize("rule", ["balance", "gain"])
@pytest.mark.parametrize("block", [1, 7, 200])
def test_bids_equals_the_plain_greedy_rule(rule: Any, block: int) -> None:
    rows = random_rows(ROWS, DIM)
    scores = (targets().double() @ rows.double().T).numpy()
    z = (scores - scores.mean(axis=1, keepdims=True)) / scores.std(axis=1, keepdims=True)
    utility = task_means(z).T
    taken: list[int] = []
    for _ in range(15):
        have = utility[taken].mean(axis=0) if taken else np.zeros(3)
        left = [i for i in range(ROWS) if i not in taken]
        if rule == "balance":
            taken.append(max(left, key=lambda i: (utility[i, int(np.argmin(have))], -i)))
        else:
            taken.append(max(left, key=lambda i: ((utility[i] - have).max(), -i)))
    chosen = gs.select(MemoryStore(rows, block), targets(), 15, "bids", scorer="dot", tasks=TASKS, rule=rule)
    assert chosen.rows.tolist() == taken
    assert chosen.reasons is not None
    assert chosen.reasons[0] == "for task 'a'" or rule == "gain"


def test_bids_does_not_mind_the_scale_or_shift_of_a_target() -> None:
    rows = random_rows(ROWS, DIM)
    rows[:, 0] = 1.0  # a target along this axis shifts all its scores
    asked = targets()
    plain = gs.select(MemoryStore(rows), asked, 15, "bids", scorer="dot", tasks=TASKS)
    other = asked * torch.tensor([1.0, 50, 1, 0.02, 1])[:, None]
    other[2, 0] += 300
    changed = gs.select(MemoryStore(rows), other, 15, "bids", scorer="dot", tasks=TASKS)
    np.testing.assert_array_equal(changed.rows, plain.rows)


def test_bids_over_one_task_or_equal_tasks_is_top() -> None:
    store, asked = MemoryStore(random_rows(ROWS, DIM)), targets()[:1]
    top = gs.select(store, asked, 15, scorer="dot")
    for rule in ("balance", "gain"):
        one = gs.select(store, asked, 15, "bids", scorer="dot", rule=rule)
        three = gs.select(store, asked.repeat(3, 1), 15, "bids", scorer="dot", rule=rule)
        np.testing.assert_array_equal(one.rows, top.rows)
        np.testing.assert_array_equal(three.rows, top.rows)


def test_equal_rows_are_taken_in_their_order() -> None:
    rows, tasks = balance(np.zeros((5, 2)), 3, "balance")
    assert rows.tolist() == [0, 1, 2]
    assert tasks.tolist() == [0, 0, 0]
    twice = random_rows(20, DIM).repeat(2, 1)
    for method in ("bids", "tarot", "top"):
        chosen = gs.select(MemoryStore(twice, 3), targets(), 12, method, scorer="dot")
        first = {row: place for place, row in enumerate(chosen.rows.tolist())}
        assert all(first.get(row - 20, 99) < place for row, place in first.items() if row >= 20), method


@pytest.mark.parametrize("method", ["top", "bids", "tarot", "diverse"])
def test_a_permutation_of_the_rows_permutes_the_choice(method: str) -> None:
    rows, draw = random_rows(ROWS, DIM), torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    before = gs.select(MemoryStore(rows, 11), targets(), 14, method, scorer="dot")
    after = gs.select(MemoryStore(rows[draw], 4), targets(), 14, method, scorer="dot")
    assert draw[after.rows].tolist() == before.rows.tolist()
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-6)


@pytest.mark.parametrize("method", ["top", "tarot", "bids", "groups", "diverse", "order", "vog"])
def test_no_method_takes_a_row_without_gradient(method: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = random_rows(24, 2 * DIM).unflatten(1, (2, DIM))
    rows[[3, 8]] = 0
    parts = [{"checkpoint": "c1", "learning_rate": 1.0}, {"checkpoint": "c2", "learning_rate": 1.0}]
    options: dict[str, Any] = {"groups": {"groups": ["x", "y"] * 12}}.get(method, {})
    asked = None if method in ("order", "vog") else random_rows(3, 2 * DIM, 1).unflatten(1, (2, DIM))
    with caplog.at_level(logging.WARNING):
        chosen = gs.select(MemoryStore(rows, 5, parts=parts), asked, 23, method, scorer="dot", **options)
    assert sorted(set(chosen.rows.tolist())) == [i for i in range(24) if i not in (3, 8)]
    assert chosen.dropped.tolist() == [3, 8]
    assert "row 3 (id 'example 3')" in caplog.text


def test_a_selector_of_ones_own_in_ten_lines() -> None:
    class Loudest:
        def prepare(self, store: Any, targets: Any, scorer: Any) -> None:
            self.norms = store.grad_norm

        def choose(self, budget: Any) -> Any:
            rows = np.argsort(-self.norms, kind="stable")[:budget]
            return rows, self.norms[rows], [f"norm {self.norms[row]:.2f}" for row in rows]

    rows = random_rows(30) * torch.arange(1, 31)[:, None]
    chosen = gs.select(MemoryStore(rows), None, 3, Loudest())
    assert chosen.rows.tolist() == rows.norm(dim=1).argsort(descending=True)[:3].tolist()
    assert (chosen.method, chosen.scorer, chosen.ids[0]) == ("Loudest", None, f"example {chosen.rows[0]}")
    assert chosen.reasons is not None
    assert chosen.reasons[0].startswith("norm ")


class Wrong:
    """A selector that answers what it was told to."""

    def __init__(self, *answer: Any) -> None:
        self.answer = answer

    def prepare(self, store: Any, targets: Any, scorer: Any) -> None:
        pass

    def choose(self, budget: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (([0, 1], [1.0], None), "rows of shape (2,) with scores of shape (1,)"),
        (([0.5], [1.0], None), "whole numbers"),
        (([50], [1.0], None), "rows 50 to 50 of a store of 50"),
        (([0, 1, 2, 3], [1.0] * 4, None), "chose 4 rows for a budget of 3"),
        (([0, 1], [1.0] * 2, ["why"]), "gave 1 reasons for 2 rows"),
    ],
)
def test_a_wrong_answer_of_ones_own_is_named(answer: Any, text: str) -> None:
    with pytest.raises(gs.ShapeError) as refused:
        gs.select(MemoryStore(random_rows(50)), None, 3, Wrong(*answer))
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"method": "tarot", "reduce": "max"}, "method 'tarot' has no option 'reduce': its options are rule, damping"),
        ({"method": "best"}, "method is 'best', expected 'top', 'tarot'"),
        ({"method": object()}, "expected a name or an instance"),
        ({"method": Wrong(), "reduce": "max"}, "'reduce' has no place"),
        ({"tasks": ["a"]}, "tasks has 1 labels for 5 targets"),
        ({"tasks": ["a", "a", "", "b", "b"]}, "target 2 has no label in tasks"),
        ({"targets": None, "tasks": ["a"]}, "there are none"),
        ({"targets": None}, "there are no queries"),
        ({"targets": torch.zeros(0, DIM)}, "with q >= 1"),
        ({"targets": torch.cat([torch.ones(1, DIM), torch.zeros(1, DIM)])}, "query 1 has a zero gradient"),
        ({"budget": None}, "method 'top' does not find how many"),
        ({"budget": 51}, "holds 50"),
        ({"budget": 0.01}, "no row at all"),
        ({"reduce": "best"}, "reduce is 'best'"),
        ({"reduce": "rank", "temperature": 1.0}, "temperature draws by scores"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"method": "bids", "targets": None}, "give targets"),
        ({"method": "bids", "rule": "fair"}, "rule is 'fair'"),
        ({"method": "tarot", "targets": None}, "give targets"),
        ({"method": "tarot", "rule": "all"}, "rule is 'all'"),
        ({"method": "tarot", "damping": 0.0}, "damping is 0"),
        ({"method": "tarot", "folds": 5}, "folds is an option of rule='otm'"),
        ({"method": "tarot", "rule": "otm"}, "give budget=None"),
        ({"method": "tarot", "rule": "otm", "budget": None, "targets": torch.ones(1, DIM)}, "there is one"),
        ({"method": "tarot", "budget": None}, "give one, or rule='otm'"),
        ({"method": "diverse", "targets": None}, "explains a query"),
        ({"method": "diverse", "tasks": TASKS}, "one query but 3 tasks"),
        ({"method": "diverse", "lam": 2.0}, "lam is 2.0"),
        ({"method": "diverse", "candidates": 2}, "2 candidates for a budget of 5"),
        ({"method": "groups"}, "needs groups"),
        ({"method": "groups", "groups": ["a"] * 49}, "groups has 49 labels for 50 rows"),
        ({"method": "groups", "groups": ["a"] * 50}, "there is one domain"),
        ({"method": "groups", "groups": [*["a"] * 49, None]}, "row 49 has no label in groups"),
        ({"method": "groups", "groups": 1}, "groups is 1 clusters"),
        ({"method": "groups", "groups": range(1001), "store": 1001}, "there are 1001 groups, more than the 1000"),
        ({"method": "groups", "groups": 2, "alpha": 2.0}, "alpha is an option of rule='bandit'"),
        ({"method": "groups", "groups": ["a", "b"] * 25, "now": {"a": 1.0}}, "now and groups differ in ['b']"),
        ({"method": "vog", "targets": None}, "one checkpoint, but 'vog' is the variance over several"),
        ({"method": "vog", "targets": None, "keep": "all"}, "keep is 'all'"),
        ({"method": "order", "targets": None, "direction": "up"}, "direction is 'up'"),
        ({"method": "order", "targets": None, "bins": 1}, "bins is 1"),
        ({"method": "lobass", "targets": None}, "given one store: extract the same data with the reference model"),
    ],
)
def test_bad_input_is_one_sentence(arguments: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"targets": targets(), "budget": 5, "scorer": "dot", **arguments}
    with pytest.raises(gs.GradsiftError) as refused:
        store = MemoryStore(random_rows(given.pop("store", 50), DIM))
        gs.select(store, given.pop("targets"), given.pop("budget"), **given)
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["top", "bids", "tarot", "diverse"])
def test_rows_after_adam_are_not_mixed_with_plain_targets(method: str) -> None:
    store = MemoryStore(random_rows(30, DIM), metadata={"preconditioner": {"kind": "adam"}})
    with pytest.raises(gs.SpecError, match="holds gradients after Adam"):
        gs.select(store, targets(), 5, method, scorer="dot")


def test_what_changes_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(random_rows(30, DIM))
    with caplog.at_level(logging.WARNING):
        gs.select(store, targets(), 5, "order")
        gs.select(store, targets(), 5, "tarot", scorer="dot")
    assert "method 'order' looks at the rows alone: the targets change nothing" in caplog.text
    assert "method 'tarot' uses no scorer: scorer='dot' changes nothing" in caplog.text


def test_every_selector_says_what_it_is() -> None:
    for name, made in SELECTORS.items():
        about = made.about  # type: ignore[attr-defined]
        assert about.name == name
        assert all((about.formula, about.needs, about.cost, about.source, about.published))
