"""Compaction: what is written answers like its reference, and as well as was said before it was written."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compacted import low_rank, write_store
from stores import features

import gradsift as gs
from gradsift.engine.answers.scan import scan
from gradsift.engine.compaction.axes import principal_axes
from gradsift.engine.compaction.codes import BITS, decode, encode, expand, signs
from gradsift.engine.compaction.finder import Finder
from gradsift.engine.compaction.measure import Recall
from gradsift.engine.compaction.units import units_of
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.extraction.progress import Update

N, DIM = 1500, 128


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> gs.FeatureStore:
    path = tmp_path_factory.mktemp("compact") / "train.zarr"
    return write_store(path, low_rank(N, DIM), curvature=low_rank(300, DIM, seed=1))


@pytest.fixture(scope="module")
def small(train: gs.FeatureStore) -> gs.CompactStore:
    return gs.compact(train, train.path.with_name("train.compact"), bytes=36, progress=False)


@pytest.fixture
def queries() -> torch.Tensor:
    return low_rank(12, DIM, seed=2)


@pytest.mark.parametrize("bits", BITS)
def test_codes_say_what_they_stand_for(bits: int) -> None:
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[3] = 0
    codes, scale = encode(rows, bits)
    assert codes.shape == (50, 64 * bits // 8)
    plain = np.zeros((50, 64))
    for j in range(64):  # bit by bit, from the definition
        for t in range(bits):
            at = j * bits + t
            plain[:, j] += 2**t * ((codes[:, at // 8] >> (at % 8)) & 1)
    plain = (plain - (2**bits - 1) / 2) * scale[:, None].astype(np.float64)
    read = decode(codes, scale, bits).numpy()
    assert np.abs(read - plain).max() <= 1e-6 * np.abs(plain).max()
    assert not read[3].any()
    products = (read * rows.numpy()).sum(axis=1)
    assert np.allclose(products, rows.square().sum(dim=1).numpy(), rtol=1e-5)  # unbiased: <s v, y> = |y|^2
    asked = np.random.default_rng(0).standard_normal((3, 64))
    one_bit = (expand(asked, bits) @ signs(codes).astype(np.float64).T) * scale
    assert np.abs(one_bit - asked @ plain.T).max() <= 1e-5 * np.abs(one_bit).max()


@pytest.mark.parametrize("n", [40, 300])  # fewer rows than numbers, and more
@pytest.mark.parametrize("fisher", [False, True])
def test_axes_are_the_principal_ones(tmp_path: Path, n: int, fisher: bool) -> None:
    dim, held = 64, [1, 5]
    rows, sample = low_rank(n, dim).double(), low_rank(200, dim, seed=1).double()
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64)
    store = write_store(tmp_path / "a.zarr", rows.float(), curvature=sample.float(), block=16)
    found = principal_axes(store, units_of(store), 20, held, weights, fisher)

    used = np.delete(rows.float().double().numpy() * weights.numpy()[:, None], held, axis=0)
    matrix = np.eye(dim)
    if fisher:
        f = Fisher(sample.float(), examples=n)
        matrix = (f.rows.double().T @ f.rows.double() / 200).numpy() + f.damping * np.eye(dim)
    factor = np.linalg.cholesky(matrix)
    whitened = np.linalg.solve(factor, used.T)
    values, vectors = np.linalg.eigh(whitened @ whitened.T / len(used))
    axes = vectors[:, ::-1][:, :20]
    assert len(found) == 20 and found.metric == ("fisher" if fisher else "rows")
    assert np.allclose(found.variance, values[::-1][:20], rtol=1e-5)  # the moment of many rows is in float32
    assert np.allclose(found.encode.T @ found.decode, np.eye(20), atol=1e-9)
    kept = np.abs(np.linalg.solve(factor, found.decode.numpy()).T @ axes)
    assert np.allclose(kept, np.eye(20), atol=2e-3)


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.37), (2, 0.12), (4, 0.0116), (8, 0.0002)])
def test_codes_are_as_good_as_the_best_uniform_ones(bits: int, distortion: float) -> None:
    """Max 1960, table II: mean squared error of 1, 2, 4 bits .3634, .1188, .01154, as least squares would have it."""
    rows = torch.randn(400, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    read = decode(*encode(rows, bits), bits).to(torch.float64)
    cosine = torch.nn.functional.cosine_similarity(rows, read)
    assert float(1 - cosine.square().mean()) <= distortion


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("skipping", [False, True])
def test_faiss_finds_what_the_reference_finds(
    small: gs.CompactStore, queries: torch.Tensor, weighted: bool, together: bool, skipping: bool, monkeypatch: Any
) -> None:
    asked: list[int] = []
    real = Finder.candidates
    monkeypatch.setattr(Finder, "candidates", lambda self, d, n: asked.append(n) or real(self, d, n))
    weights = np.exp(np.random.default_rng(0).standard_normal(N)) if weighted else None
    directions = queries.double()
    reference = small.scan_codes(directions, 10, weights)
    skip = None
    if skipping:
        skip = np.zeros(N, dtype=bool)
        skip[reference.rows[:, ::2]] = True
    reference = small.scan_codes(directions, 10, weights, skip, together)
    found = small.search(directions, 10, weights, skip, together)
    assert asked  # by FAISS, not by the scan that small stores fall back to
    assert found.rows.shape == ((1, 10) if together else (12, 10))
    assert np.array_equal(found.rows, reference.rows)
    assert np.array_equal(found.scores, reference.scores)


def test_candidates_bound_what_was_left_out(small: gs.CompactStore, queries: torch.Tensor) -> None:
    asked = small.axes_maps.turn(queries)
    finder = Finder(small.chunks, small.bits, None)
    rows, ceiling = finder.candidates(asked.numpy(), 5)
    codes, scale = (np.concatenate(column) for column in list(zip(*small.chunks, strict=True))[1:])
    scores = asked.numpy() @ decode(codes, scale, small.bits).double().numpy().T
    for some, bound, all_scores in zip(rows, ceiling, scores, strict=True):
        left = np.delete(all_scores, some)
        assert left.max() <= bound
        assert bound <= all_scores.max()  # and it says something


def test_large_codes_do_not_overflow() -> None:
    """FAISS sums 8-bit tables in 16 bits: over more than 257 of them the best rows would be the ones lost."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (3000, 500), dtype=np.uint8)
    aligned = generator.permutation(3000)[:10]
    codes[aligned] |= codes[::-1][aligned] | codes[1000:2000][aligned % 1000]  # seven bits of eight set
    chunks = [(0, codes, np.ones(3000, dtype=np.float32))]
    asked = 1 + 0.01 * generator.random((1, 4000))
    (rows,), (ceiling,) = Finder(chunks, 1, None).candidates(asked, 12)
    scores = decode(codes, chunks[0][2], 1).double().numpy() @ asked[0]
    assert set(np.argsort(-scores)[:10]) == set(aligned)
    assert set(aligned) <= set(rows)
    assert np.delete(scores, rows).max() <= ceiling < scores[aligned].min()


def test_equal_rows_go_to_the_lower_one(tmp_path: Path) -> None:
    rows = low_rank(1000, 64)
    rows[[700, 650, 30, 999]] = 3 * rows[5]
    store = write_store(tmp_path / "a.zarr", rows)
    compacted = gs.compact(store, tmp_path / "a.compact", scorer="dot", bytes=32, progress=False)
    found = compacted.search(rows[5:6].double(), 4)
    assert found.rows[0].tolist() == [30, 650, 700, 999]
    assert len(set(found.scores[0])) == 1


@pytest.mark.parametrize("scorer", ["fisher", "dot", "cosine"])
@pytest.mark.parametrize("largest", [True, False])
def test_topk_answers_nearly_as_the_whole_store(
    train: gs.FeatureStore, small: gs.CompactStore, queries: torch.Tensor, scorer: str, largest: bool
) -> None:
    whole = gs.topk(train, queries, 10, scorer, largest)
    listed = gs.topk(small, queries, 100, scorer, largest)
    assert listed.scorer == scorer
    assert np.mean([np.isin(a, b).mean() for a, b in zip(whole.rows, listed.rows, strict=True)]) >= 0.97
    order = np.sort(listed.scores, axis=1)
    assert np.array_equal(listed.scores, order[:, ::-1] if largest else order)
    every, coded = (gs.topk(store, queries, N, scorer, largest) for store in (train, small))
    for q in range(len(queries)):
        true, found = (top.scores[q][np.argsort(top.rows[q])] for top in (every, coded))
        assert np.corrcoef(true, found)[0, 1] > 0.9


def test_recall_is_what_it_says(train: gs.FeatureStore, small: gs.CompactStore) -> None:
    said, about = small.recall, small.metadata["compacted"]
    held = about["held"]
    assert said["queries"] == len(held) == 64
    assert said["asked"] == "held-out rows"
    asked = torch.from_numpy(train.features[held])
    whole, coded = gs.topk(train, asked, 101, "fisher").rows, gs.topk(small, asked, 101, "fisher").rows
    alone, listed = [], []
    for own, true, found in zip(held, whole, coded, strict=True):
        true, found = true[true != own][:10], found[found != own]
        alone.append(np.isin(true, found[:10]).mean())
        listed.append(np.isin(true, found[:100]).mean())
    assert said["alone"] == pytest.approx(np.mean(alone), abs=1e-12)
    assert said["listed"] == pytest.approx(np.mean(listed), abs=1e-12)
    assert 0.5 < said["alone"] < said["listed"] <= 1


def test_recall_of_given_queries(train: gs.FeatureStore, queries: torch.Tensor, tmp_path: Path) -> None:
    given = features(queries, train.spec, train.table)
    seen: list[Recall] = []
    made = gs.compact(train, tmp_path / "a", bytes=36, queries=given, report=seen.append, progress=False)
    assert [recall.asked for recall in seen] == ["given"]
    whole, coded = gs.topk(train, given, 10).rows, gs.topk(made, given, 10).rows
    alone = np.mean([np.isin(true, found).mean() for true, found in zip(whole, coded, strict=True)])
    assert seen[0].alone == pytest.approx(alone, abs=1e-12)
    assert made.recall["alone"] == seen[0].alone


def test_held_out_rows_leave_no_trace_in_the_axes(
    train: gs.FeatureStore, small: gs.CompactStore, tmp_path: Path
) -> None:
    rows = torch.from_numpy(train.features[:])
    rows[small.metadata["compacted"]["held"]] *= torch.linspace(-50, 50, 64)[:, None]
    other = write_store(tmp_path / "b.zarr", rows, curvature=train.curvature, norms=torch.ones(N))
    axes = gs.compact(other, tmp_path / "b.compact", bytes=36, progress=False).axes_maps
    assert torch.equal(axes.encode, small.axes_maps.encode)


def test_of_few_rows_the_held_out_ones_are_coded_as_well_as_the_others(tmp_path: Path) -> None:
    rows = low_rank(100, DIM, noise=2.0)
    store = write_store(tmp_path / "a.zarr", rows, curvature=low_rank(300, DIM, seed=1))
    seen: list[Recall] = []
    made = gs.compact(store, tmp_path / "a.compact", bytes=128, report=seen.append, progress=False)
    about = made.metadata["compacted"]
    held = rows[about["held"]]
    assert about["outside"] > 0.2
    assert made.axes_maps.outside(held) < about["outside"] / 4
    assert made.bytes == seen[0].bytes == about["recall"]["bytes"]
    others = np.delete(np.arange(100), about["held"])
    assert made.axes_maps.outside(held) < 3 * made.axes_maps.outside(rows[others]) + 0.01


def test_the_smallest_size_that_reaches_a_recall(
    train: gs.FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = importlib.import_module("gradsift.engine.compaction.compact")
    assert home.SIZES == (64, 96, 128, 192, 256, 384, 512)
    monkeypatch.setattr(home, "SIZES", (6, 8, 12, 20))
    seen: list[Recall] = []
    made = gs.compact(train, tmp_path / "a", recall=0.97, report=seen.append, progress=False)
    assert made.bytes == seen[-1].bytes
    assert len(seen) > 1
    assert seen[-1].listed >= 0.97
    assert all(recall.listed < 0.97 for recall in seen[:-1])
    monkeypatch.setattr(home, "SIZES", (6, 8))
    with pytest.raises(gs.StoreError, match=r"recall@10 .* at 8 bytes, below 1: ask for less, or keep the whole"):
        gs.compact(train, tmp_path / "b", recall=1.0, progress=False)
    assert not (tmp_path / "b").exists()


def test_what_travels_along(train: gs.FeatureStore, small: gs.CompactStore) -> None:
    opened = gs.FeatureStore.open(small.path)
    assert isinstance(opened, gs.CompactStore)
    assert len(opened) == N
    assert list(opened.ids) == list(train.ids)
    for name in ("loss", "grad_norm", "curvature"):
        assert np.array_equal(getattr(opened, name), getattr(train, name)), name
    assert (opened.spec, opened.table, opened.parts) == (train.spec, train.table, train.parts)
    for key in ("fingerprints", "notes", "loss"):
        assert opened.metadata[key] == train.metadata[key]
    assert opened.curvature_draws == train.curvature_draws
    assert opened.bytes == 36 == opened.axes * opened.bits // 8 + 4
    opened.verify()
    import zarr

    assert zarr.open(str(small.path))["codes"].shape == (N, 32)  # type: ignore[index]
    file = small.path / "codes" / "c.0.0"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    whole = file.read_bytes()
    file.write_bytes(damaged)
    with pytest.raises(gs.StoreError, match="truncated or corrupted"):
        opened.verify()
    file.write_bytes(whole)


def test_rows_are_not_there(small: gs.CompactStore, queries: torch.Tensor) -> None:
    for read in (lambda: small.features, lambda: small.blocks(), lambda: gs.topk(small, queries, 3, "datainf")):
        with pytest.raises(gs.StoreError, match="compacted"):
            read()


def test_select_from_a_compacted_store(train: gs.FeatureStore, small: gs.CompactStore, queries: torch.Tensor) -> None:
    few = gs.select(small, queries, 20)
    best = small.scan_codes(_directions(train, queries), 20, together=True)
    assert few.rows.tolist() == best.rows[0].tolist()
    many = gs.select(small, queries, 0.5)
    assert len(set(many.rows.tolist())) == N // 2


def _directions(store: gs.FeatureStore, queries: torch.Tensor) -> torch.Tensor:
    from gradsift.engine.answers.queries import prepare

    directions = prepare(store, queries, "fisher").directions
    assert directions is not None
    return directions


def test_a_rescorer_decides(
    train: gs.FeatureStore, small: gs.CompactStore, queries: torch.Tensor, tmp_path: Path
) -> None:
    from gradsift.engine.answers.rescore import Exact

    rows, directions = torch.from_numpy(train.features[:]).double(), _directions(train, queries)

    def exact(query: int, wanted: np.ndarray) -> Exact:
        scores = rows[torch.from_numpy(wanted)] @ directions[query]
        return Exact(scores, scores[:, None], directions[query].norm())

    whole = gs.topk(train, queries, 10)
    found = gs.topk(small, queries, 10, rescore=exact)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(whole.rows, found.rows, strict=True)]) >= 0.97
    seen: list[Recall] = []
    gs.compact(train, tmp_path / "a", bytes=36, queries=queries, rescore=exact, report=seen.append, progress=False)
    assert seen[0].judge == "exact gradients"
    same = np.mean([np.isin(a, b).mean() for a, b in zip(whole.rows, found.rows, strict=True)])
    assert seen[0].listed == pytest.approx(same, abs=1e-12)


def test_progress_is_reported(train: gs.FeatureStore, tmp_path: Path) -> None:
    updates: list[Update] = []
    gs.compact(train, tmp_path / "a", bytes=36, progress=updates.append)
    assert list(dict.fromkeys(update.stage for update in updates)) == ["axes", "recall at 36 bytes", "codes"]
    assert all(update.total == N for update in updates)
    assert updates[-1].rows == N


def test_metric_of_the_axes(train: gs.FeatureStore, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = gs.compact(train, tmp_path / "dot", bytes=36, scorer="dot", progress=False)
    assert made.metadata["compacted"]["metric"] == "rows"
    gram = made.axes_maps.encode.double().T @ made.axes_maps.decode.double()
    assert torch.allclose(gram, torch.eye(made.axes, dtype=torch.float64), atol=1e-4)
    plain = write_store(tmp_path / "plain.zarr", low_rank(200, 64))
    with caplog.at_level(logging.WARNING):
        made = gs.compact(plain, tmp_path / "plain", bytes=20, progress=False)
    assert "no curvature sample" in caplog.text
    assert made.recall["scorer"] == "dot"


def test_few_axes_take_more_bits(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", low_rank(400, 64, rank=12, noise=0.0))
    made = gs.compact(store, tmp_path / "b", bytes=128, scorer="dot", progress=False)
    assert (made.axes, made.bits, made.bytes) == (12, 8, 16)
    assert made.recall["alone"] > 0.9


def test_no_axis_is_given_up_for_more_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 bytes hold 64 axes in 2 bits, or 40 in 4; what two sizes hold alike is measured once."""
    module = importlib.import_module("gradsift.engine.compaction.compact")
    store = write_store(tmp_path / "a.zarr", torch.randn(400, 64, generator=torch.Generator().manual_seed(0)))
    made = gs.compact(store, tmp_path / "b", bytes=24, scorer="dot", progress=False)
    assert (made.axes, made.bits, made.bytes) == (64, 2, 20)
    real, measured = module.measure, list[Recall]()
    monkeypatch.setattr(module, "SIZES", (24, 28, 96))
    monkeypatch.setattr(module, "measure", lambda *given: replace(real(*given), listed=0.0))
    with pytest.raises(gs.StoreError, match=r"below 0\.9"):
        gs.compact(store, tmp_path / "c", recall=0.9, scorer="dot", report=measured.append, progress=False)
    assert [(each.bits, each.bytes) for each in measured] == [(2, 20), (8, 68)]


def test_four_bits_from_256_bytes_on(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", torch.randn(1200, 1024, generator=torch.Generator().manual_seed(0)))
    for size, axes, bits in ((192, 752, 2), (256, 504, 4)):
        made = gs.compact(store, tmp_path / str(size), bytes=size, scorer="dot", progress=False)
        assert (made.axes, made.bits, made.bytes) == (axes, bits, size)


def test_scan_over_whole_rows_is_the_truth(train: gs.FeatureStore, queries: torch.Tensor, tmp_path: Path) -> None:
    """All axes in 8 bits: what is lost is less than the scores differ."""
    made = gs.compact(train, tmp_path / "a", bytes=132, scorer="dot", bits=8, progress=False)
    assert made.axes == DIM
    norms = np.asarray(train.grad_norm)
    whole = scan(train, queries.double(), 10, norms=norms, memory=1 << 20)
    found = made.search(queries.double(), 10)
    assert np.isin(whole.rows[:, :5], found.rows).mean() > 0.98
    assert np.abs(found.scores - whole.scores).max() < 0.05 * np.abs(whole.scores).max()
