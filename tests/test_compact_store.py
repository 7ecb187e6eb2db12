"""Compacted stores on disk: several parts, rows added later, processes killed in the middle, unusable input."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import signal
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compacted import low_rank, write_store
from killable import INSTANTS, run
from toy import toy_extract, tree

import gradsift as gs
from gradsift.engine.answers.queries import prepare
from gradsift.engine.answers.search import find
from gradsift.engine.compaction.append import append_rows

DIM = 64

Halves = tuple[gs.FeatureStore, gs.FeatureStore]


def parted(n: int, parts: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([low_rank(n, DIM, seed=seed + 10 * part) for part in range(parts)], dim=1)


TIMESTEPS = [{"timestep": t} for t in (100, 500, 900)]
CHECKPOINTS = [{"checkpoint": name, "learning_rate": rate} for name, rate in (("a", 1e-3), ("b", 1e-4))]
NAMES = [{"name": "a"}, {"name": "b"}]


@pytest.mark.parametrize("scorer", ["fisher", "dot"])
def test_timesteps_are_summed(tmp_path: Path, scorer: str) -> None:
    """What "dot" and "fisher" ask of timesteps is their sum: so it is coded, in the bytes of one row."""
    rows, drawn, asked = parted(900, 3), parted(200, 3, seed=1), parted(8, 3, seed=2)
    store = write_store(tmp_path / "a.zarr", rows, curvature=drawn, parts=TIMESTEPS)
    summed = write_store(tmp_path / "b.zarr", rows.sum(dim=1), curvature=drawn.sum(dim=1))
    one, other = (
        gs.compact(s, s.path.with_suffix(".compact"), bytes=36, scorer=scorer, progress=False) for s in (store, summed)
    )
    found, plain = gs.topk(one, asked, 10, scorer), gs.topk(other, asked.sum(dim=1), 10, scorer)
    assert np.array_equal(found.rows, plain.rows)
    whole = gs.topk(store, asked, 10, scorer)
    listed = gs.topk(one, asked, 100, scorer)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(whole.rows, listed.rows, strict=True)]) >= 0.97
    assert one.parts == store.parts
    assert np.array_equal(one.grad_norm, store.grad_norm)
    with pytest.raises(gs.StoreError, match="with the parts of a row summed"):
        gs.topk(one, asked, 10, "cosine")


@pytest.mark.parametrize("scorer", ["fisher", "dot"])
def test_checkpoints_stay_apart(tmp_path: Path, scorer: str) -> None:
    rows, drawn, asked = parted(900, 2), parted(200, 2, seed=1), parted(8, 2, seed=2)
    store = write_store(tmp_path / "a.zarr", rows, curvature=drawn, parts=CHECKPOINTS, checkpoints=NAMES)
    compacted = gs.compact(store, tmp_path / "b", bytes=52, scorer=scorer, progress=False)
    assert compacted.axes_maps.encode.shape == (2 * DIM, compacted.axes)
    whole, listed = gs.topk(store, asked, 10, scorer), gs.topk(compacted, asked, 100, scorer)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(whole.rows, listed.rows, strict=True)]) >= 0.97
    prepared = prepare(compacted, asked, scorer)
    assert prepared.directions is not None
    reference = compacted.scan_codes(prepared.directions, 10)
    assert np.array_equal(find(prepared, 10).rows, reference.rows)
    assert np.array_equal(compacted.checkpoint_loss, store.checkpoint_loss)


def test_weights_by_checkpoint_are_folded_into_directions(tmp_path: Path) -> None:
    """Learning rates times one factor per row are a weight per row; norms of each checkpoint are not."""
    rows = parted(900, 2)
    store = write_store(tmp_path / "a.zarr", rows, parts=CHECKPOINTS, checkpoints=NAMES)
    compacted = gs.compact(store, tmp_path / "b", bytes=52, scorer="dot", progress=False)
    asked = parted(4, 2, seed=2).double()
    own, rates = np.random.default_rng(0).uniform(1, 2, 900), np.array([1e-3, 1e-4])
    found = compacted.search(asked, 10, own[:, None] * rates)
    plain = compacted.search(asked * torch.from_numpy(rates)[:, None], 10, own)
    assert np.array_equal(found.rows, plain.rows)
    assert np.allclose(found.scores, plain.scores, rtol=1e-12)
    with pytest.raises(gs.StoreError, match="weighs the parts of each row by its own norms"):
        compacted.search(asked, 10, np.random.default_rng(0).uniform(1, 2, (900, 2)))
    with pytest.raises(gs.StoreError, match="weighs the parts"):
        gs.compact(store, tmp_path / "c", scorer="cosine", progress=False)
    assert not (tmp_path / "c").exists()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    root = tmp_path_factory.mktemp("halves")
    rows, drawn = low_rank(1000, DIM), low_rank(200, DIM, seed=1)
    one = write_store(root / "one.zarr", rows[:700], curvature=drawn)
    return one, write_store(root / "two.zarr", rows[700:], ids=[f"new {i}" for i in range(300)], block=64)


@pytest.mark.parametrize("block", [700, 64, 1024])
def test_rows_added_later(halves: Halves, tmp_path: Path, block: int, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(importlib.import_module("gradsift.engine.compaction.compact"), "_BLOCK", block)
    one, two = halves
    before = gs.compact(one, tmp_path / "a", bytes=36, progress=False)
    asked = low_rank(6, DIM, seed=3)
    old = before.scan_codes(asked.double(), 700)
    with caplog.at_level(logging.WARNING):
        after = before.append(two)
    assert not caplog.records
    assert (len(before), len(after)) == (700, 1000)
    assert list(after.ids) == [*one.ids, *two.ids]
    assert np.array_equal(after.grad_norm, np.concatenate([one.grad_norm, two.grad_norm]))
    assert np.array_equal(after.loss, np.concatenate([one.loss, two.loss]))
    after.verify()
    found = after.scan_codes(asked.double(), 1000)
    for q in range(6):
        kept = found.rows[q] < 700
        assert np.array_equal(found.rows[q][kept], old.rows[q])
        assert np.array_equal(found.scores[q][kept], old.scores[q])
    assert np.array_equal(after.search(asked.double(), 10).rows, found.rows[:, :10])
    assert np.array_equal(before.search(asked.double(), 10).rows, old.rows[:, :10])  # an open one sees its own rows
    exact = gs.topk(gs.FeatureStore.open(two.path), asked, 5, "dot").rows + 700
    listed = gs.topk(after, asked, 150, "dot").rows
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, listed, strict=True)]) >= 0.95
    added = after.metadata["compacted"]["appended"]
    assert [entry["rows"] for entry in added] == [300]
    with pytest.raises(gs.StoreError, match=r"id 'new 0' .* already"):
        after.append(two)


def test_no_append_writes_over_another(halves: Halves, tmp_path: Path) -> None:
    """Twice from one handle, and from a description that was read before another process was through."""
    one, two = halves
    rows = low_rank(20, DIM, seed=4)
    three = write_store(tmp_path / "three.zarr", rows, ids=[f"third {i}" for i in range(20)])
    opened = gs.compact(one, tmp_path / "a", bytes=36, progress=False)
    opened.append(three)
    after = opened.append(two)
    assert list(after.ids) == [*one.ids, *three.ids, *two.ids]
    assert [entry["rows"] for entry in after.metadata["compacted"]["appended"]] == [20, 300]
    four = write_store(tmp_path / "four.zarr", rows, ids=[f"fourth {i}" for i in range(20)])
    before = tree(tmp_path / "a")
    with pytest.raises(gs.StoreError, match="no longer the store of 700 rows"):
        append_rows(opened.path, opened.metadata, opened.axes_maps, opened.ids, four)
    assert tree(tmp_path / "a") == before


def test_new_rows_outside_the_axes_are_warned_of(halves: Halves, tmp_path: Path, caplog: Any) -> None:
    compacted = gs.compact(halves[0], tmp_path / "a", bytes=16, progress=False)
    rows = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0))
    strange = write_store(tmp_path / "b.zarr", rows, ids=[f"odd {i}" for i in range(50)])
    with caplog.at_level(logging.WARNING):
        after = compacted.append(strange)
    whole = rows.double()
    axes = compacted.axes_maps
    rest = whole - whole @ axes.encode.double() @ axes.decode.double().T
    outside = float(rest.square().sum() / whole.square().sum())
    assert after.metadata["compacted"]["appended"][0]["outside"] == pytest.approx(outside, rel=1e-4)
    assert f"{100 * outside:.0f} % of the length" in caplog.text
    assert "compact all rows anew" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "the sketch was"),
        ({"fingerprints": {"model": "x" * 32, "adapter": "a" * 32}}, "base model's fingerprint"),
        ({"loss": {"kind": "other", "tokens": False, "settings": None}}, "the loss was toy and is now other"),
    ],
)
def test_rows_of_something_else_are_refused(halves: Halves, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    compacted = gs.compact(halves[0], tmp_path / "a", bytes=36, progress=False)
    before = tree(tmp_path / "a")
    other = write_store(tmp_path / "b.zarr", low_rank(20, DIM), ids=[f"x{i}" for i in range(20)], **change)
    with pytest.raises(gs.StoreError, match=words):
        compacted.append(other)
    with pytest.raises(gs.StoreError, match="is compacted, expected a finished store"):
        compacted.append(compacted)
    assert tree(tmp_path / "a") == before


def compact_at(source: Path, path: Path) -> None:
    gs.compact(gs.FeatureStore.open(source), path, bytes=36, progress=False)


def append_at(source: Path, path: Path) -> None:
    gs.CompactStore.open(path).append(gs.FeatureStore.open(source))


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zarr", "numcodecs.vlen", "gradsift.engine.compaction.compact"])
    return context


def ended(context: ForkServerContext, *arguments: Any, **named: Any) -> int | None:
    process = context.Process(target=run, args=arguments, kwargs=named)
    process.start()
    process.join(60)
    code = process.exitcode
    process.close()
    return code


@pytest.mark.parametrize(("instant", "count"), list(zip(INSTANTS, (2, 9, 14), strict=True)))
def test_killed_while_compacting(
    halves: Halves,
    context: ForkServerContext,
    tmp_path: Path,
    instant: str,
    count: int,
) -> None:
    path, work = tmp_path / "a", partial(compact_at, halves[0].path)
    assert ended(context, path, instant, count, extract=work) == -signal.SIGKILL
    assert not path.exists()
    with pytest.raises(gs.StoreError, match="does not exist"):
        gs.FeatureStore.open(path)
    assert ended(context, path, extract=work) == 0
    compact_at(halves[0].path, tmp_path / "b")
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["a", "b"]
    assert tree(path) == tree(tmp_path / "b")


@pytest.mark.parametrize(("instant", "count"), [("half written", 3), ("before rename", 4), ("after rename", 12)])
def test_killed_while_appending(
    halves: Halves,
    context: ForkServerContext,
    tmp_path: Path,
    instant: str,
    count: int,
) -> None:
    one, two = halves
    path, work = tmp_path / "a", partial(append_at, two.path)
    before = gs.compact(one, path, bytes=36, progress=False)
    asked = low_rank(3, DIM, seed=3).double()
    old = before.scan_codes(asked, 10)
    assert ended(context, path, instant, count, extract=work) == -signal.SIGKILL
    now = gs.CompactStore.open(path)
    assert len(now) == 700
    assert np.array_equal(now.scan_codes(asked, 10).rows, old.rows)
    assert ended(context, path, extract=work) == 0
    after = gs.CompactStore.open(path)
    after.verify()
    assert len(after) == 1000
    gs.compact(one, tmp_path / "b", bytes=36, progress=False).append(two)
    assert tree(path) == tree(tmp_path / "b")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_stopped_while_writing(halves: Halves, tmp_path: Path, stop: BaseException) -> None:
    def until_codes(update: Any) -> None:
        if update.stage == "codes" and update.rows:
            raise stop

    with pytest.raises((KeyboardInterrupt, gs.StoreError), match=r"the disk is full|^$"):
        gs.compact(halves[0], tmp_path / "a", bytes=36, progress=until_codes)
    assert not list(tmp_path.iterdir())


def test_unusable_input(halves: Halves, tmp_path: Path) -> None:
    store = halves[0]
    compacted = gs.compact(store, tmp_path / "a", bytes=36, progress=False)
    quiet: dict[str, Any] = {"progress": False}
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: gs.compact(store, tmp_path / "b", 128, 0.9, **quiet), gs.SpecError, "give one of them"),
        (lambda: gs.compact(store, tmp_path / "b", 4, **quiet), gs.SpecError, "bytes is 4, expected 16 to 1024"),
        (lambda: gs.compact(store, tmp_path / "b", recall=95, **quiet), gs.SpecError, "recall is 95, expected a share"),
        (lambda: gs.compact(store, tmp_path / "b", bits=3, **quiet), gs.SpecError, "bits is 3, expected 1, 2, 4 or 8"),
        (lambda: gs.compact(store, tmp_path / "b", scorer="self", **quiet), gs.SpecError, "scores rows alone"),
        (lambda: gs.compact(store, tmp_path / "b", scorer="no", **quiet), gs.SpecError, "scorer is 'no'"),
        (lambda: gs.compact(store, tmp_path / "b", rescore=print, **quiet), gs.SpecError, "give queries="),
        (lambda: gs.compact(store, tmp_path / "a", **quiet), gs.StoreError, "holds a store already"),
        (lambda: gs.compact(store, store.path, **quiet), gs.StoreError, "holds a store already"),
        (lambda: gs.compact(store, tmp_path, **quiet), gs.StoreError, "no gradsift store"),
        (lambda: gs.compact(compacted, tmp_path / "b", **quiet), gs.StoreError, "already: compact '.*one.zarr'"),
        (lambda: gs.CompactStore.open(store.path), gs.StoreError, "is not compacted"),
        (lambda: gs.CompactStore.open(tmp_path / "none"), gs.StoreError, "does not exist"),
        (lambda: compacted.search(torch.ones(1, 32).double(), 3), gs.ShapeError, "directions have 32 numbers"),
    ]
    for work, kind, words in cases:
        with pytest.raises(kind, match=words):
            work()
    few = write_store(tmp_path / "few.zarr", low_rank(9, DIM))
    with pytest.raises(gs.StoreError, match="9 rows with a gradient, too few"):
        gs.compact(few, tmp_path / "b", scorer="dot", **quiet)
    empty = write_store(tmp_path / "empty.zarr", torch.zeros(40, DIM))
    with pytest.raises(gs.StoreError, match="0 rows with a gradient, too few"):
        gs.compact(empty, tmp_path / "b", scorer="dot", **quiet)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "empty.zarr", "few.zarr"]


def test_extracting_into_a_compacted_store_is_refused(tmp_path: Path) -> None:
    store = toy_extract(tmp_path / "a.zarr")
    gs.compact(store, tmp_path / "b", progress=False)
    before = tree(tmp_path / "b")
    with pytest.raises(gs.StoreError, match="it is compacted"):
        toy_extract(tmp_path / "b")
    assert tree(tmp_path / "b") == before


def test_rows_without_a_gradient_score_nothing(tmp_path: Path) -> None:
    rows = low_rank(900, DIM)
    rows[100:120] = 0
    store = write_store(tmp_path / "a.zarr", rows)
    compacted = gs.compact(store, tmp_path / "b", bytes=36, scorer="cosine", progress=False)
    assert not set(compacted.metadata["compacted"]["held"]) & set(range(100, 120))
    found = gs.topk(compacted, low_rank(3, DIM, seed=3), 900, "cosine")
    for row, scores in zip(found.rows, found.scores, strict=True):
        assert set(scores[np.isin(row, np.arange(100, 120))]) == {0.0}
