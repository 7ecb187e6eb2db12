"""Selection: the part of a data set that helps a set of targets most."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gradsift.engine.answers.queries import AnyScorer, prepare
from gradsift.engine.answers.scan import RowStore, scan
from gradsift.engine.answers.search import MEMORY, SIGN, ids_of
from gradsift.engine.capture.features import Features
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = ["Selection", "select", "write_jsonl"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows, best first.

    Attributes:
        ids: object array (m,), the store's ids.
        scores: float64 (m,), each row's mean or largest score over the targets.
        rows: int64 (m,), row numbers in the store.
        scorer: "fisher", "dot" or "cosine": the one that was used.
        dropped: int64, rows without any gradient (no token with loss), which were left out before choosing.
        sign: what the sign of a score means.
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    scorer: str
    dropped: np.ndarray
    sign: str = SIGN


def select(
    store: RowStore,
    targets: Features | Tensor,
    budget: float | int,
    method: Literal["top"] = "top",
    *,
    reduce: Literal["max", "mean"] = "max",
    scorer: AnyScorer = "fisher",
    damping: float | None = None,
    memory: int = MEMORY,
) -> Selection:
    """The rows of highest score against the targets.

    Scores are those of ``topk``, equal ones go to the lower row, and the choice does not depend on how the store is
    cut into blocks.

    Args:
        targets: features of examples of what the model should do, q of them; or a tensor, as of ``topk``.
        budget: a share of the store's rows below 1, rounded down; or a number of rows.
        method: "top".
        reduce: a row's score is its largest over the targets, so that each target can bring in rows of its own; or
            the mean of its scores, the score against the mean of all targets.
        scorer, damping, memory: as of ``topk``.

    Raises:
        DataError: the budget is less than one row or more than all.
        SpecError, ShapeError, StoreError: as of ``topk``.
    """
    if method != "top" or reduce not in ("max", "mean"):
        raise SpecError(f"method is {method!r} with reduce {reduce!r}, expected 'top' with 'max' or 'mean'")
    count = _rows(budget, len(store))
    prepared = prepare(store, targets, scorer, damping=damping)
    directions = prepared.directions
    assert directions is not None
    if reduce == "mean":
        directions = directions.mean(dim=0, keepdim=True)
        if not bool(directions.any()):
            raise ShapeError("the targets' gradients cancel out, so their mean ranks nothing: use reduce='max'")
    empty = (prepared.norms == 0).reshape(len(store), -1).all(axis=1)
    best = scan(
        store,
        directions,
        count,
        norms=prepared.norms,
        weights=prepared.weights,
        together=True,
        skip=empty,
        memory=memory,
    )
    dropped = np.flatnonzero(empty)
    if len(dropped):
        logger.warning(
            "%d rows have no gradient and were left out, such as row %d (id %r): nothing of theirs carries loss",
            len(dropped),
            dropped[0],
            store.ids[int(dropped[0])],
        )
    rows = best.rows[0]
    if len(rows) < count:
        logger.warning("the budget is %d rows but only %d have a gradient: all of them are chosen", count, len(rows))
    return Selection(ids_of(store, rows), best.scores[0], rows, prepared.name, dropped)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line, whole or not at all, and return how many.

    Args:
        path: the file; its folder exists. An earlier file is replaced when the last line is written.
        records: anything JSON can hold.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _rows(budget: float | int, total: int) -> int:
    """A budget as a number of rows."""
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    count = int(budget) if whole else int(budget * total)
    if not whole and not 0 < budget < 1:
        raise DataError(f"budget is {budget}, expected a share between 0 and 1 or a whole number of rows")
    if count < 1:
        raise DataError(f"a budget of {budget} of {total} rows is no row at all: give at least {1 / max(total, 1):g}")
    if count > total:
        raise DataError(f"the budget is {count} rows but the store holds {total}: give at most that")
    return count
