"""BlockWriter: rows go in one by one, whole blocks go to disk, on a thread of its own.

A block is committed in three steps: every column's file is written beside its place and flushed; all are renamed; last,
the marker is renamed into place. The marker is itself a chunk of a small zarr array, ``blocks``, that holds the
number of rows and a content hash of the block's examples. A process that is killed between any two steps leaves a block
without a marker, which the next run computes again, to the same bytes. Renames reach the disk in any order when the
power is cut; so the next run reads every committed block and compares it with its checksums and its marker.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from gradsift.engine.store.columns import TEMPORARY, Column, place, write_atomically, write_beside
from gradsift.kernels.errors import StoreError

__all__ = ["BlockWriter", "Group", "cannot_write", "content_hash"]

logger = logging.getLogger(__name__)

_QUEUED = 1
"""Blocks that wait for the disk beside the one being written and the one being filled."""


class Group(NamedTuple):
    """Columns that are committed together.

    Attributes:
        columns: they share their number of rows per block.
        identity: names of those columns that say which examples a block holds; the marker hashes them.
        marker: uint64 of shape (blocks, 3): rows, and the two words of the hash.
    """

    columns: tuple[Column, ...]
    identity: tuple[str, ...]
    marker: Column

    def committed(self, root: Path) -> dict[int, int]:
        """Rows of every committed block."""
        return {i: int(self.marker.read(root, i)[0, 0]) for i in self.marker.indices(root)}

    def verify(self, root: Path, index: int) -> None:
        """Check all files of one block.

        Raises:
            StoreError: one is missing, truncated or corrupted, or they are not of the same block.
        """
        marker = self.marker.read(root, index)[0]
        blocks = {}
        for column in self.columns:
            column.verify(root, index)
            if column.name in self.identity:
                blocks[column.name] = column.encode(column.read(root, index))[0]
        if not np.array_equal(marker[1:], content_hash([blocks[name] for name in self.identity])):
            raise StoreError(
                f"block {index} of {root} mixes files of different extractions: "
                "run the same extract command again to compute that block anew"
            )


def content_hash(parts: Sequence[memoryview]) -> np.ndarray:
    """Two uint64 words of blake2b over the identity columns of a block."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)


def cannot_write(error: OSError, path: Path, safe: str) -> StoreError:
    """The one sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"the disk is full while writing {path} ({safe}): free some space and run the same command again"
        )
    return StoreError(
        f"{path} cannot be written ({error.strerror or error}; {safe}): "
        "see that this user may write there, and run the same command again"
    )


class BlockWriter:
    """Writes the rows of a group; a context manager.

    Rows that belong to blocks committed earlier are skipped. Host memory: three blocks.

    Args:
        root: the store.
        group: what a row is made of.
        before_repair: called before a damaged block's marker is taken away.

    Attributes:
        committed: rows of every block that is on disk already.
    """

    def __init__(self, root: Path, group: Group, before_repair: Callable[[], None]) -> None:
        self._root = root
        self._group = group
        self._block = group.columns[0].block
        try:
            self.committed = self._recover(before_repair)
        except OSError as error:
            raise cannot_write(error, root, "nothing was changed") from error
        self._filling: dict[str, np.ndarray] = {}
        self._index = -1
        self._filled = 0
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[int, int, dict[str, np.ndarray]] | None] = queue.Queue(_QUEUED)
        self._thread = threading.Thread(target=self._work, name="gradsift-writer", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let whole blocks reach the disk, then stop; a half-filled one is dropped."""
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._check()

    def needs(self, first: int, last: int) -> bool:
        """Whether any of the rows [first, last) is not on disk yet."""
        return any(i not in self.committed for i in range(first // self._block, -(-last // self._block)))

    def stored(self, column: Column, rows: int) -> Iterator[np.ndarray]:
        """One column of the first ``rows`` rows that were appended or committed, block by block."""
        self._queue.join()
        self._check()
        for index in range(-(-rows // self._block)):
            values = column.read(self._root, index) if index in self.committed else self._filling[column.name]
            yield values[: rows - index * self._block]

    def append(self, first: int, rows: Mapping[str, Any]) -> None:
        """Add rows [first, first + n), in order.

        Args:
            rows: for each column by name, n rows.

        Raises:
            StoreError: an earlier block could not be written.
        """
        self._check()
        n = len(rows[self._group.columns[0].name])
        done = 0
        while done < n:
            index, offset = divmod(first + done, self._block)
            take = min(n - done, self._block - offset)
            if index not in self.committed:
                if index != self._index:
                    self._filling = {c.name: c.empty() for c in self._group.columns}
                    self._index = index
                for name, target in self._filling.items():
                    target[offset : offset + take] = rows[name][done : done + take]
                self._filled = offset + take
                if self._filled == self._block:
                    self._hand_over()
            done += take

    def finish(self, rows: int) -> None:
        """Write the last, partial block and wait for all.

        Raises:
            StoreError: a block could not be written.
        """
        if self._index >= 0 and self._filled:
            self._hand_over()
        self._queue.join()
        self._check()
        missing = [i for i in range(-(-rows // self._block)) if i not in self.committed]
        if missing:
            raise AssertionError(f"blocks {missing} were never filled")

    def _hand_over(self) -> None:
        self._queue.put((self._index, self._filled, self._filling))
        self._filling, self._index, self._filled = {}, -1, 0

    def _check(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        broken = False
        while (item := self._queue.get()) is not None:
            try:
                if not broken:
                    self._commit(*item)
            except BaseException as error:
                broken = True
                self._failure = self._explain(error)
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _explain(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        safe = f"the {sum(self.committed.values())} rows before are safe"
        return cannot_write(error, self._root, safe)

    def _commit(self, index: int, rows: int, values: dict[str, np.ndarray]) -> None:
        written: list[tuple[Path, Path]] = []
        identity: dict[str, memoryview] = {}
        try:
            for column in self._group.columns:
                parts = column.encode(values[column.name])
                if column.name in self._group.identity:
                    identity[column.name] = parts[0]
                path = column.file(self._root, index)
                written.append((write_beside(path, parts), path))
        except BaseException:
            for temporary, _ in written:
                temporary.unlink(missing_ok=True)
            raise
        for temporary, path in written:
            place(temporary, path)
        marker = np.zeros((1, 3), dtype=np.uint64)
        marker[0, 0] = rows
        marker[0, 1:] = content_hash([identity[name] for name in self._group.identity])
        path = self._group.marker.file(self._root, index)
        place(write_beside(path, self._group.marker.encode(marker)), path)
        self.committed[index] = rows

    def _recover(self, before_repair: Callable[[], None]) -> dict[int, int]:
        """Make folders, remove what a killed run left half done, and check what it finished."""
        for column in (*self._group.columns, self._group.marker):
            folder = self._root / column.name
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{TEMPORARY}"):
                leftover.unlink()
            if not (folder / "zarr.json").exists():
                write_atomically(folder / "zarr.json", column.metadata(0))
        kept: dict[int, int] = {}
        for index in self._group.marker.indices(self._root):
            try:
                self._group.verify(self._root, index)
                kept[index] = int(self._group.marker.read(self._root, index)[0, 0])
            except StoreError as error:
                logger.warning("block %d is computed anew: %s", index, error)
                before_repair()
                self._group.marker.file(self._root, index).unlink()
        for column in self._group.columns:
            for index in column.indices(self._root):
                if index not in kept:
                    column.file(self._root, index).unlink()
        return kept
