"""What `gradsift select` writes: the chosen records, best first, as JSONL ready to train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

from gradsift.bindings.space import Examples, Space
from gradsift.engine.answers.select import Selection, select, write_jsonl
from gradsift.kernels.errors import DataError

__all__ = ["parse_budget", "write_selection"]


def parse_budget(text: str, examples: int) -> int:
    """A budget as a user writes it: ``5%``, ``0.05`` or ``200``.

    Returns:
        number of examples, at least 1.

    Raises:
        DataError: it is none of these, or more than there is.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if text.strip().endswith("%"):
        value *= examples / 100
    elif "." in number and 0 < value <= 1:
        value *= examples
    if not 0 < value <= examples:
        raise DataError(f"budget is '{text}', expected such as 5%, 0.05 or a number up to {examples}")
    return max(1, round(value))


def write_selection(space: Space, targets: Examples, budget: int, scorer: str, reduce: str, out: Path) -> Selection:
    """Select and write; the file appears whole or not at all.

    Each line is the record as it was, with ``id`` and ``score`` (``gradsift_score`` where the record has a
    score of its own).
    """
    chosen = select(
        space.store,
        space.capture(targets),
        budget,
        scorer=cast(Literal["fisher", "dot", "cosine"], scorer),
        reduce=cast(Literal["max", "mean"], reduce),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, _lines(space, chosen))
    return chosen


def _lines(space: Space, chosen: Selection) -> Iterator[dict[str, Any]]:
    for row, score in zip(chosen.rows.tolist(), chosen.scores.tolist(), strict=True):
        index = space.index(row)
        record = space.data.record(index)
        name = "gradsift_score" if "score" in record else "score"
        yield {"id": space.data.id(index), **record, name: score}
