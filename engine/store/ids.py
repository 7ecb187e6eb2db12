"""Ids of examples: read from batches, one kind per store, none twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradsift.kernels.errors import DataError

__all__ = ["SeenIds", "id_kind", "read_ids", "seed_of"]

Id = str | int


def read_ids(batch: Mapping[str, Any]) -> list[Id] | None:
    """``batch["ids"]`` as text or plain integers; None when the batch has none.

    Raises:
        DataError: an id is neither, or does not fit 64 bits.
    """
    ids = batch.get("ids")
    if ids is None:
        return None
    listed: list[Any] = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    out: list[Id] = []
    for value in listed:
        plain = value.item() if isinstance(value, Tensor | np.generic) else value
        if isinstance(plain, bool) or not isinstance(plain, str | int):
            raise DataError(f"id {plain!r} is a {type(plain).__name__}, expected text or an integer")
        if isinstance(plain, int) and not -(1 << 63) <= plain < 1 << 63:
            raise DataError(f"id {plain} does not fit a 64-bit integer: give it as text")
        if isinstance(plain, str) and not _is_unicode(plain):
            raise DataError(f"id {plain!r} holds half a surrogate pair, which is no valid text: give another id")
        out.append(plain)
    return out


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def id_kind(ids: Sequence[Id] | None) -> str:
    """The dtype of the ids' column; row numbers are integers."""
    return "string" if ids and isinstance(ids[0], str) else "int64"


def seed_of(seed: int, example: Id, draw: int) -> int:
    """The seed, in [0, 2**63), from which one example's labels are drawn."""
    text = f"{type(example).__name__}:{example}:{draw}".encode()
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little"), person=b"gradsift.labels1")
    return int.from_bytes(digest.digest(), "little") >> 1


class SeenIds:
    """Finds an id that comes twice, at 8 bytes per id (16 more while two runs of them are merged).

    Sorted runs of 64-bit hashes, merged when they are of one size, as in a log-structured tree.

    Args:
        stored: ``stored(n)`` yields the first n ids again; called only when two hashes agree, to see whether the
            ids do.
    """

    _RUN = 4096

    def __init__(self, stored: Callable[[int], Iterable[Id]]) -> None:
        self._stored = stored
        self._count = 0
        self._fresh: set[int] = set()
        self._runs: list[np.ndarray] = []

    def add(self, ids: Sequence[Id]) -> None:
        """Remember the next ids.

        Raises:
            DataError: one of them was there before; the text names it.
        """
        hashes = np.array([_hash(value) for value in ids], dtype=np.uint64)
        known = np.zeros(len(ids), dtype=bool)
        for run in self._runs:
            known |= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] == hashes
        for i, key in enumerate(hashes.tolist()):
            if known[i] or key in self._fresh:
                self._confirm(ids, i)
            self._fresh.add(key)
        self._count += len(ids)
        if len(self._fresh) >= self._RUN:
            self._merge()

    def _confirm(self, ids: Sequence[Id], i: int) -> None:
        if ids[i] in ids[:i] or any(ids[i] == other for other in self._stored(self._count)):
            raise DataError(f"id {ids[i]!r} comes twice: give every example an id of its own")

    def _merge(self) -> None:
        run = np.sort(np.fromiter(self._fresh, dtype=np.uint64, count=len(self._fresh)))
        self._fresh = set()
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)


def _hash(value: Id) -> int:
    if isinstance(value, int):
        return value & (1 << 64) - 1
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
