"""What scorers refuse, in a sentence that says what to run; scorers of one's own; queries from a store."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import ADAM, ROWS, WORLD, queries_for, streamed
from stores import MemoryStore, dense_order, random_rows
from torch import Tensor
from toy import ToyLoss, toy_batches, toy_extract, toy_model

import gradsift as gs
from gradsift.engine.answers.rescore import Exact
from gradsift.engine.scorers.protocol import Queries, Rows
from gradsift.engine.scorers.registry import SCORERS, scorer_of

logging.getLogger("gradsift.engine.capture.capture").setLevel(logging.ERROR)

ASKED = random_rows(2, seed=1)
NAMED = tuple({"checkpoint": f"step {c}", "learning_rate": None, "dim": 64} for c in range(4))
ONE = ({"checkpoint": "step 0", "learning_rate": 1e-3, "dim": 64},)


def store(count: int = 1, **attributes: Any) -> MemoryStore:
    rows = random_rows(20 * count).view(20, count, 64)
    return MemoryStore(rows[:, 0] if count == 1 else rows, path="train.zarr", **attributes)


def adam(**metadata: Any) -> dict[str, Any]:
    return {"metadata": {"preconditioner": ADAM, **metadata}}


BAD: list[tuple[MemoryStore, Any, str, dict[str, Any], type[Exception], str]] = [
    (store(), ASKED, "less", {}, gs.StoreError, r"gradients at one checkpoint .* extract it with checkpoints=\["),
    (store(parts=ONE), ASKED, "less", {}, gs.StoreError, "gradients at one checkpoint"),
    (store(4, parts=NAMED), random_rows(8).view(2, 4, 64), "less", {}, gs.StoreError, "without learning rates"),
    (store(4, parts=NAMED), random_rows(8).view(2, 4, 64), "dot", {}, gs.StoreError, "'dot' weighs .* learning_rate="),
    (store(4, parts=NAMED), None, "self", {}, gs.StoreError, "'self' weighs .* learning_rate="),
    (
        store(4, parts=NAMED),
        ASKED,
        "cosine",
        {},
        gs.ShapeError,
        "holds 4 checkpoints, so extract the queries to a store",
    ),
    (store(**adam()), ASKED, "dot", {}, gs.SpecError, r"'train\.zarr' holds gradients after Adam, .*scorer='less'"),
    (store(**adam()), ASKED, "datainf", {}, gs.SpecError, "gradients after Adam"),
    (store(**adam()), None, "self", {}, gs.SpecError, "gradients after Adam"),
    (store(), ASKED, "datainf", {}, gs.StoreError, "joint rows of 0 parameters .* groups='parameter'"),
    (store(3), random_rows(6).view(2, 3, 64), "datainf", {}, gs.StoreError, "keeps 3 timesteps or checkpoints apart"),
    (store(table=(), parts=({"group": "a"},)), ASKED, "datainf", {}, gs.StoreError, "group 'a' without parameters"),
    (store(), ASKED, "dmin", {}, gs.StoreError, r"keeps no timesteps apart, .*Diffusion\(\.\.\., parts=True\)"),
    (store(), ASKED, "dtrak", {}, gs.StoreError, "'another loss' .* measure='squared_prediction'"),
    (store(), ASKED, "trak", {"damping": 0}, gs.SpecError, "damping is 0 with 20 rows of dim 64, expected 256"),
    (store(), ASKED, "trak", {"damping": -1}, gs.SpecError, "damping is -1"),
    (store(), ASKED, "datainf", {"damping": 0}, gs.SpecError, "damping is 0"),
    (store(), ASKED, "cosine", {"damping": 1}, gs.SpecError, "the scorer 'cosine' has none"),
    (store(), ASKED, "self", {}, gs.SpecError, "'self' scores rows alone .* give None"),
    (store(), None, "dot", {}, gs.ShapeError, "there are no queries"),
    (store(), None, "self_fisher", {}, gs.StoreError, "no curvature sample, .* curvature=2000, or use scorer='self'"),
    (store(2), ASKED, "dot", {}, gs.ShapeError, "fold its parts"),
    (store(2, parts=({"group": "a"}, {"group": "b"})), ASKED, "dot", {}, gs.ShapeError, "holds 2 groups, so capture"),
    (store(2, parts=ONE), random_rows(4).view(2, 2, 64), "dot", {}, gs.StoreError, "describes 1 parts but has 2"),
]


@pytest.mark.parametrize(("held", "queries", "scorer", "options", "error", "text"), BAD)
def test_what_does_not_fit_is_refused(
    held: Any, queries: Any, scorer: str, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        gs.topk(held, queries, 3, scorer, **options)


def test_a_classifier_s_checkpoints_need_a_loss_each() -> None:
    held = WORLD.store(checkpoints=3)
    held.loss, held.checkpoint_loss = np.ones(ROWS), None  # type: ignore[attr-defined]
    with pytest.raises(gs.StoreError, match=r"holds 1 losses per example .* each of its 3 checkpoints"):
        gs.topk(held, queries_for("trak", {"checkpoints": 3}), 3, "trak")
    with pytest.raises(gs.ShapeError, match="the queries have no loss"):
        gs.topk(WORLD.store(), WORLD.apart("asked", False, 1).values, 3, "trak")


def test_queries_after_adam_are_refused() -> None:
    asked = WORLD.apart("asked", False, 1)
    with pytest.raises(gs.SpecError, match="the queries are gradients after Adam, expected plain ones"):
        gs.topk(WORLD.store(), replace(asked, preconditioner=ADAM), 3, "dot")


@pytest.mark.parametrize("scorer", ["trak", "datainf"])
def test_a_compacted_store_has_no_rows_to_read(scorer: str) -> None:
    class Compacted:
        ids, grad_norm, path = range(9), np.ones(9, np.float32), "small"
        spec, parts, table = gs.SketchSpec(dim=64), ({"group": "layer"},), WORLD.store().table[:1]  # type: ignore[attr-defined]

        def __len__(self) -> int:
            return 9

        def search(self, directions: Tensor, k: int, **options: Any) -> Any:
            raise AssertionError

    compacted: Any = Compacted()
    compacted.parts = ({"group": compacted.table[0].name},)
    with pytest.raises(gs.StoreError, match=f"'small' is compacted and holds no rows, which '{scorer}' reads"):
        gs.topk(compacted, ASKED, 3, scorer)
    assert gs.topk(compacted, None, 3, "self").rows.tolist() == [[0, 1, 2]]


def test_a_store_that_searches_by_itself_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Searches(MemoryStore):
        def search(self, directions: Tensor, k: int, weights: Any, skip: Any, together: bool) -> Any:
            from gradsift.engine.answers.scan import scan

            asked.append((directions.dtype, k))
            return scan(self, directions, k, norms=self.grad_norm, weights=weights, skip=skip, memory=1 << 20)

    rows = random_rows(30)
    for largest in (True, False):
        expected = gs.topk(MemoryStore(rows), ASKED, 4, "cosine", largest)
        got = gs.topk(Searches(rows), ASKED, 4, "cosine", largest)
        np.testing.assert_array_equal(got.rows, expected.rows)
        np.testing.assert_array_equal(got.scores, expected.scores)
    assert asked == [(torch.float64, 4)] * 2


class Nearest:
    """A scorer of one's own, in ten lines: minus the distance to the query, each row made a unit vector."""

    def prepare(self, store: Any) -> None:
        self.mean = torch.cat([block for _, block in store.blocks()]).double().mean(dim=0)

    def score(self, queries: Queries, rows: Rows) -> Tensor:
        centred = torch.nn.functional.normalize(rows.values.double() - self.mean, dim=1)
        return -torch.cdist(queries.values, centred)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_scorer_of_one_s_own(block: int) -> None:
    rows, queries = random_rows(60), random_rows(3, seed=1)
    centred = torch.nn.functional.normalize(rows.double() - rows.double().mean(dim=0), dim=1)
    expected = -torch.cdist(queries.double(), centred).numpy()
    held = MemoryStore(rows, block)
    top = gs.topk(held, queries, 5, Nearest())
    assert top.scorer == "Nearest"
    np.testing.assert_array_equal(top.rows, dense_order(expected, 5))
    np.testing.assert_allclose(top.scores, np.take_along_axis(expected, top.rows, 1), rtol=1e-9)
    worst = gs.topk(held, queries, 5, Nearest(), largest=False)
    np.testing.assert_array_equal(worst.rows, dense_order(-expected, 5))
    chosen = gs.select(held, queries, 8, scorer=Nearest())
    np.testing.assert_array_equal(chosen.rows, dense_order(expected.max(axis=0)[None], 8)[0])
    np.testing.assert_allclose(streamed(held, queries, Nearest()), expected, rtol=1e-9)


def test_an_instance_is_prepared_once_for_each_store() -> None:
    class Counts(Nearest):
        prepared = 0

        def prepare(self, store: Any) -> None:
            self.prepared += 1
            super().prepare(store)

    scorer, first, second = Counts(), MemoryStore(random_rows(20)), MemoryStore(random_rows(20, seed=7))
    expected = [gs.topk(held, ASKED, 3, Nearest()).scores for held in (first, second)]
    for place, times in ((0, 1), (0, 1), (1, 2), (0, 3)):
        got = gs.topk((first, second)[place], ASKED, 3, scorer)
        np.testing.assert_array_equal(got.scores, expected[place])
        assert scorer.prepared == times


class Wrong(Nearest):
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, queries: Queries, rows: Rows) -> Tensor:
        return self.scores


@pytest.mark.parametrize(
    ("scorer", "error", "text"),
    [
        (Wrong(torch.zeros(3)), gs.ShapeError, r"'Wrong' returned shape \(3,\), expected \(2, 20\)"),
        (Wrong(torch.full((2, 20), torch.nan)), gs.StoreError, "row 0 .* not finite"),
        (Nearest, gs.SpecError, "expected a name or an instance with the methods prepare"),
        (object(), gs.SpecError, "expected a name or an instance"),
    ],
)
def test_a_scorer_of_one_s_own_that_is_wrong_is_refused(scorer: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gs.topk(MemoryStore(random_rows(20), 20), ASKED, 3, scorer)


def test_exact_gradients_decide_only_scores_that_are_their_products() -> None:
    def nothing(query: int, rows: np.ndarray) -> Exact:
        raise AssertionError

    for scorer in ("trak", Nearest()):
        with pytest.raises(gs.SpecError, match=r"do not decide the scorer .* leave rescore out"):
            gs.topk(store(), ASKED, 3, scorer, rescore=nothing)
    with pytest.raises(gs.SpecError, match=r"do not decide the scorer 'cosine' .* a store of one checkpoint"):
        gs.topk(WORLD.store(checkpoints=3), queries_for("cosine", {"checkpoints": 3}), 3, "cosine", rescore=nothing)
    with pytest.raises(gs.SpecError, match="method is 'ekfac' without a Rescorer"):
        gs.topk(store(), ASKED, 3, "dot", method="ekfac")


def test_queries_may_be_a_store_of_their_own(tmp_path: Path) -> None:
    held = toy_extract(tmp_path / "train.zarr")
    targets = toy_extract(tmp_path / "targets.zarr", toy_batches((3,)), curvature=0)
    batch = {key: value for key, value in toy_batches((3,))[0].items() if key != "ids"}
    captured = gs.Capture(toy_model().eval(), held.spec, "*")(batch, ToyLoss())
    for scorer in ("fisher", "cosine"):
        top = gs.topk(held, targets, 4, scorer)
        expected = gs.topk(held, captured, 4, scorer)
        np.testing.assert_array_equal(top.rows, expected.rows)
        np.testing.assert_allclose(top.scores, expected.scores, rtol=1e-4)
    other = toy_extract(tmp_path / "other.zarr", toy_batches((3,)), curvature=0, model=toy_model(5))
    with pytest.raises(gs.SpecError, match=r"was extracted from another .* than .*train\.zarr"):
        gs.topk(held, other, 4, "dot")
    projected = toy_extract(tmp_path / "spec.zarr", toy_batches((3,)), curvature=0, spec=gs.SketchSpec(dim=64, seed=9))
    with pytest.raises(gs.SpecError, match="features were drawn by"):
        gs.topk(held, projected, 4, "dot")


def test_every_scorer_says_what_it_is() -> None:
    for name, made in SCORERS.items():
        about = made.about  # type: ignore[attr-defined]
        assert about.name == name
        assert all((about.formula, about.needs, about.cost, about.source, about.published))
    instance = SCORERS["trak"](damping=3.0)
    assert scorer_of(instance) is instance
    with pytest.raises(gs.SpecError, match="already made"):
        scorer_of(instance, damping=1.0)
