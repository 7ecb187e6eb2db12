"""Progress of long work: what is reported, and the bar that a terminal shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Progress", "Update", "reporting"]


@dataclass(frozen=True, slots=True)
class Update:
    """How far a long job is.

    Attributes:
        stage: ``"examples"``, then ``"curvature"``.
        rows: rows of this stage that are done, those of earlier runs included.
        total: rows that there will be; None when the data does not tell.
        computed: rows that this run computed itself.
        tokens: tokens that this run computed; 0 for data without tokens.
        seconds: since the stage began.
    """

    stage: str
    rows: int
    total: int | None
    computed: int
    tokens: int
    seconds: float


Progress = Callable[[Update], None]


@contextmanager
def reporting(progress: bool | Progress) -> Iterator[Progress]:
    """The function to call with updates: the caller's own, a bar on a terminal's standard error, or nothing."""
    if callable(progress):
        yield progress
    elif progress and sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield lambda update: None


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[speed]}"),
        rich.TextColumn("{task.fields[left]}"),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, rich.TaskID] = {}

        def report(update: Update) -> None:
            if update.stage not in tasks:
                tasks[update.stage] = bar.add_task(update.stage, total=update.total, speed="", left="")
            bar.update(
                tasks[update.stage],
                completed=update.rows,
                total=update.total,
                speed=speed(update),
                left=left(update),
            )

        yield report


def speed(update: Update) -> str:
    """Such as ``12.3 examples/s, 3,150 tokens/s``."""
    if not update.computed or update.seconds <= 0:
        return ""
    text = f"{update.computed / update.seconds:.3g} examples/s"
    return f"{text}, {update.tokens / update.seconds:,.0f} tokens/s" if update.tokens else text


def left(update: Update) -> str:
    """Time to go, such as ``0:02:10 left``; empty when it cannot be told."""
    if update.total is None or not update.computed:
        return ""
    seconds = round((update.total - update.rows) * update.seconds / update.computed)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
