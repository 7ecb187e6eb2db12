"""FeatureStore: sketched gradients of a whole data set on disk, read by mmap."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import count, takewhile
from os import PathLike
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.capture.features import TableRow
from gradsift.engine.store.block_writer import Group
from gradsift.engine.store.columns import Column
from gradsift.engine.store.format import curvature_columns, example_columns, read_description, table_from
from gradsift.engine.store.half import from_half
from gradsift.kernels.errors import StoreError
from gradsift.kernels.spec import SketchSpec

__all__ = ["FeatureArray", "FeatureStore", "Ids"]


class FeatureArray:
    """The rows of a store as float32, read when they are indexed.

    Index with an integer, a slice, integers or booleans along the first axis, then as numpy does along the
    others. The result is a numpy array of your own; a slice inside one block shares the pages of its file
    until it is written to.

    Attributes:
        shape: (n, dim), or (n, parts, dim) for several parts.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, root: Path, group: Group, prefix: str, rows: int) -> None:
        columns = {column.name.removeprefix(prefix): column for column in group.columns}
        self._root = root
        self._values = columns["features"]
        self._scale = columns.get("scale")
        self._block = self._values.block
        self._one_part = self._values.tail[0] == 1
        self.shape = (rows, *self._values.tail[1 if self._one_part else 0 :])

    @property
    def ndim(self) -> int:
        """2, or 3 with several parts."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        single = isinstance(rows, int | np.integer)
        values = self._rows(rows)
        selected = values[(slice(None), *rest)] if rest else values
        return np.asarray(selected[0] if single else selected)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def _rows(self, rows: Any) -> np.ndarray:
        n = len(self)
        if isinstance(rows, slice):
            start, stop, step = rows.indices(n)
            if step == 1:
                return self.between(start, max(start, stop))
            rows = np.arange(start, stop, step)
        index = np.atleast_1d(np.asarray(rows))
        if index.dtype == bool:
            if index.shape != (n,):
                raise IndexError(f"a mask of shape {index.shape} cannot index {n} rows")
            index = np.flatnonzero(index)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            raise IndexError("rows are indexed by an integer, a slice, or a list of integers or booleans")
        index = np.where(index < 0, index + n, index).astype(np.int64)
        if index.size and (index.min() < 0 or index.max() >= n):
            raise IndexError(f"row {rows} is out of range for {n} rows")
        out = np.empty((len(index), *self.shape[1:]), dtype=np.float32)
        for block in np.unique(index // self._block):
            places = np.flatnonzero(index // self._block == block)
            out[places] = self._decode(int(block), index[places] - block * self._block)
        return out

    def between(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop)."""
        first, last = start // self._block, (stop - 1) // self._block
        if stop <= start:
            return np.empty((0, *self.shape[1:]), dtype=np.float32)
        if first == last:
            return self._decode(first, slice(start - first * self._block, stop - first * self._block))
        out = np.empty((stop - start, *self.shape[1:]), dtype=np.float32)
        for block in range(first, last + 1):
            begin, end = max(start, block * self._block), min(stop, (block + 1) * self._block)
            rows = slice(begin - block * self._block, end - block * self._block)
            out[begin - start : end - start] = self._decode(block, rows)
        return out

    def _decode(self, block: int, rows: Any) -> np.ndarray:
        values = self._values.map(self._root, block)[rows]
        if self._scale is not None:
            values = from_half(values, self._scale.map(self._root, block)[rows])
        return np.asarray(values[:, 0] if self._one_part else values)


class Ids(Sequence[Any]):
    """The ids of a store, read block by block: ``ids[3]``, ``ids[10:20]``, ``ids[[4, 2]]``, iteration."""

    def __init__(self, root: Path, column: Column, rows: int) -> None:
        self._root = root
        self._column = column
        self._rows = rows
        self._chunk = lru_cache(maxsize=8)(lambda block: column.read(root, block))

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, key: Any) -> Any:
        """One id (text or int), or an array of them (int64, or objects that are text)."""
        if isinstance(key, int | np.integer):
            row = int(key) + self._rows * (int(key) < 0)
            if not 0 <= row < self._rows:
                raise IndexError(f"row {int(key)} is out of range for {self._rows} rows")
            block, place = divmod(row, self._column.block)
            value = self._chunk(block)[place]
            return value if isinstance(value, str) else int(value)
        rows = np.arange(self._rows)[key if isinstance(key, slice) else np.asarray(key)]
        out = np.empty(rows.shape, dtype=object if self._column.dtype == "string" else np.int64)
        for place, wanted in enumerate(rows.flat):
            out.flat[place] = self[int(wanted)]
        return out

    def __iter__(self) -> Iterator[Any]:
        for block in range(-(-self._rows // self._column.block)):
            values = self._chunk(block)[: self._rows - block * self._column.block]
            yield from values.tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class FeatureStore:
    """One row per example of a data set, with the table that says what it is a row of.

    Open one with ``FeatureStore.open``; ``extract`` makes them. Any zarr reader can open the path as well:
    ``zarr.open(path)["features"]`` has shape (n, parts, dim) and, for float16 stores, is to be multiplied
    by ``scale``.

    Attributes:
        path: its folder.
        metadata: the description in the root's attributes.
        spec: the projection.
        table: the captured parameters.
        parts: what each part of a row is, such as ``{"timestep": 125, ...}``; one of them for most losses.
        complete: whether the extraction came to its end.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], rows: int) -> None:
        self.path = path
        self.metadata = metadata
        self.spec = SketchSpec.from_json(json.dumps(metadata["spec"]))
        self.table: tuple[TableRow, ...] = table_from(metadata["table"])
        self.parts: tuple[dict[str, Any], ...] = tuple(metadata["parts"])
        self.complete = bool(metadata["complete"])
        self._rows = rows
        self._group = example_columns(metadata)

    @classmethod
    def open(cls, path: str | PathLike[str], *, unfinished: bool = False) -> Self:
        """Open a store for reading; only its description is read. A compacted one is opened as a ``CompactStore``.

        Args:
            path: the folder that ``extract`` or ``compact`` wrote.
            unfinished: also open one whose extraction has not ended; it has the rows committed so far.

        Raises:
            StoreError: nothing is there, it is no store, or it is unfinished.
        """
        root = Path(path)
        metadata = read_description(root)
        if metadata is None:
            raise StoreError(f"{root} does not exist or is empty: expected a store made by gradsift extract")
        if metadata.get("compacted"):
            from gradsift.engine.compaction.store import CompactStore

            return cast(Self, CompactStore.open(root))
        if metadata["complete"]:
            return cls(root, metadata, int(metadata["rows"]))
        done = example_columns(metadata).committed(root)
        rows = sum(done[i] for i in takewhile(done.__contains__, count()))
        if not unfinished:
            raise StoreError(
                f"{root} is unfinished, {rows} rows are there: run the same extract command again to finish it"
            )
        return cls(root, metadata, rows)

    def __len__(self) -> int:
        return self._rows

    def __repr__(self) -> str:
        state = "" if self.complete else ", unfinished"
        return f"FeatureStore({str(self.path)!r}, {len(self)} rows, dim {self.spec.dim}{state})"

    @cached_property
    def features(self) -> FeatureArray:
        """The sketched gradients, shape (n, dim), or (n, parts, dim) for several parts."""
        return FeatureArray(self.path, self._group, "", self._rows)

    @cached_property
    def ids(self) -> Ids:
        """What each example is called, n of them; row numbers when the data had no ids."""
        return Ids(self.path, self._column("ids"), self._rows)

    @cached_property
    def loss(self) -> np.ndarray:
        """Loss of each example, summed over the loss's parts, float32 of shape (n,); at the last checkpoint."""
        return self._read("loss")

    @cached_property
    def checkpoint_loss(self) -> np.ndarray | None:
        """Loss of each example at every checkpoint, float32 of shape (n, checkpoints); None without checkpoints."""
        return self._read("checkpoint_loss") if self.metadata.get("checkpoints") else None

    @cached_property
    def loss_tokens(self) -> np.ndarray | None:
        """Tokens of each example that carry loss, int64 of shape (n,); None when the loss does not count them."""
        return self._read("loss_tokens") if self.metadata["loss"]["tokens"] else None

    @cached_property
    def grad_norm(self) -> np.ndarray:
        """Exact norm of each gradient before sketching, float32 of shape (n,), or (n, parts); NaN where unknown.

        With Adam (``metadata["preconditioner"]``), the norm of the update.
        """
        norms = self._read("grad_norm")
        return norms[:, 0] if norms.shape[1] == 1 else norms

    @cached_property
    def curvature(self) -> Tensor | None:
        """Sketched gradients of labels sampled from the model; None when there are none.

        float32, shape (N, dim), or (N, parts, dim) for several parts.
        """
        rows = (self.metadata["curvature"] or {}).get("rows")
        if not rows:
            return None
        array = FeatureArray(self.path, curvature_columns(self.metadata), "curvature/", rows)
        return torch.from_numpy(array[:])

    @cached_property
    def curvature_draws(self) -> list[tuple[Any, int]]:
        """Of each curvature row the id of its example, and which draw of that example's labels it is."""
        rows = int((self.metadata["curvature"] or {}).get("rows") or 0)
        group = curvature_columns(self.metadata)
        ids, draws = (next(c for c in group.columns if c.name == f"curvature/{name}") for name in ("ids", "draw"))
        chunks = range(-(-rows // ids.block))
        return [
            pair
            for i in chunks
            for pair in zip(ids.read(self.path, i).tolist(), draws.read(self.path, i).tolist(), strict=True)
        ][:rows]

    @property
    def mapped(self) -> bool:
        """Whether ``blocks()`` hands out rows of mapped files: float32 ones; float16 ones are decoded into copies."""
        return bool(self._column("features").dtype == "float32")

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Stream all rows once.

        Args:
            rows: rows at a time; the store's own blocks unless given, which are mapped and not copied.

        Yields:
            first row, and float32 of shape (rows, dim), or (rows, parts, dim) for several parts; the last one may
            have fewer. Writing to it is allowed and changes nothing on disk.
        """
        step = rows or int(self.metadata["block"])
        for start in range(0, self._rows, step):
            yield start, torch.from_numpy(self.features.between(start, min(start + step, self._rows)))

    def verify(self) -> None:
        """Read everything once and compare it with its checksums.

        Raises:
            StoreError: a file is missing, truncated or corrupted; the text names the first.
        """
        groups = [(self._group, self._rows)]
        if self.metadata["curvature"] and self.complete:
            groups.append((curvature_columns(self.metadata), int(self.metadata["curvature"]["rows"])))
        for group, rows in groups:
            for index in range(-(-rows // group.columns[0].block)):
                group.verify(self.path, index)

    def _column(self, name: str) -> Column:
        return next(column for column in self._group.columns if column.name == name)

    def _read(self, name: str) -> np.ndarray:
        column = self._column(name)
        chunks = [column.read(self.path, i) for i in range(-(-self._rows // column.block))]
        if not chunks:
            return np.zeros((0, *column.tail), dtype=column.dtype)
        return np.concatenate(chunks)[: self._rows].astype(column.dtype, copy=False)
