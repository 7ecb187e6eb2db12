"""Columns of a store: zarr arrays whose chunks are blocks of rows, one file each, with its CRC-32C at the end.

A file is complete or absent: it is written beside its place, flushed to the disk and renamed. Bytes on disk are exactly
what zarr-python writes for the same array (format 3, codecs ``bytes`` or ``vlen-utf8``, then ``crc32c``), so any
zarr reader opens them; features are read by mmap because that is an order of magnitude faster than a decoding pipeline.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import google_crc32c  # type: ignore[import-untyped]
import numpy as np

from gradsift.kernels.errors import StoreError

__all__ = ["TEMPORARY", "Column", "group_json", "place", "sync_folder", "write_atomically", "write_beside"]

TEMPORARY = ".tmp"
"""Suffix of a file that is being written; a reader never looks at it and a resumed run removes it."""

_CHECKSUM = 4

_LARGE_PAGE = 2 << 20
"""Larger files ask for large pages: what is then read from disk costs 8 page faults per 16 MiB instead of 256, and a
pass over it a third of the time."""


@dataclass(frozen=True, slots=True)
class Column:
    """One array of a store, of shape (rows, *tail).

    Attributes:
        name: its path inside the store, such as ``"curvature/features"``.
        dtype: a numpy dtype name, or ``"string"`` for UTF-8 text of any length.
        block: rows per chunk. The last chunk is padded with zeros or empty strings, as zarr asks.
        tail: the other axes; a chunk spans them all.
    """

    name: str
    dtype: str
    block: int
    tail: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return (self.block, *self.tail)

    def empty(self) -> np.ndarray:
        """A chunk's worth of padding."""
        if self.dtype == "string":
            return np.full(self.shape, "", dtype=object)
        return np.zeros(self.shape, dtype=self.dtype)

    def file(self, root: Path, index: int) -> Path:
        """Where chunk ``index`` lies."""
        return root / self.name / ".".join(["c", str(index), *["0"] * len(self.tail)])

    def indices(self, root: Path) -> list[int]:
        """Numbers of the chunks that are there, in order."""
        folder = root / self.name
        if not folder.is_dir():
            return []
        found = (name.split(".") for name in os.listdir(folder))  # noqa: PTH208 (a list of names is all it takes)
        return sorted(int(parts[1]) for parts in found if parts[0] == "c" and parts[-1].isdecimal())

    def encode(self, values: np.ndarray) -> list[memoryview]:
        """The bytes of a chunk, checksum last."""
        if self.dtype == "string":
            from numcodecs.vlen import VLenUTF8  # type: ignore[import-untyped]

            body = memoryview(bytes(VLenUTF8().encode(values)))
        else:
            little = np.ascontiguousarray(values, dtype=np.dtype(self.dtype).newbyteorder("<"))
            body = little.reshape(-1).view(np.uint8).data
        return [body, memoryview(_checksum(np.frombuffer(body, np.uint8)))]

    def read(self, root: Path, index: int) -> np.ndarray:
        """Chunk ``index``, checksum verified.

        Raises:
            StoreError: the file is missing, truncated or corrupted.
        """
        data = self._map(root, index)
        self._verify(root, index, data)
        if self.dtype == "string":
            from numcodecs.vlen import VLenUTF8

            return np.asarray(VLenUTF8().decode(data[:-_CHECKSUM].tobytes()), dtype=object)
        return self._view(data)

    def map(self, root: Path, index: int) -> np.ndarray:
        """Chunk ``index`` as a private mapping of its file: nothing is copied, and writing to it changes no file.

        Only the file's size is checked here: with its checksum a pass over data in memory takes three times as long.

        Raises:
            StoreError: the file is missing or truncated.
        """
        return self._view(self._map(root, index))

    def verify(self, root: Path, index: int) -> None:
        """Compare a chunk with its checksum.

        Raises:
            StoreError: the file is missing, truncated or corrupted.
        """
        self._verify(root, index, self._map(root, index))

    def _map(self, root: Path, index: int) -> np.ndarray:
        path = self.file(root, index)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing: {_REPAIR}") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from error
        try:
            size = os.fstat(descriptor).st_size
            expected = self._bytes()
            if size < _CHECKSUM or (expected and size != expected):
                wanted = f"expected {expected}" if expected else "too few for a chunk"
                raise StoreError(f"{path} has {size} bytes, {wanted}: {_REPAIR}")
            mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        if size >= _LARGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without large pages
                mapped.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(mapped, dtype=np.uint8)

    def _bytes(self) -> int:
        if self.dtype == "string":
            return 0
        return prod(self.shape) * np.dtype(self.dtype).itemsize + _CHECKSUM

    def _view(self, data: np.ndarray) -> np.ndarray:
        return data[:-_CHECKSUM].view(np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)

    def _verify(self, root: Path, index: int, data: np.ndarray) -> None:
        if _checksum(data[:-_CHECKSUM]) != data[-_CHECKSUM:].tobytes():
            raise StoreError(f"{self.file(root, index)} is truncated or corrupted, its checksum differs: {_REPAIR}")

    def metadata(self, rows: int) -> bytes:
        """The array's zarr.json when it holds ``rows`` rows, as zarr-python writes it."""
        import zarr
        from zarr.codecs import Crc32cCodec
        from zarr.storage import MemoryStore

        files: dict[str, Any] = {}
        zarr.create_array(
            MemoryStore(files),
            shape=(rows, *self.tail),
            chunks=self.shape,
            dtype=str if self.dtype == "string" else self.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value="" if self.dtype == "string" else 0,
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        return bytes(files["zarr.json"].to_bytes())


_REPAIR = "run the same extract command again to compute that block anew"


def _checksum(data: np.ndarray) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM, "little")


def group_json(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return json.dumps(
        {"attributes": attributes, "zarr_format": 3, "node_type": "group"}, indent=2, ensure_ascii=False
    ).encode()


def write_beside(path: Path, parts: Iterable[bytes | memoryview]) -> Path:
    """Write a file's future content next to it, flushed to the disk; returns where. Nothing is left on failure."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def place(temporary: Path, path: Path) -> None:
    """Rename a finished file to its name: from one instant to the next, for every reader."""
    temporary.replace(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a whole file."""
    place(write_beside(path, [data]), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
