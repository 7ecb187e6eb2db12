"""The store as a reader sees it: zarr's own view, indexing, streaming, and every kind of damage in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from toy import ROWS, SPEC, expected, toy_batches, toy_extract, tree

import gradsift as gs
from gradsift.engine.store.columns import Column
from gradsift.engine.store.half import from_half, to_half


@pytest.fixture(scope="module", autouse=True)
def _fast_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "toy.zarr"
    toy_extract(path)
    return path


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "toy.zarr"))


def test_holds_what_capture_gives(original: Path) -> None:
    store = gs.FeatureStore.open(original)
    assert len(store) == len(store.features) == ROWS
    assert store.features.shape == (ROWS, SPEC.dim)
    assert store.features.dtype == np.float32
    np.testing.assert_array_equal(np.asarray(store.features), expected())
    assert list(store.ids) == [f"é{i}" for i in range(ROWS)]
    assert store.spec == SPEC
    assert [row.name for row in store.table] == ["0.weight", "3.weight"]
    assert store.loss.shape == store.grad_norm.shape == (ROWS,)
    assert store.loss_tokens is not None
    assert store.loss_tokens.tolist() == [int(y) + 1 for batch in toy_batches() for y in batch["y"]]
    assert store.metadata["loss"]["kind"] == "toy"
    store.verify()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ids", ["text", "int", None])
def test_plain_zarr_reads_the_same(tmp_path: Path, dtype: str, ids: str | None) -> None:
    store = toy_extract(tmp_path / "a.zarr", toy_batches(ids=ids), dtype=dtype)
    group: Any = zarr.open(tmp_path / "a.zarr", mode="r")
    features = group["features"][:].astype(np.float32)
    curvature = group["curvature/features"][:].astype(np.float32)
    if dtype == "float16":
        features *= group["scale"][:][..., None]
        curvature *= group["curvature/scale"][:][..., None]
    np.testing.assert_array_equal(features[:, 0], store.features[:])
    assert store.curvature is not None
    np.testing.assert_array_equal(curvature[:, 0], store.curvature.numpy())
    assert group["ids"][:].tolist() == list(store.ids)
    np.testing.assert_array_equal(group["loss"][:], store.loss)
    np.testing.assert_array_equal(group["grad_norm"][:, 0], store.grad_norm)
    np.testing.assert_array_equal(group["loss_tokens"][:], store.loss_tokens)
    assert int(group["blocks"][:, 0].sum()) == ROWS
    assert group.attrs["gradsift"] == store.metadata


def test_zarr_writes_the_same_bytes(tmp_path: Path) -> None:
    for dtype, values in [
        ("float32", np.arange(24, dtype=np.float32).reshape(6, 4)),
        ("string", np.array(["a", "", "éé", "日本", "x" * 300, "b"], dtype=object)),
    ]:
        column = Column(dtype, dtype, block=6, tail=values.shape[1:])
        folder = tmp_path / dtype
        folder.mkdir()
        (folder / "zarr.json").write_bytes(column.metadata(6))
        zarr.open_array(folder, mode="r+")[:] = values
        assert column.file(tmp_path, 0).read_bytes() == b"".join(column.encode(values))
        np.testing.assert_array_equal(column.read(tmp_path, 0), values)


def test_float16_keeps_tiny_rows(tmp_path: Path) -> None:
    exact = toy_extract(tmp_path / "a.zarr").features[:]
    half = toy_extract(tmp_path / "b.zarr", dtype="float16").features[:]
    error = np.linalg.norm(half - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < 2**-11


@given(
    arrays.arrays(np.float32, (3, 5), elements=st.floats(-1, 1, width=32)),
    st.integers(-120, 120),
)
@settings(max_examples=60, deadline=None)
def test_half_is_within_its_bound(rows: np.ndarray, exponent: int) -> None:
    rows = np.ldexp(rows, exponent).astype(np.float32)
    half, scale = to_half(rows)
    assert np.isfinite(half).all()
    largest = np.abs(rows.astype(np.float64)).max(axis=-1, keepdims=True)
    error = np.abs(from_half(half, scale).astype(np.float64) - rows)
    assert (error <= np.abs(rows.astype(np.float64)) * 2**-11 + largest * 2**-39 + 2.0**-149).all()


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        np.int64(9),
        slice(None),
        slice(3, 5),
        slice(6, 18),
        slice(30, 3, -4),
        slice(5, 5),
        slice(9, 2),
        [3, 39, 0, 3, -2],
        np.array([7, 8]),
        np.arange(ROWS) % 3 == 0,
        [],
        (slice(2, 20), slice(0, 4)),
        (4, 5),
        ([1, 9], 3),
    ],
    ids=str,
)
def test_indexing_is_numpys(original: Path, key: Any) -> None:
    store = gs.FeatureStore.open(original)
    whole = expected()
    index = np.array(key, dtype=int) if isinstance(key, list) and not key else key
    np.testing.assert_array_equal(store.features[key], whole[index])
    assert store.features[key].dtype == np.float32


def test_index_errors(original: Path) -> None:
    store = gs.FeatureStore.open(original)
    for key in (ROWS, -ROWS - 1, [0, ROWS], np.ones(3, dtype=bool), "x", 1.5, [[1]]):
        with pytest.raises(IndexError):
            store.features[key]
    with pytest.raises(IndexError, match=f"row {ROWS} is out of range"):
        store.ids[ROWS]


def test_ids_index(original: Path) -> None:
    ids = gs.FeatureStore.open(original).ids
    assert ids[0] == "é0" and ids[-1] == f"é{ROWS - 1}" and len(ids) == ROWS
    assert ids[6:10].tolist() == ["é6", "é7", "é8", "é9"]
    assert ids[np.array([[3, 1], [39, 0]])].tolist() == [["é3", "é1"], ["é39", "é0"]]
    assert "é17" in ids


@pytest.mark.parametrize("rows", [None, 1, 3, 8, 11, 1000])
def test_blocks_cover_every_row_once(original: Path, rows: int | None) -> None:
    store = gs.FeatureStore.open(original)
    starts, parts = zip(*store.blocks(rows), strict=True)
    assert all(part.dtype == torch.float32 and part.shape[1] == SPEC.dim for part in parts)
    assert list(starts) == np.cumsum([0, *map(len, parts)])[:-1].tolist()
    np.testing.assert_array_equal(torch.cat(parts).numpy(), expected())


def test_writing_to_a_block_changes_nothing(original: Path) -> None:
    before = tree(original)
    store = gs.FeatureStore.open(original)
    for _, part in store.blocks():
        part.zero_()
    store.features[2:4][:] = 0
    assert tree(original) == before
    np.testing.assert_array_equal(store.features[:], expected())


def test_several_parts(copied: Path) -> None:
    """Two checkpoints side by side, as any later writer may lay them out."""
    attributes = json.loads((copied / "zarr.json").read_text())
    description = attributes["attributes"]["gradsift"]
    description["parts"] = [{**description["parts"][0], "dim": 32}] * 2
    (copied / "zarr.json").write_text(json.dumps(attributes))
    store = gs.FeatureStore.open(copied)
    assert store.features.shape == (ROWS, 2, 32)
    np.testing.assert_array_equal(store.features[5:20], expected()[5:20].reshape(15, 2, 32))


@pytest.mark.parametrize(
    "name", ["features/c.2.0.0", "loss/c.2", "ids/c.2", "curvature/features/c.1.0.0", "blocks/c.2.0"]
)
@pytest.mark.parametrize("damage", ["truncated", "corrupted", "missing"])
def test_damage_is_named_and_repaired(copied: Path, name: str, damage: str) -> None:
    whole = tree(copied)
    file = copied / name
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(whole[name][:-7])
    else:
        middle = len(whole[name]) // 2
        file.write_bytes(whole[name][:middle] + bytes([whole[name][middle] ^ 1]) + whole[name][middle + 1 :])
    words = {"truncated": "bytes, expected|truncated", "corrupted": "corrupted", "missing": "is missing"}[damage]
    with pytest.raises(gs.StoreError, match=rf"{re.escape(str(file))}.*({words})"):
        gs.FeatureStore.open(copied).verify()
    toy_extract(copied)
    assert tree(copied) == whole


def test_truncated_chunk_is_refused_while_reading(copied: Path) -> None:
    file = copied / "features/c.1.0.0"
    file.write_bytes(file.read_bytes()[:100])
    store = gs.FeatureStore.open(copied)
    np.testing.assert_array_equal(store.features[0:8], expected()[:8])
    with pytest.raises(gs.StoreError, match=r"c\.1\.0\.0 has 100 bytes, expected 2052: run the same extract"):
        store.features[8]


def test_a_block_of_another_extraction_is_noticed(copied: Path, tmp_path: Path) -> None:
    batches = toy_batches()
    batches[2]["ids"][0] = "other"
    other = toy_extract(tmp_path / "other.zarr", batches)
    shutil.copy(other.path / "ids/c.1", copied / "ids/c.1")
    with pytest.raises(gs.StoreError, match=r"block 1 of .* mixes files of different extractions"):
        gs.FeatureStore.open(copied).verify()


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(gs.StoreError, match="does not exist or is empty"):
        gs.FeatureStore.open(tmp_path / "no.zarr")
    with pytest.raises(gs.StoreError, match="does not exist or is empty"):
        gs.FeatureStore.open(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(gs.StoreError, match=r"holds something that is no gradsift store \(thesis.tex\)"):
        gs.FeatureStore.open(tmp_path)
    with pytest.raises(gs.StoreError, match="is not a folder"):
        gs.FeatureStore.open(tmp_path / "thesis.tex")
    zarr.create_array(tmp_path / "foreign.zarr", shape=(3,), dtype="float32")
    with pytest.raises(gs.StoreError, match="no gradsift store"):
        gs.FeatureStore.open(tmp_path / "foreign.zarr")


def test_later_format_is_refused(copied: Path) -> None:
    text = (copied / "zarr.json").read_text().replace('"format": 1', '"format": 2')
    (copied / "zarr.json").write_text(text)
    with pytest.raises(gs.StoreError, match="store format 2 and this gradsift reads format 1"):
        gs.FeatureStore.open(copied)
