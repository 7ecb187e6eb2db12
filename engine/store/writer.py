"""StoreWriter: begins or continues a store, alone, and declares it complete."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gradsift.engine.store.block_writer import BlockWriter, Group, cannot_write
from gradsift.engine.store.columns import Column, group_json, write_atomically
from gradsift.engine.store.format import (
    curvature_columns,
    difference,
    example_columns,
    read_description,
    write_description,
)
from gradsift.kernels.errors import StoreError

__all__ = ["StoreWriter", "lock"]

logger = logging.getLogger(__name__)


class StoreWriter:
    """The store at a path, open for one extraction; a context manager that keeps other writers out.

    Args:
        root: a folder that is absent, empty, or a store that the same extraction began.
        wanted: the extraction's description.

    Raises:
        StoreError: the path holds something else or another extraction, is being written by another process, or
            cannot be written.
    """

    def __init__(self, root: Path, wanted: Mapping[str, Any]) -> None:
        self.root = root
        self._lock = lock(root)
        try:
            self.description = self._begin(dict(wanted))
        except BaseException:
            os.close(self._lock)
            raise
        self.examples_group = example_columns(self.description)
        self.curvature_group = curvature_columns(self.description)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def column(self, name: str) -> Column:
        """A column of the examples by name."""
        return next(column for column in self.examples_group.columns if column.name == name)

    def examples(self) -> BlockWriter:
        """The writer of the examples' rows."""
        return BlockWriter(self.root, self.examples_group, self._reopen)

    def curvature(self) -> BlockWriter:
        """The writer of the curvature sample."""
        try:
            (self.root / "curvature").mkdir(exist_ok=True)
            write_atomically(self.root / "curvature" / "zarr.json", group_json({}))
        except OSError as error:
            raise cannot_write(error, self.root, "all examples are safe") from error
        return BlockWriter(self.root, self.curvature_group, self._reopen)

    def finish(self, rows: int, curvature: int | None) -> None:
        """Give the arrays their lengths, then mark the store as complete."""
        try:
            self._set_lengths(self.examples_group, rows)
            if curvature is not None:
                self._set_lengths(self.curvature_group, curvature)
                self.description["curvature"] = {**self.description["curvature"], "rows": curvature}
            self.description.update(rows=rows, complete=True)
            write_description(self.root, self.description)
        except OSError as error:
            raise cannot_write(error, self.root, f"all {rows} rows are safe") from error

    def _begin(self, wanted: dict[str, Any]) -> dict[str, Any]:
        old = read_description(self.root)
        if old is None:
            try:
                write_description(self.root, wanted)
            except OSError as error:
                raise cannot_write(error, self.root, "nothing was written") from error
            return wanted
        what = difference(old, wanted)
        if what is not None:
            raise StoreError(
                f"{self.root} was begun with other settings: {what}; set them as they were, or extract to another path"
            )
        if old["versions"] != wanted["versions"]:
            logger.warning(
                "%s was begun with %s and goes on with %s: new rows may differ in their last bits",
                self.root,
                old["versions"],
                wanted["versions"],
            )
        return old

    def _reopen(self) -> None:
        """A block of a finished store is damaged: until it is there again nobody should read it."""
        if self.description["complete"]:
            self.description["complete"] = False
            write_description(self.root, self.description)

    def _set_lengths(self, group: Group, rows: int) -> None:
        block = group.columns[0].block
        for column in group.columns:
            write_atomically(self.root / column.name / "zarr.json", column.metadata(rows))
        marker = group.marker
        write_atomically(self.root / marker.name / "zarr.json", marker.metadata(-(-rows // block)))


def lock(root: Path) -> int:
    """A lock on the folder itself, which leaves no file behind and ends with the process, however that ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    except FileExistsError:
        raise StoreError(f"{root} is a file: give the path of a folder for the store") from None
    except OSError as error:
        raise cannot_write(error, root, "nothing was written") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreError(f"another process is writing {root}: wait for it, or give another path") from None
    return descriptor
