"""Retrieval over rows with parts: as a dense sum over them, whatever the blocks; cosine with each part's own norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import TABLE, MemoryStore, dense_order, features, random_rows
from torch import Tensor

import gradsift as gs
from gradsift.engine.answers.rescore import Exact
from gradsift.engine.curvature.fisher import Fisher

SPEC = gs.SketchSpec(dim=64)
SCORERS = ["fisher", "dot", "cosine"]
Scorer = Any


def parted(n: int, parts: int = 3, seed: int = 0) -> Tensor:
    """Rows of parts whose lengths differ by orders of magnitude, as those of timesteps do."""
    return random_rows(n * parts, seed=seed).view(n, parts, 64) * 10.0 ** torch.arange(parts)[:, None]


def tied(n: int, parts: int) -> Tensor:
    """Rows that come again, and rows that differ by less than float32 can tell in a product."""
    base = parted(max(1, n // 3), parts)
    rows = base[torch.arange(n) % len(base)].clone()
    rows[::5, 0, 0] += 1e-6
    return rows


def dense(rows: Tensor, queries: Tensor, scorer: Scorer, curvature: Tensor | None = None) -> np.ndarray:
    """The scores' definition, in float64: (q, n)."""
    rows, queries = rows.double(), queries.double()
    if scorer == "cosine":
        lengths = torch.einsum("ik,qk->qik", rows.norm(dim=2), queries.norm(dim=2))
        return (torch.einsum("ikd,qkd->qik", rows, queries) / lengths).mean(dim=2).numpy()
    directions = queries.sum(dim=1)
    if curvature is not None:
        directions = Fisher(curvature.sum(dim=1), 1.0, len(rows)).solve(directions)
    return (directions @ rows.sum(dim=1).T).numpy()


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_equals_the_dense_definition_in_float64(scorer: Scorer, parts: int, k: int) -> None:
    rows, queries, curvature = parted(200, parts), parted(4, parts, seed=1), parted(30, parts, seed=2)
    expected = dense(rows, queries, scorer, curvature if scorer == "fisher" else None)
    top = gs.topk(MemoryStore(rows, curvature=curvature), queries, k, scorer)
    assert top.scorer == scorer
    np.testing.assert_array_equal(top.rows, dense_order(expected, k))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(top.scores, np.take_along_axis(expected, top.rows, 1), rtol=0, atol=1e-6 * scale)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 100),
    block=st.sampled_from([1, 2, 7, 64]),
    memory=st.sampled_from([1, 9000, 1 << 20]),
    parts=st.sampled_from([2, 9]),
    scorer=st.sampled_from(["dot", "cosine"]),
    largest=st.booleans(),
)
def test_any_block_size_gives_the_bits_of_one_block(
    n: int, k: int, block: int, memory: int, parts: int, scorer: Scorer, largest: bool
) -> None:
    rows, queries = tied(n, parts), parted(3, parts, seed=1)
    whole = gs.topk(MemoryStore(rows, n), queries, k, scorer, largest)
    cut = gs.topk(MemoryStore(rows, block), queries, k, scorer, largest, memory=memory)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    np.testing.assert_array_equal(cut.scores, whole.scores)


def test_a_large_part_does_not_hide_a_small_difference_in_another() -> None:
    """Float32 products of these rows are wrong by more than they differ."""
    rows = torch.zeros(2, 2, 64)
    rows[:, 0, 0], rows[:, 0, 1], rows[1, 1, 2] = 1e8, -1e8, 1.0
    query = torch.ones(1, 2, 64)
    assert gs.topk(MemoryStore(rows, 1), query, 1, "dot").rows.tolist() == [[1]]
    assert gs.topk(MemoryStore(rows.flip(0), 1), query, 1, "dot").rows.tolist() == [[0]]


def test_no_part_outweighs_another_in_a_cosine() -> None:
    rows, queries = parted(50), parted(2, seed=1)
    loud = torch.tensor([1e6, 1.0, 1e-3])[:, None]
    plain, scaled = (
        gs.topk(MemoryStore(rows), queries, 50, "cosine"),
        gs.topk(MemoryStore(rows * loud), queries, 50, "cosine"),
    )
    np.testing.assert_array_equal(plain.rows, scaled.rows)
    np.testing.assert_allclose(plain.scores, scaled.scores, atol=1e-6)
    assert (gs.topk(MemoryStore(rows), queries, 50, "dot").rows != plain.rows).any()


def test_cosines_divide_by_the_exact_norms_of_rows_and_query_and_a_part_without_gradient_counts_zero() -> None:
    rows, queries = parted(20), parted(1, seed=1)
    norms = rows.norm(dim=2) * torch.linspace(0.8, 1.2, 60).view(20, 3)
    norms[3, 1] = 0
    asked = features(queries, SPEC)
    longer = 1.1 * asked.grad_norm
    top = gs.topk(MemoryStore(rows, norms=norms), replace(asked, grad_norm=longer), 20, "cosine")
    products = torch.einsum("ikd,kd->ik", rows.double(), queries[0].double())
    cosines = products / (norms.double() * longer[0].double())
    cosines[3, 1] = 0
    np.testing.assert_allclose(top.scores[0], cosines.mean(dim=1)[top.rows[0]], rtol=1e-6)


def test_unknown_norms_are_measured_for_dot_and_refused_for_cosine() -> None:
    rows, queries = parted(20), parted(1, seed=1)
    norms = rows.norm(dim=2)
    norms[4, 1] = torch.nan
    store = MemoryStore(rows, norms=norms)
    plain = gs.topk(MemoryStore(rows), queries, 5, "dot")
    np.testing.assert_array_equal(gs.topk(store, queries, 5, "dot").rows, plain.rows)
    with pytest.raises(gs.StoreError, match=r"row 4 .* no exact norm"):
        gs.topk(store, queries, 5, "cosine")


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_set_is_the_mean_of_its_gradients(scorer: Scorer) -> None:
    store, queries = MemoryStore(parted(40), curvature=parted(9, seed=2)), parted(5, seed=1)
    asked = gs.topk(store, features(queries, SPEC), 6, scorer, as_set=True)
    mean = gs.topk(store, queries.double().mean(dim=0, keepdim=True), 6, scorer)
    np.testing.assert_array_equal(asked.rows, mean.rows)
    np.testing.assert_allclose(asked.scores, mean.scores, rtol=1e-12)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_selection_reduces_the_same_scores(scorer: Scorer, reduce: Any) -> None:
    rows, targets, curvature = parted(120), parted(4, seed=1), parted(30, seed=2)
    expected = dense(rows, targets, scorer, curvature if scorer == "fisher" else None)
    expected = expected.max(axis=0) if reduce == "max" else expected.mean(axis=0)
    for block in (1, 7, 200):
        chosen = gs.select(MemoryStore(rows, block, curvature=curvature), targets, 30, reduce=reduce, scorer=scorer)
        np.testing.assert_array_equal(chosen.rows, dense_order(expected[None], 30)[0])
        np.testing.assert_allclose(chosen.scores, expected[chosen.rows], atol=1e-6 * np.abs(expected).max())


def test_selection_drops_rows_whose_parts_are_all_without_gradient() -> None:
    rows = parted(20)
    rows[4], rows[11, 0] = 0, 0
    chosen = gs.select(MemoryStore(rows, 3), parted(1, seed=1), 19, scorer="cosine")
    assert chosen.dropped.tolist() == [4]
    assert 11 in chosen.rows


def a_store(**attributes: Any) -> MemoryStore:
    return MemoryStore(parted(30), spec=SPEC, table=TABLE, metadata={"loss": {"kind": "in parts"}}, **attributes)


def test_rows_as_capture_gives_them_are_folded_when_the_losses_are_known_to_be_the_same() -> None:
    queries = parted(2, seed=1)
    flat = features(queries.flatten(0, 1), SPEC, TABLE, "in parts")
    for scorer in ("dot", "cosine"):
        folded = gs.topk(a_store(), flat.fold(3), 5, scorer)  # type: ignore[arg-type]
        np.testing.assert_array_equal(gs.topk(a_store(), flat, 5, scorer).scores, folded.scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("queries", "error", "text"),
    [
        (random_rows(6), gs.ShapeError, r"shape \(6, 64\), expected \(q, 3, dim\): .*'train\.zarr' and fold its parts"),
        (features(random_rows(6), SPEC), gs.ShapeError, r"shape \(6, 64\), expected \(q, 3, dim\)"),
        (features(random_rows(7), SPEC, TABLE, "in parts"), gs.ShapeError, r"\(7, 64\), expected 3 rows per example"),
        (features(random_rows(6), SPEC, TABLE, "summed"), gs.SpecError, "loss 'summed' but .* those of 'in parts'"),
        (parted(2, 4), gs.ShapeError, r"shape \(2, 4, 64\), expected \(q, 3, dim\)"),
        (torch.zeros(1, 3, 64), gs.ShapeError, "query 0 has a zero gradient"),
        (torch.full((1, 3, 64), torch.nan), gs.ShapeError, "query 0 holds NaN"),
    ],
)
def test_queries_of_other_parts_are_refused(queries: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        gs.topk(a_store(path="train.zarr"), queries, 3, "dot")


def test_a_store_without_parts_refuses_queries_with_some() -> None:
    with pytest.raises(gs.ShapeError, match=r"shape \(2, 3, 64\), expected \(q, dim\)"):
        gs.topk(MemoryStore(random_rows(30)), parted(2), 3, "dot")


def test_a_row_that_is_not_finite_is_named() -> None:
    rows = parted(30)
    rows[17, 1, 5] = torch.inf
    for scorer in ("dot", "cosine"):
        with pytest.raises(gs.StoreError, match=r"row 17 \(id 'example 17'\)"):
            gs.topk(MemoryStore(rows, norms=torch.ones(30, 3)), parted(1, seed=1), 3, scorer)  # type: ignore[arg-type]


def exact_scores(rows: Tensor, queries: Tensor, summed: bool) -> Any:
    """Exact scores whose positions, 2 x 4 of them, are parts of the product."""

    def score(query: int, listed: np.ndarray) -> Exact:
        chosen, asked = rows[listed].double(), queries[query].double()
        if summed:
            chosen, asked = chosen.sum(dim=1, keepdim=True), asked.sum(dim=0, keepdim=True)
        maps = (chosen * asked).unflatten(2, (2, 4, 8)).sum(dim=4)
        exact = Exact(maps.flatten(2).sum(dim=2), maps)
        return Exact(exact.scores[:, 0], maps[:, 0]) if summed else exact

    return score


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
@pytest.mark.parametrize("largest", [True, False])
def test_exact_scores_decide_a_short_list_that_a_noisy_sketch_found(scorer: Scorer, largest: bool) -> None:
    rows, queries = parted(300), parted(2, seed=1)
    noisy = MemoryStore(rows + 0.5 * parted(300, seed=2), norms=rows.norm(dim=2))
    asked = features(queries, SPEC)
    expected = gs.topk(MemoryStore(rows), asked, 5, scorer, largest)
    top = gs.topk(noisy, asked, 5, scorer, largest, rescore=exact_scores(rows, queries, scorer == "dot"))
    assert (gs.topk(noisy, asked, 5, scorer, largest).rows != expected.rows).any()
    np.testing.assert_array_equal(top.rows, expected.rows)
    np.testing.assert_allclose(top.scores, expected.scores, rtol=1e-6)
    assert top.tokens is not None
    assert top.tokens.shape == (2, 5, 2, 4)
    np.testing.assert_allclose(top.tokens.sum(axis=(2, 3)), top.scores, rtol=1e-9)


def test_exact_scores_of_the_other_kind_are_refused() -> None:
    rows, queries = parted(30), parted(1, seed=1)
    with pytest.raises(gs.ShapeError, match=r"shape \(30,\), expected \(30, 3\): .* one vector per part"):
        gs.topk(MemoryStore(rows), queries, 3, "cosine", rescore=exact_scores(rows, queries, True))
    with pytest.raises(gs.ShapeError, match=r"shape \(30, 3\), expected \(30,\): .* the summed loss"):
        gs.topk(MemoryStore(rows), queries, 3, "dot", rescore=exact_scores(rows, queries, False))


def test_maps_of_different_sizes_are_padded_at_their_ends() -> None:
    sizes: Iterator[tuple[int, int]] = iter([(2, 5), (4, 3)])

    def score(_: int, listed: np.ndarray) -> Exact:
        maps = torch.ones(len(listed), *next(sizes), dtype=torch.float64)
        return Exact(maps.flatten(1).sum(dim=1), maps)

    tokens = gs.topk(MemoryStore(random_rows(30)), random_rows(2, seed=1), 3, "dot", rescore=score).tokens
    assert tokens is not None
    assert tokens.shape == (2, 3, 4, 5)
    assert tokens[0].sum() == 30
    assert tokens[1, :, :4, :3].sum() == 36


def test_folding_keeps_an_example_s_parts_together() -> None:
    flat = features(random_rows(6), SPEC)
    folded = flat.fold(3)
    assert folded.values.shape == (2, 3, 64)
    torch.testing.assert_close(folded.values[1, 0], flat.values[3], rtol=0, atol=0)
    torch.testing.assert_close(folded.grad_norm[1], flat.grad_norm[3:], rtol=0, atol=0)
    assert folded.loss is not None
    assert folded.loss.shape == (2,)
    assert flat.fold(1) is flat
    with pytest.raises(gs.ShapeError, match=r"shape \(6, 64\), expected 4 rows per example"):
        flat.fold(4)
    with pytest.raises(gs.ShapeError, match=r"shape \(2, 3, 64\), expected 2 rows"):
        folded.fold(2)
