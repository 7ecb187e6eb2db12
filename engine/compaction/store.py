"""CompactStore: a store of a few bytes per example that still finds what the whole store finds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import Best, scan
from gradsift.engine.compaction.append import append_rows
from gradsift.engine.compaction.axes import Axes
from gradsift.engine.compaction.codes import decode
from gradsift.engine.compaction.finder import Finder
from gradsift.engine.compaction.layout import axes_columns, group
from gradsift.engine.compaction.units import units_of
from gradsift.engine.store.format import read_description
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import ShapeError, StoreError

__all__ = ["CompactStore"]

_MEMORY = 64 << 20
"""Bytes that a pass over what the codes stand for may take."""

_MORE = 64
"""Candidates of a direction beyond the rows wanted, at first."""

_SCANNED = 8
"""A share of 1 / this of all rows as candidates, from which a pass over all is cheaper."""


class CompactStore(FeatureStore):
    """A store whose rows are codes along principal axes; ``compact`` makes them.

    It answers ``topk`` and ``select`` like the store it was made of, for scorers whose scores are products of whole
    rows ("fisher", "dot", "cosine"). Ids, norms, losses, fingerprints and the curvature sample are those of that store.

    Attributes:
        bytes: that answering takes of a row: its codes and their scale.
        axes: how many numbers are coded.
        bits: per number.
        recall: what was measured before it was written, as of ``Recall``.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], rows: int) -> None:
        super().__init__(path, metadata, rows)
        about = metadata["compacted"]
        self._group = group(metadata)
        self.bytes, self.axes, self.bits = int(about["bytes"]), int(about["axes"]), int(about["bits"])
        self.recall: dict[str, Any] = dict(about["recall"])
        self._finder: Finder | None = None

    @classmethod
    def open(cls, path: str | PathLike[str], *, unfinished: bool = False) -> Self:
        """Open a compacted store for searching; only its description is read.

        Args:
            path: the folder that ``compact`` wrote.
            unfinished: makes no difference: a compacted store is written whole.

        Raises:
            StoreError: nothing is there, it is no store, or it is not compacted.
        """
        root = Path(path)
        metadata = read_description(root)
        if metadata is None:
            raise StoreError(f"{root} does not exist or is empty: expected a store made by gradsift compact")
        if not metadata.get("compacted"):
            raise StoreError(f"{root} is not compacted: open it with FeatureStore.open, or compact it first")
        return cls(root, metadata, int(metadata["rows"]))

    def __repr__(self) -> str:
        return f"CompactStore({str(self.path)!r}, {len(self)} rows, {self.bytes} bytes each)"

    @property
    def features(self) -> NoReturn:  # type: ignore[override]
        """Not there: raises StoreError."""
        self._no_rows()

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Not there: raises StoreError."""
        self._no_rows()

    @property
    def mapped(self) -> bool:
        """As of ``FeatureStore``."""
        return False

    @cached_property
    def axes_maps(self) -> Axes:
        """From rows to what is coded, and from directions to what codes are multiplied by."""
        encode, decode = (torch.from_numpy(column.read(self.path, 0)) for column in axes_columns(self.metadata))
        return Axes(encode, decode.to(torch.float64))  # once, instead of at every search

    def search(
        self,
        directions: Tensor,
        k: int,
        weights: np.ndarray | None = None,
        skip: np.ndarray | None = None,
        together: bool = False,
    ) -> Best:
        """The k rows whose codes have the largest inner product with each direction.

        Found through FAISS, decided in float64: rows and scores are those of ``scan_codes``, equal scores go to the
        lower row. The first search builds the index, and so does one with other weights.

        Args:
            directions: float64 (q, dim), or (q, parts, dim), of sketches.
            weights: float64 (n,), or (n, parts) that differ between rows by one factor: what rows are multiplied by.
            skip: bool (n,), rows that are left out.
            together: one answer instead of q: a row's score is its largest over the directions.

        Returns:
            (q, m) or, together, (1, m), m = min(k, rows that are not left out).

        Raises:
            StoreError: the question needs the parts of rows apart; or a direction lies outside the axes.
        """
        asked, whole = self._asked(directions, weights)
        allowed = len(self) if skip is None else len(self) - int(np.count_nonzero(skip))
        m = min(k, allowed)
        if (m + _MORE) * _SCANNED > len(self):
            return self._scan(asked, k, whole, skip, together)
        finder = self._indexed(whole)
        found = [self._best(finder, asked[i : i + 1], m, whole, skip) for i in range(len(asked))]
        if not together:
            return Best(np.concatenate([b.scores for b in found]), np.concatenate([b.rows for b in found]))
        scores, rows = np.concatenate([b.scores[0] for b in found]), np.concatenate([b.rows[0] for b in found])
        order = np.lexsort((rows, -scores))
        _, first = np.unique(rows[order], return_index=True)
        order = order[np.sort(first)][:m]
        return Best(scores[order][None], rows[order][None])

    def scan_codes(
        self,
        directions: Tensor,
        k: int,
        weights: np.ndarray | None = None,
        skip: np.ndarray | None = None,
        together: bool = False,
    ) -> Best:
        """What ``search`` answers, without FAISS: one pass over everything that the codes stand for."""
        asked, whole = self._asked(directions, weights)
        return self._scan(asked, k, whole, skip, together)

    def append(self, store: FeatureStore) -> Self:
        """Add the rows of another store, coded along the axes that are there; recall is not measured again.

        A warning says so when the axes hold much less of the new rows than of rows held out of them, and the share that
        lies outside is kept in ``metadata["compacted"]["appended"]``.

        Args:
            store: whole rows of the same model, parameters, loss and sketch, with new ids.

        Returns:
            the store with all rows, those included that were added since this one was opened; this one does not change.

        Raises:
            StoreError: the stores do not fit, an id is there already, another process adds rows at the same time, or it
                cannot be written.
        """
        now = self.open(self.path)
        append_rows(now.path, now.metadata, now.axes_maps, now.ids, store)
        return self.open(self.path)

    def _asked(self, directions: Tensor, weights: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        """Directions (q, axes) for codes, and one weight per row."""
        flat, whole = units_of(self).queries(directions, weights)
        if flat.shape[1] != len(self.axes_maps.decode):
            raise ShapeError(
                f"directions have {flat.shape[1]} numbers but '{self.path}' was made of rows of "
                f"{len(self.axes_maps.decode)}: capture them with the spec that built it (store.spec)"
            )
        asked = self.axes_maps.turn(flat)
        empty = (asked == 0).all(dim=1).nonzero()
        if len(empty):
            raise StoreError(
                f"query {int(empty[0])} lies outside the axes of '{self.path}', which then ranks nothing: "
                "compact with more bytes, or ask the whole store"
            )
        return asked, whole

    def _best(
        self, finder: Finder, direction: Tensor, k: int, weights: np.ndarray | None, skip: np.ndarray | None
    ) -> Best:
        """One direction's answer, from more and more candidates until no other row can be in it."""
        count = k + _MORE
        while count * _SCANNED <= len(self):
            (rows,), (ceiling,) = finder.candidates(direction.numpy(), count)
            kept = rows if skip is None else rows[~skip[rows]]
            if len(kept) >= k:
                best = self._scan_rows(kept, direction, k, weights)
                if best.scores[0, -1] > ceiling:
                    return best
            count *= 4
        return self._scan(direction, k, weights, skip, False)

    def _scan_rows(self, rows: np.ndarray, direction: Tensor, k: int, weights: np.ndarray | None) -> Best:
        """The best of some rows, ascending."""
        best = scan(
            _Decoded(self, rows),
            direction,
            k,
            norms=self._longest[rows],
            weights=None if weights is None else weights[rows],
            memory=_MEMORY,
        )
        return Best(best.scores, rows[best.rows])

    def _scan(self, asked: Tensor, k: int, weights: np.ndarray | None, skip: np.ndarray | None, together: bool) -> Best:
        return scan(
            _Decoded(self),
            asked,
            k,
            norms=self._longest,
            weights=weights,
            skip=skip,
            together=together,
            memory=_MEMORY,
        )

    def _indexed(self, weights: np.ndarray | None) -> Finder:
        """The index for these weights; the last one is kept."""
        known = self._finder
        if known is None or not _same(known.weights, weights):
            self._finder = known = Finder(self.chunks, self.bits, weights)
        return known

    @cached_property
    def _longest(self) -> np.ndarray:
        """What no row is longer than as codes, float32 (n,): every number at its last level."""
        last = ((1 << self.bits) - 1) / 2 * self.axes**0.5
        return np.concatenate([np.float32(last) * scale for _, _, scale in self.chunks])

    @cached_property
    def chunks(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(first row, codes uint8 (m, bytes), scales float32 (m,)), mapped, in order."""
        codes, scale = self._column("codes"), self._column("scale")
        out = []
        for index in range(-(-len(self) // codes.block)):
            first = index * codes.block
            rows = slice(0, min(codes.block, len(self) - first))
            out.append((first, codes.map(self.path, index)[rows], scale.map(self.path, index)[rows]))
        return out

    def _no_rows(self) -> NoReturn:
        raise StoreError(
            f"'{self.path}' is compacted and holds no rows, which this reads: use the store it was made of, "
            f"'{self.metadata['compacted']['source']}'"
        )


class _Decoded:
    """What the codes of a store stand for, as a store: all rows, or some, ascending."""

    def __init__(self, store: CompactStore, rows: np.ndarray | None = None) -> None:
        self._store, self._rows = store, rows
        self.ids = store.ids
        self.grad_norm = np.empty(0)

    def __len__(self) -> int:
        return len(self._store) if self._rows is None else len(self._rows)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        store = self._store
        if self._rows is None:
            for first, codes, scale in store.chunks:
                yield first, decode(codes, scale, store.bits)
            return
        ends = np.searchsorted(self._rows, [first for first, _, _ in store.chunks] + [len(store)])
        some = [
            (codes[self._rows[left:right] - first], scale[self._rows[left:right] - first])
            for (first, codes, scale), left, right in zip(store.chunks, ends[:-1], ends[1:], strict=True)
            if left < right
        ]
        codes, scales = (np.concatenate(columns) for columns in zip(*some, strict=True))
        yield 0, decode(codes, scales, store.bits)


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
