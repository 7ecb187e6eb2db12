"""The store against numpy on the same bytes: writing beside ``numpy.save``, reading beside ``numpy.memmap``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired import FULL, paired

import gradsift as gs
from gradsift.engine.store.format import FORMAT
from gradsift.engine.store.writer import StoreWriter

ROWS, DIM = (65536, 4096) if FULL else (2048, 512)
BLOCK = max(1, (16 << 20) // (4 * DIM))
BATCH = 32
CASE = f"{ROWS} x {DIM} float32"
ROUNDS = 7 if FULL else 3

DESCRIPTION: dict[str, Any] = {
    "format": FORMAT,
    "complete": False,
    "rows": None,
    "block": BLOCK,
    "dtype": "float32",
    "ids": "int64",
    "spec": json.loads(gs.SketchSpec(dim=DIM).to_json()),
    "table": [],
    "parts": [{"dim": DIM}],
    "loss": {"kind": "none", "tokens": False},
    "curvature": None,
    "fingerprints": {},
    "versions": {},
}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder / "rows.zarr", rows)
    write_numpy(folder / "rows.npy", rows)
    forget(folder)
    yield folder
    shutil.rmtree(folder)


def forget(folder: Path) -> None:
    """Drop what the page cache holds of a folder, so that all files are cached as reading caches them.

    Pages cached by writing are as large as memory happened to allow at that moment, and mapping a file costs by their
    number.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_store(path: Path, rows: np.ndarray) -> None:
    """As an extraction does: batch by batch, every block flushed to the disk before it counts."""
    with StoreWriter(path, DESCRIPTION) as store:
        with store.examples() as writer:
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                n = len(part)
                batch = {
                    "features": part[:, None],
                    "loss": np.zeros(n),
                    "grad_norm": np.zeros((n, 1)),
                    "ids": np.arange(first, first + n),
                    "batch_hash": np.zeros((n, 16)),
                    "batch_rows": np.full(n, n),
                }
                writer.append(first, batch)
            writer.finish(len(rows))
        store.finish(len(rows), None)


def write_numpy(path: Path, rows: np.ndarray) -> None:
    """One file, flushed as well."""
    with path.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())


def read_store(path: Path) -> float:
    """Touch every number once, a block at a time."""
    return sum(float(block.sum()) for _, block in gs.FeatureStore.open(path).blocks())


def read_memmap(path: Path) -> float:
    """The same arithmetic on a mapped file."""
    mapped = np.load(path, mmap_mode="c")
    return sum(float(torch.from_numpy(mapped[i : i + BLOCK]).sum()) for i in range(0, len(mapped), BLOCK))


def test_read(benchmark: Any, folder: Path, rows: np.ndarray) -> None:
    store = gs.FeatureStore.open(folder / "rows.zarr")
    assert all(np.array_equal(block.numpy(), rows[i : i + len(block)]) for i, block in store.blocks())
    assert read_store(folder / "rows.zarr") == read_memmap(folder / "rows.npy")
    providers = {
        "numpy.memmap": lambda: read_memmap(folder / "rows.npy"),
        "store": lambda: read_store(folder / "rows.zarr"),
        "store, checksums verified": store.verify,
    }
    paired(benchmark, f"store read, {CASE}", providers, "numpy.memmap", ROUNDS)


@pytest.mark.parametrize("flushed", [True, False], ids=["flushed", "page cache"])
def test_write(benchmark: Any, folder: Path, rows: np.ndarray, flushed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushed, the store waits for the disk seven times per block: an extraction computes meanwhile."""

    def store() -> None:
        shutil.rmtree(folder / "written.zarr", ignore_errors=True)
        write_store(folder / "written.zarr", rows)

    store()
    assert np.array_equal(gs.FeatureStore.open(folder / "written.zarr").features[:], rows)
    if not flushed:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    providers = {"numpy.save": lambda: write_numpy(folder / "written.npy", rows), "store": store}
    case = f"store write, {'flushed' if flushed else 'page cache'}, {CASE}"
    paired(benchmark, case, providers, "numpy.save", 3)
