"""compact: a store of 64 to 512 bytes per example, with the recall that it will give measured before it is written."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path

import torch

from gradsift.engine.answers.given import Given
from gradsift.engine.answers.queries import AnyScorer
from gradsift.engine.answers.search import ExactScores
from gradsift.engine.compaction.axes import Principal, principal_axes
from gradsift.engine.compaction.codes import BITS
from gradsift.engine.compaction.layout import SCALE_BYTES, About
from gradsift.engine.compaction.measure import Coding, Recall, Tick, ask, held_rows, measure
from gradsift.engine.compaction.store import CompactStore
from gradsift.engine.compaction.units import units_of
from gradsift.engine.compaction.write import free, write_whole
from gradsift.engine.extraction.progress import Progress, Update, reporting
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import SpecError, StoreError

__all__ = ["BYTES", "SIZES", "compact"]

logger = logging.getLogger(__name__)

BYTES = 128
"""Bytes per row unless told otherwise."""

SIZES = (64, 96, 128, 192, 256, 384, 512)
"""Bytes per row from which ``recall`` chooses."""

_FEWEST, _MOST = 16, 1024

_FEWEST_BITS = 2
_FOUR_BITS = 256
"""Bytes from which four bits per number answer better than two, as docs/compaction.md measures."""

_BLOCK = 4096
"""Rows per chunk at most: what is read to name one row."""


def compact(
    store: FeatureStore,
    path: str | PathLike[str],
    bytes: int | None = None,
    recall: float | None = None,
    *,
    bits: int | None = None,
    scorer: AnyScorer = "fisher",
    queries: Given | None = None,
    rescore: ExactScores | None = None,
    report: Callable[[Recall], None] | None = None,
    progress: bool | Progress = True,
) -> CompactStore:
    """Keep a few bytes of each row, such that its products with queries survive.

    Rows are projected on their principal axes, half whitened, rotated at random and coded in a few bits per number with
    a scale each. Parts that are one gradient (timesteps, groups) are summed first, as "dot" and "fisher" do.
    Recall of the whole sketch's best 10 rows is measured before anything is written, and kept in
    ``metadata["compacted"]["recall"]``. It is that of rows held out of the axes; where there are fewer rows than
    numbers in each, what is written has as many axes, but of all rows.

    Args:
        path: a new folder; it appears whole or not at all.
        bytes: of a row, its scale included; 128 unless given. Norm, loss and id come on top, as in any store.
        recall: instead of bytes: the smallest of ``SIZES`` at which the short list of 100, scored again, has this
            recall.
        bits: per number: 1, 2, 4 or 8. Unless given 2, 4 from 256 bytes on, and more where there are not so many axes.
        scorer: whose answers are to survive: a scorer whose scores are products of whole rows. "fisher" takes the
            axes along the Fisher of the curvature sample.
        queries: what recall is measured with; a tenth of the rows, 64 at most, unless given. These rows are held out
            of the axes in any case, and each is left out of its own answer.
        rescore: exact scores of the given queries, as of ``topk``: the lists are then scored again by them instead of
            by the whole rows.
        report: called with each recall that was measured, before the store is written.
        progress: a bar on a terminal, nothing, or a function that is called with updates.

    Raises:
        StoreError: the path is taken, the store is compacted, unfinished or too small, no size reaches the recall, or
            the scorer asks for parts of rows.
        SpecError: the sizes make no sense, or the scorer's scores are no products.
    """
    root = Path(path)
    sizes = _sizes(bytes, recall, bits)
    _fits(store)
    if rescore is not None and queries is None:
        raise SpecError("rescore is given without the queries whose exact scores it gives: give queries=")
    free(root)
    units, held = units_of(store), held_rows(store)
    question = ask(store, units, scorer, queries, held)
    weights = None if question.weights is None else torch.from_numpy(question.weights)
    with reporting(progress) as shown:
        with _stage(shown, "axes", len(store)) as tick:
            most = max(8 * (size - SCALE_BYTES) // (bits or _FEWEST_BITS) for size in sizes)
            axes = principal_axes(store, units, most, held, weights, question.name == "fisher")
            tick(len(store))
        measured: list[Recall] = []
        for size in sizes:
            coding = _coding(axes, size, bits)
            if measured and coding.bytes == measured[-1].bytes:
                continue  # nothing is left that more bytes could buy
            with _stage(shown, f"recall at {coding.bytes} bytes", len(store)) as tick:
                measured.append(measure(store, units, question, coding, rescore, tick))
            logger.info("%s", measured[-1])
            if report is not None:
                report(measured[-1])
            if recall is None or measured[-1].listed >= recall:
                break
        if recall is not None and measured[-1].listed < recall:
            raise StoreError(
                f"recall@10 with a short list scored again is {measured[-1].listed:.3f} at {measured[-1].bytes} bytes, "
                f"below {recall:g}: ask for less, or keep the whole store"
            )
        outside = coding.axes.outside(units.fold(torch.from_numpy(store.features[held])).flatten(1))
        if len(store) < store.features.shape[-1]:  # few rows span no others: the held ones would be coded badly
            with _stage(shown, "axes of all rows", len(store)) as tick:
                every = principal_axes(store, units, most, (), weights, question.name == "fisher")
                tick(len(store))
            if len(every) >= len(coding.axes):
                coding = Coding(every.keep(len(coding.axes)), coding.bits, coding.bytes)
        about = About(
            source=str(Path(store.path).resolve()),
            bytes=coding.bytes,
            axes=len(coding.axes),
            bits=coding.bits,
            metric=axes.metric,
            scorer=question.name,
            block=min(_BLOCK, max(64, len(store))),
            width=len(coding.axes.encode),
            held=held,
            outside=outside,
            recall=asdict(measured[-1]),
        )
        with _stage(shown, "codes", len(store)) as tick:
            write_whole(root, store, units, coding, {**store.metadata, "compacted": asdict(about)}, tick)
    return CompactStore.open(root)


def _sizes(bytes: int | None, recall: float | None, bits: int | None) -> tuple[int, ...]:
    """Sizes to be measured, smallest first."""
    if bytes is not None and recall is not None:
        raise SpecError(f"bytes is {bytes} and recall {recall}: give one of them, as one decides the other")
    if bits is not None and bits not in BITS:
        raise SpecError(f"bits is {bits}, expected {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
    if recall is not None:
        if not 0 < recall <= 1:
            raise SpecError(f"recall is {recall}, expected a share such as 0.95")
        return SIZES
    size = BYTES if bytes is None else bytes
    if not _FEWEST <= size <= _MOST:
        raise SpecError(f"bytes is {size}, expected {_FEWEST} to {_MOST} per row, such as {BYTES}")
    return (size,)


def _fits(store: FeatureStore) -> None:
    if isinstance(store, CompactStore):
        raise StoreError(f"'{store.path}' is compacted already: compact '{store.metadata['compacted']['source']}'")
    if not store.complete:
        raise StoreError(f"'{store.path}' is unfinished: run the same extract command again to finish it first")


def _coding(axes: Principal, size: int, bits: int | None) -> Coding:
    """As many axes as fit the bytes, in few bits; in more bits where all axes fit them."""
    room = 8 * (size - SCALE_BYTES)
    usual = 4 if size >= _FOUR_BITS else _FEWEST_BITS
    each = bits or max([usual, *(more for more in BITS if room // more >= len(axes))])
    count = min(room // each, len(axes))
    count -= count % (8 // each)
    if not count:
        each, count = 8, len(axes)
    return Coding(axes.keep(count), each, count * each // 8 + SCALE_BYTES)


@contextmanager
def _stage(shown: Progress, stage: str, total: int) -> Iterator[Tick]:
    """What is done now: gives the function to call with the rows that are done."""
    start = time.monotonic()

    def tick(rows: int) -> None:
        shown(Update(stage, rows, total, rows, 0, time.monotonic() - start))

    tick(0)
    yield tick
