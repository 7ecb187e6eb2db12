"""Retrieval: the same as a dense product, whatever the blocks; refusals; the two steps of sketch and exact scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama, one, padded_batch, with_lora
from stores import TABLE, MemoryStore, dense_order, features, random_rows
from torch import Tensor

import gradsift as gs
from gradsift.engine.answers.queries import prepare
from gradsift.engine.answers.rescore import Exact
from gradsift.engine.capture.features import TableRow
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.losses import language_model

SPEC = gs.SketchSpec(dim=64)


def tied_rows(n: int, dim: int = 64) -> Tensor:
    """Rows that come again, and rows that differ by less than float32 can tell in a product."""
    base = random_rows(max(1, n // 3), dim)
    rows = base[torch.arange(n) % len(base)].clone()
    rows[::5, 0] += 1e-6
    return rows


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 120),
    k=st.integers(1, 140),
    block=st.sampled_from([1, 2, 7, 64, 1000]),
    memory=st.sampled_from([1, 5000, 1 << 20]),
    scorer=st.sampled_from(["dot", "cosine"]),
    largest=st.booleans(),
)
def test_any_block_size_gives_the_bits_of_one_block(
    n: int, k: int, block: int, memory: int, scorer: Any, largest: bool
) -> None:
    rows, queries = tied_rows(n), random_rows(3, seed=1)
    whole = gs.topk(MemoryStore(rows, n), queries, k, scorer, largest)
    cut = gs.topk(MemoryStore(rows, block), queries, k, scorer, largest, memory=memory)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    np.testing.assert_array_equal(cut.scores, whole.scores)
    assert (cut.ids == whole.ids).all()


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
@pytest.mark.parametrize("k", [1, 10, 200, 500])
def test_equals_the_dense_product_in_float64(scorer: Any, k: int) -> None:
    rows, queries = random_rows(200), random_rows(4, seed=1)
    dense = (queries.double() @ rows.double().T).numpy()
    if scorer == "cosine":
        dense /= queries.double().norm(dim=1).numpy()[:, None] * rows.norm(dim=1).double().numpy()
    top = gs.topk(MemoryStore(rows), queries, k, scorer)
    assert top.scores.dtype == np.float64
    assert top.rows.shape == (4, min(k, 200))
    np.testing.assert_array_equal(top.rows, dense_order(dense, k))
    np.testing.assert_allclose(top.scores, np.take_along_axis(dense, top.rows, 1), rtol=1e-12)
    assert top.ids[2, 0] == f"example {top.rows[2, 0]}"


def test_smallest_is_largest_of_the_opposite_query() -> None:
    store, queries = MemoryStore(tied_rows(90)), random_rows(2, seed=1)
    opponents = gs.topk(store, queries, 8, "dot", largest=False)
    mirrored = gs.topk(store, -queries, 8, "dot")
    np.testing.assert_array_equal(opponents.rows, mirrored.rows)
    np.testing.assert_array_equal(opponents.scores, -mirrored.scores)
    assert (np.diff(opponents.scores) >= 0).all()


def test_ties_go_to_the_lower_row() -> None:
    rows = random_rows(1).expand(50, -1).contiguous()
    top = gs.topk(MemoryStore(rows, 3), rows[:1], 12, "dot")
    assert top.rows[0].tolist() == list(range(12))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_order_survives_scales_whose_products_leave_float32(scale: float) -> None:
    rows, queries = random_rows(60), random_rows(2, seed=1)
    plain = gs.topk(MemoryStore(rows), queries, 60, "dot")
    scaled = gs.topk(MemoryStore(rows * scale), queries * scale, 60, "dot")
    np.testing.assert_array_equal(plain.rows, scaled.rows)


def test_a_large_row_does_not_hide_a_small_difference() -> None:
    """The float32 products of these two rows are wrong by more than they differ: float64 must decide."""
    rows = torch.zeros(2, 64)
    rows[:, 0], rows[:, 1], rows[1, 2] = 1e8, -1e8, 1.0
    query = torch.ones(1, 64)
    assert gs.topk(MemoryStore(rows, 1), query, 1, "dot").rows.tolist() == [[1]]
    assert gs.topk(MemoryStore(rows.flip(0), 1), query, 1, "dot").rows.tolist() == [[0]]


def test_cosine_divides_by_the_stored_exact_norms() -> None:
    rows, queries = random_rows(20), random_rows(1, seed=1)
    norms = rows.norm(dim=1) * torch.linspace(0.8, 1.2, 20)
    norms[3] = 0
    top = gs.topk(MemoryStore(rows, norms=norms), features(queries, SPEC), 20, "cosine")
    dense = (queries.double() @ rows.double().T)[0] / norms.double() / queries.norm().double()
    dense[3] = 0
    np.testing.assert_allclose(top.scores[0], dense[top.rows[0]], rtol=1e-6)


def test_unknown_norms_are_measured_for_dot_and_refused_for_cosine() -> None:
    rows, queries = random_rows(20), random_rows(1, seed=1)
    norms = rows.norm(dim=1)
    norms[4] = torch.nan
    store = MemoryStore(rows, norms=norms)
    np.testing.assert_array_equal(
        gs.topk(store, queries, 5, "dot").rows, gs.topk(MemoryStore(rows), queries, 5, "dot").rows
    )
    with pytest.raises(gs.StoreError, match=r"row 4 .* no exact norm"):
        gs.topk(store, queries, 5, "cosine")


def test_a_set_is_the_mean_of_its_gradients() -> None:
    store, queries = MemoryStore(random_rows(40)), random_rows(5, seed=1)
    one = gs.topk(store, features(queries, SPEC), 6, "dot", as_set=True)
    mean = gs.topk(store, queries.double().mean(dim=0, keepdim=True), 6, "dot")
    np.testing.assert_array_equal(one.rows, mean.rows)
    np.testing.assert_allclose(one.scores, mean.scores, rtol=1e-12)


def test_fisher_whitens_the_query_and_says_so() -> None:
    rows, queries, curvature = random_rows(50), random_rows(2, seed=1), random_rows(30, seed=2)
    store = MemoryStore(rows, curvature=curvature)
    top = gs.topk(store, queries, 7)
    whitened = Fisher(curvature, 1.0, 50).solve(queries)
    dense = (whitened @ rows.double().T).numpy()
    assert top.scorer == "fisher"
    np.testing.assert_array_equal(top.rows, dense_order(dense, 7))
    again = gs.topk(store, queries, 7, Fisher(curvature))
    np.testing.assert_array_equal(again.scores, top.scores)


def test_without_curvature_fisher_is_dot_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    store, queries = MemoryStore(random_rows(30), path="train.zarr"), random_rows(1, seed=1)
    with caplog.at_level(logging.WARNING):
        top = gs.topk(store, queries, 4)
    assert top.scorer == "dot"
    assert "'train.zarr' holds no curvature sample" in caplog.text
    np.testing.assert_array_equal(top.rows, gs.topk(store, queries, 4, "dot").rows)


REFUSALS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (
        torch.randn(1, 128),
        {},
        gs.SpecError,
        r"features have dim 128 but 'train\.zarr' holds dim 64: open it with the spec",
    ),
    (features(random_rows(1), gs.SketchSpec(dim=64, seed=3)), {}, gs.SpecError, r'"seed":3.*"seed":0.*store\.spec'),
    (
        features(random_rows(1), SPEC, (TableRow("other.weight", (4, 16)),)),
        {},
        gs.SpecError,
        r"other parameters.*row 0 is other\.weight .* expected layer\.weight",
    ),
    (features(random_rows(1), SPEC, TABLE, "margin"), {}, gs.SpecError, r"loss 'margin' .* 'language_model'"),
    (torch.full((1, 64), torch.nan), {}, gs.ShapeError, "query 0 holds NaN"),
    (torch.zeros(1, 64), {}, gs.ShapeError, "query 0 has a zero gradient"),
    (torch.randn(64), {}, gs.ShapeError, r"shape \(64,\), expected \(q, dim\)"),
    (torch.randn(1, 64), {"k": 0}, gs.ShapeError, "k is 0"),
    (torch.randn(1, 64), {"scorer": "euclid"}, gs.SpecError, "scorer is 'euclid'"),
    (torch.randn(1, 64), {"shortlist": 20}, gs.ShapeError, "give rescore="),
]


@pytest.mark.parametrize(("queries", "arguments", "error", "text"), REFUSALS)
def test_refusals(queries: Any, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    metadata = {"loss": {"kind": "language_model"}}
    store = MemoryStore(random_rows(30), path="train.zarr", spec=SPEC, table=TABLE, metadata=metadata)
    with pytest.raises(error, match=text):
        gs.topk(store, queries, **{"scorer": "dot", **arguments})


def test_a_real_store_answers_and_refuses_what_it_does_not_hold(tmp_path: Path) -> None:
    model, batch = with_lora(llama()), padded_batch(12)
    batches = [{key: value[i : i + 5] for key, value in batch.items()} for i in range(0, 12, 5)]
    path = tmp_path / "train.zarr"
    store = gs.extract(
        model, batches, language_model, path, spec=gs.SketchSpec(dim=256), curvature=12, block=4, progress=False
    )
    capture = gs.Capture(model, store.spec)
    asked = capture(one(batch, 3), language_model)
    for scorer in ("fisher", "cosine"):
        top = gs.topk(store, asked, 3, scorer)  # type: ignore[arg-type]
        assert (top.scorer, top.ids[0, 0]) == (scorer, 3)
    np.testing.assert_allclose(top.scores[0, 0], float(asked.values.norm() / asked.grad_norm) ** 2, rtol=1e-5)

    def other(model: Any, batch: Any) -> Tensor:
        return language_model(model, batch)

    other.kind = "margin"  # type: ignore[attr-defined]
    with pytest.raises(gs.SpecError, match=r"loss 'margin' but '.*train\.zarr' holds those of 'language_model'"):
        gs.topk(store, capture(one(batch, 3), other), 3)
    narrow = gs.Capture(model, store.spec, ["*q_proj"])(one(batch, 3), language_model)
    with pytest.raises(gs.SpecError, match=r"other parameters than .*row 2 is .*q_proj.*expected .*v_proj"):
        gs.topk(store, narrow, 3)


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = random_rows(30)
    rows[17, 5] = torch.nan
    store = MemoryStore(rows, norms=torch.ones(30))
    with pytest.raises(gs.StoreError, match=r"row 17 \(id 'example 17'\)"):
        gs.topk(store, random_rows(1, seed=1), 3, "dot")


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
def test_queries_in_one_group_are_whole_rows(scorer: Any) -> None:
    model, batch = with_lora(llama()), padded_batch(3)
    rows = gs.Capture(model, SPEC, "*layers.0*v_proj")(batch, language_model)
    apart = gs.Capture(model, SPEC, "*layers.0*v_proj", groups="map")(batch, language_model)
    assert apart.values.shape == (3, 1, 64)
    store = MemoryStore(
        rows.values,
        norms=rows.grad_norm,
        spec=SPEC,
        table=rows.table,
        metadata={"loss": {"kind": rows.loss_kind}},
        parts=({"group": apart.groups[0], "checkpoint": None},),
    )
    found, expected = (gs.topk(store, asked, 3, scorer) for asked in (apart, rows))
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


def test_a_scorer_whose_preparation_failed_is_prepared_again() -> None:
    class Half:
        """Keeps what it reads first even where it then fails."""

        def prepare(self, store: Any) -> None:
            self.rows = len(store)
            if self.rows < 5:
                raise gs.StoreError("too few rows")

        def score(self, queries: Any, rows: Any) -> Tensor:
            return torch.full((len(queries.values), len(rows.values)), float(self.rows))

    scorer, large, query = Half(), MemoryStore(random_rows(9)), random_rows(1, seed=1)
    gs.topk(large, query, 1, scorer)
    with pytest.raises(gs.StoreError, match="too few"):
        gs.topk(MemoryStore(random_rows(3)), query, 1, scorer)
    assert gs.topk(large, query, 1, scorer).scores.tolist() == [[9.0]]


def test_an_empty_store_is_refused() -> None:
    with pytest.raises(gs.StoreError, match="holds no rows"):
        gs.topk(MemoryStore(random_rows(0)), random_rows(1), 3, "dot")


def exact_scores(rows: Tensor, queries: Tensor, width: int) -> Any:
    """Exact scores whose tokens are parts of the product."""

    def score(query: int, listed: np.ndarray) -> Exact:
        tokens = (rows[listed].double() * queries[query].double()).unflatten(1, (width, -1)).sum(dim=2)
        return Exact(tokens.sum(dim=1), tokens)

    return score


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
@pytest.mark.parametrize("largest", [True, False])
def test_exact_scores_decide_a_short_list_that_a_noisy_sketch_found(scorer: Any, largest: bool) -> None:
    rows, queries = random_rows(300), random_rows(2, seed=1)
    noisy = MemoryStore(rows + 0.5 * random_rows(300, seed=2), norms=rows.norm(dim=1))
    asked = features(queries, SPEC)
    expected = gs.topk(MemoryStore(rows), asked, 5, scorer, largest)
    plain = gs.topk(noisy, asked, 5, scorer, largest)
    top = gs.topk(noisy, asked, 5, scorer, largest, rescore=exact_scores(rows, queries, 8))
    assert (plain.rows != expected.rows).any()
    np.testing.assert_array_equal(top.rows, expected.rows)
    np.testing.assert_allclose(top.scores, expected.scores, rtol=1e-6)
    assert top.tokens is not None
    assert top.tokens.shape == (2, 5, 8)
    np.testing.assert_allclose(top.tokens.sum(axis=2), top.scores, rtol=1e-12)


def test_the_short_list_is_100_or_ten_times_k_and_never_longer_than_the_store() -> None:
    asked: list[int] = []

    def score(_: int, listed: np.ndarray) -> Exact:
        asked.append(len(listed))
        return Exact(torch.zeros(len(listed)), torch.zeros(len(listed), 1))

    store, query = MemoryStore(random_rows(250)), random_rows(1, seed=1)
    gs.topk(store, query, 3, "dot", rescore=score)
    gs.topk(store, query, 20, "dot", rescore=score)
    gs.topk(store, query, 30, "dot", rescore=score)
    gs.topk(store, query, 3, "dot", rescore=score, shortlist=30)
    assert asked == [100, 200, 250, 30]


def test_re_scoring_that_loses_rows_is_refused() -> None:
    store = MemoryStore(random_rows(50))
    with pytest.raises(gs.ShapeError, match="returned 3 scores for 50 rows"):
        gs.topk(store, random_rows(1), 3, "dot", rescore=lambda *_: Exact(torch.zeros(3), torch.zeros(3, 1)))


def test_lower_matmul_precision_widens_the_bound() -> None:
    before = torch.get_float32_matmul_precision()
    rows, queries = tied_rows(90), random_rows(2, seed=1)
    expected = gs.topk(MemoryStore(rows), queries, 9, "dot")
    try:
        torch.set_float32_matmul_precision("medium")
        top = gs.topk(MemoryStore(rows), queries, 9, "dot")
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(top.rows, expected.rows)


def test_prepared_cosine_queries_keep_their_exact_norm() -> None:
    queries = random_rows(2)
    given = features(queries, SPEC)
    prepared = prepare(MemoryStore(random_rows(5)), given, "cosine")
    assert prepared.queries is not None
    np.testing.assert_allclose(prepared.queries.norms, given.grad_norm.numpy())
