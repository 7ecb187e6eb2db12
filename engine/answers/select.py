"""Selection: the part of a data set that helps a set of targets most."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.engine.answers.given import Given, checked
from gradsift.engine.answers.queries import AnyScorer
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.answers.search import SIGN, ids_of
from gradsift.engine.selectors.protocol import Choice, Selector, Targets, called
from gradsift.engine.selectors.registry import selector_of
from gradsift.engine.selectors.rows import empty_rows
from gradsift.engine.selectors.tasks import Tasks
from gradsift.kernels.errors import DataError, ShapeError, StoreError

__all__ = ["Selection", "least_share", "select", "write_jsonl"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen rows, in the order in which the method takes them: best first, for most.

    Attributes:
        ids: object array (m,), the store's ids.
        scores: float64 (m,), what each row was chosen by; the method says what it is.
        rows: int64 (m,), row numbers in the store.
        scorer: the name of the scorer that was used; None where the method needs none.
        dropped: int64, rows without any gradient (no token with loss), which were left out before choosing.
        sign: what the sign of a score means, where it comes from a scorer.
        method: the selector's name.
        reasons: why each row was chosen, m sentences; None where there is nothing to say.
        weights: float64 (m,) of the rows (transport potentials of "tarot", the mixture that rebuilds the query of
            "diverse"), or label -> share of tokens ("groups"); None where the method gives none.
        facts: other numbers that the method finds, by name, such as the ratio of "tarot".
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    scorer: str | None
    dropped: np.ndarray
    sign: str = SIGN
    method: str = "top"
    reasons: list[str] | None = None
    weights: np.ndarray | Mapping[Any, float] | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


def select(
    store: RowStore,
    targets: Given | None,
    budget: float | int | None,
    method: str | Selector = "top",
    *,
    scorer: AnyScorer = "fisher",
    tasks: Sequence[Any] | None = None,
    **options: Any,
) -> Selection:
    """The rows that help the targets most, by one of several methods.

    Equal scores go to the lower row, and the choice does not depend on how the store is cut into blocks.

    Args:
        targets: features of examples of what the model should do, q of them; a store of them; or a tensor, as of
            ``topk``. None for a method, or a scorer, that looks at the rows alone.
        budget: a share of the store's rows below 1, rounded down; a number of rows; or None for a method that finds
            how many by itself ("tarot" with rule="otm", and "order", which takes all).
        method: a name of ``SELECTORS``, see `gradsift methods`; or a selector of your own, see ``Selector``.
        scorer: as of ``topk``, for methods that use one.
        tasks: which task each target belongs to, one label per target; without it each is a task of its own.
        options: of the method, such as ``reduce="mean"`` of "top"; the class behind its name tells them.

    Raises:
        DataError: the budget is less than one row or more than all, or tasks or labels do not fit.
        SpecError: there is no such method or option; or as of ``topk``.
        ShapeError, StoreError: as of ``topk``; or the store lacks what the method needs.
    """
    selector = selector_of(method, options)
    name = called(selector)
    if not len(store):
        raise StoreError("the store holds no rows: extract something first")
    count = None if budget is None else _rows(budget, len(store))
    if targets is None and tasks is not None:
        raise DataError("tasks are labels of targets but there are none: give both or neither")
    if targets is not None and not getattr(selector, "needs_targets", True):
        logger.warning("method %r looks at the rows alone: the targets change nothing", name)
        targets = None
    selector.prepare(store, None if targets is None else _targets(store, targets, tasks), scorer)
    used = getattr(selector, "scorer", None)
    if used is None and scorer != "fisher" and isinstance(method, str):
        logger.warning("method %r uses no scorer: scorer=%r changes nothing", name, scorer)
    empty = np.flatnonzero(empty_rows(store))
    if len(empty):
        logger.warning(
            "%d rows have no gradient and were left out, such as row %d (id %r): nothing of theirs carries loss",
            len(empty),
            empty[0],
            store.ids[int(empty[0])],
        )
    if count is not None and len(store) - len(empty) < count:
        left = len(store) - len(empty)
        logger.warning("the budget is %d rows but only %d have a gradient: no more are chosen", count, left)
    chosen = _checked(Choice(*selector.choose(count)), len(store), count, name)
    return Selection(
        ids_of(store, chosen.rows),
        chosen.scores,
        chosen.rows,
        used,
        np.setdiff1d(empty, chosen.rows),
        method=name,
        reasons=chosen.reasons,
        weights=chosen.weights,
        facts=chosen.facts or {},
    )


def _targets(store: RowStore, given: Given, tasks: Sequence[Any] | None) -> Targets:
    """Targets compared with the store, each in its task."""
    queries = checked(store, given)
    empty = (queries.values.flatten(1) == 0).all(dim=1).nonzero()
    if len(empty):
        raise ShapeError(f"query {int(empty[0])} has a zero gradient, which ranks nothing: look at its loss")
    return Targets(given, queries, Tasks.of(tasks, len(queries.values)))


def _checked(choice: Choice, total: int, budget: int | None, name: str) -> Choice:
    """What a selector returned, as arrays that fit the store."""
    rows, scores = np.asarray(choice.rows), np.asarray(choice.scores, dtype=np.float64)
    if rows.ndim != 1 or scores.shape != rows.shape or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        raise ShapeError(
            f"the selector {name!r} chose rows of shape {rows.shape} with scores of shape {scores.shape}, "
            "expected (m,) whole numbers and (m,)"
        )
    if rows.size and not 0 <= rows.min() <= rows.max() < total:
        raise ShapeError(f"the selector {name!r} chose rows {rows.min()} to {rows.max()} of a store of {total}")
    if budget is not None and len(np.unique(rows)) > budget:
        raise ShapeError(f"the selector {name!r} chose {len(np.unique(rows))} rows for a budget of {budget}")
    if choice.reasons is not None and len(choice.reasons) != len(rows):
        raise ShapeError(f"the selector {name!r} gave {len(choice.reasons)} reasons for {len(rows)} rows")
    return choice._replace(rows=rows.astype(np.int64), scores=scores)


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object per line, whole or not at all, and return how many.

    Args:
        path: the file; its folder exists. An earlier file is replaced when the last line is written.
        records: what JSON can hold; anything else, such as a date, is written as text.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    count = 0
    try:
        # Half a surrogate pair is no UTF-8, but escaped by Python it is what JSON would write of it.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                count += 1
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def least_share(total: int) -> float:
    """The least share that is a row of so many, rounded up to two or three digits."""
    scale = 10.0 ** (len(str(total)) + 1)
    return -(-scale // total) / scale


def _rows(budget: float | int, total: int) -> int:
    """A budget as a number of rows."""
    whole = isinstance(budget, int) and not isinstance(budget, bool)
    count = int(budget) if whole else int(budget * total + 1e-9)  # .29 of 100 is 29, whatever floats make of it
    if not whole and not 0 < budget < 1:
        raise DataError(f"budget is {budget}, expected a share between 0 and 1 or a whole number of rows")
    if count < 1:
        raise DataError(f"a budget of {budget} of {total} rows is no row at all: give at least {least_share(total):g}")
    if count > total:
        raise DataError(f"the budget is {count} rows but the store holds {total}: give at most that")
    return count
