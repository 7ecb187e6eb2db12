"""Writing compacted stores: in a folder of another name that is renamed into place; later rows file by file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.engine.compaction.layout import axes_columns, group
from gradsift.engine.compaction.measure import Coding, Tick
from gradsift.engine.compaction.units import Units
from gradsift.engine.store.block_writer import BlockWriter, cannot_write, content_hash
from gradsift.engine.store.columns import Column, group_json, place, sync_folder, write_atomically, write_beside
from gradsift.engine.store.format import read_description, write_description
from gradsift.engine.store.reader import FeatureStore
from gradsift.engine.store.writer import lock
from gradsift.kernels.errors import StoreError

__all__ = ["free", "write_more", "write_whole"]


def free(path: Path) -> None:
    """Refuse a path where something is.

    Raises:
        StoreError: it holds a store, or something else.
    """
    if read_description(path) is not None:
        raise StoreError(f"{path} holds a store already: give another path, or remove that one first")


def write_whole(
    path: Path, store: FeatureStore, units: Units, coding: Coding, description: dict[str, Any], tick: Tick
) -> None:
    """Write a compacted store; until the last step, nothing is at its path.

    Raises:
        StoreError: it cannot be written, or another process is writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with _only(partial):
        try:
            for entry in partial.iterdir():  # of a run that was killed
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            _write_rows(partial, store, units, coding, description, tick)
            _write_axes(partial, coding, description)
            if (store.path / "curvature").is_dir():
                _copy(store.path / "curvature", partial / "curvature")
            write_description(partial, {**description, "rows": len(store), "complete": True})
            partial.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise cannot_write(error, path, "nothing was written") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_more(root: Path, store: FeatureStore, units: Units, coding: Coding, description: dict[str, Any]) -> None:
    """Add the rows of another store behind those that are there.

    Every file is replaced in one step by one that holds more rows, and the description, which says how many count,
    comes last: a reader sees the rows of before or all of them, also when this process is killed.

    Raises:
        StoreError: it cannot be written, another process is writing it, or one has since ``description`` was read.
    """
    columns = group(description)
    rows, more = int(description["rows"]), len(store)
    with _only(root):
        now = read_description(root)
        if now is None or int(now["rows"]) != rows:
            raise StoreError(f"'{root}' is no longer the store of {rows} rows that was opened: append to it once more")
        try:
            for index, filled, values in _filled(root, columns.columns, rows, _coded(store, units, coding)):
                for column in columns.columns:
                    file = column.file(root, index)
                    place(write_beside(file, column.encode(values[column.name])), file)
                marker = np.zeros((1, 3), dtype=np.uint64)
                marker[0, 0] = filled
                encoded = {c.name: c.encode(values[c.name])[0] for c in columns.columns}
                marker[0, 1:] = content_hash([encoded[name] for name in columns.identity])
                file = columns.marker.file(root, index)
                place(write_beside(file, columns.marker.encode(marker)), file)
            _set_lengths(root, description, rows + more)
            write_description(root, {**description, "rows": rows + more})
        except OSError as error:
            raise cannot_write(error, root, f"the {rows} rows before are safe") from error


@contextmanager
def _only(folder: Path) -> Iterator[None]:
    held = lock(folder)
    try:
        yield
    finally:
        os.close(held)


def _write_rows(
    root: Path, store: FeatureStore, units: Units, coding: Coding, description: dict[str, Any], tick: Tick
) -> None:
    with BlockWriter(root, group(description), lambda: None) as writer:
        for first, values in _coded(store, units, coding):
            writer.append(first, values)
            tick(first + len(values["scale"]))
        writer.finish(len(store))
    _set_lengths(root, description, len(store))


def _coded(store: FeatureStore, units: Units, coding: Coding) -> Iterator[tuple[int, dict[str, Any]]]:
    """First row, and every column of some rows."""
    norms = np.asarray(store.grad_norm, dtype=np.float32).reshape(len(store), -1)
    ids = store.ids[:]
    single = {"loss": store.loss, "loss_tokens": store.loss_tokens}
    if store.metadata.get("checkpoints"):
        single["checkpoint_loss"] = store.checkpoint_loss
    for first, block in store.blocks():
        inside = slice(first, first + len(block))
        codes, scale = coding.encode(units.fold(block).flatten(1))
        values = {name: known[inside] for name, known in single.items() if known is not None}
        yield first, {"codes": codes, "scale": scale, "grad_norm": norms[inside], "ids": ids[inside], **values}


def _filled(
    root: Path, columns: tuple[Column, ...], rows: int, coded: Iterator[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """Chunks that new rows make, the last old one included: number, rows in it, and all columns."""
    block = columns[0].block
    index, filled = divmod(rows, block)
    values = {c.name: c.empty() for c in columns}
    if filled:
        for column in columns:
            values[column.name][:filled] = column.read(root, index)[:filled]
    for _, more in coded:
        done, count = 0, len(more["scale"])
        while done < count:
            take = min(count - done, block - filled)
            for name, target in values.items():
                target[filled : filled + take] = more[name][done : done + take]
            filled, done = filled + take, done + take
            if filled == block:
                yield index, filled, values
                index, filled, values = index + 1, 0, {c.name: c.empty() for c in columns}
    if filled:
        yield index, filled, values


def _set_lengths(root: Path, description: Mapping[str, Any], rows: int) -> None:
    columns = group(description)
    for column in columns.columns:
        write_atomically(root / column.name / "zarr.json", column.metadata(rows))
    write_atomically(root / "blocks" / "zarr.json", columns.marker.metadata(-(-rows // columns.columns[0].block)))


def _write_axes(root: Path, coding: Coding, description: Mapping[str, Any]) -> None:
    (root / "axes").mkdir()
    write_atomically(root / "axes" / "zarr.json", group_json({}))
    for column, values in zip(axes_columns(description), (coding.axes.encode, coding.axes.decode), strict=True):
        (root / column.name).mkdir()
        write_atomically(root / column.name / "zarr.json", column.metadata(column.block))
        file = column.file(root, 0)
        place(write_beside(file, column.encode(values.numpy())), file)


def _copy(source: Path, target: Path) -> None:
    """The files of a folder, flushed to the disk."""
    for file in sorted(source.rglob("*")):
        there = target / file.relative_to(source)
        if file.is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            place(write_beside(there, [file.read_bytes()]), there)
