"""What the command line prints: tables, bars, and text whose pulling and pushing tokens are coloured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["LEGEND", "bar", "bytes_text", "coloured", "facts", "number", "status", "table", "ticking"]

LEGEND = Text.assemble(
    ("green", "black on green"), " pulls the query's loss down, ", ("red", "black on red"), " pushes it up"
)

_WEAK, _STRONG = 0.15, 0.5
"""Shares of the strongest token from which a token is coloured, and set off by its background."""

_MARKS = {"green": ("+[", "]"), "red": ("-[", "]")}
"""What sets a strong token off where there are no colours."""


def coloured(
    pieces: Sequence[str],
    scores: Sequence[float] | np.ndarray | None,
    *,
    limit: int = 320,
    dim: Sequence[bool] | np.ndarray | None = None,
    marks: bool = False,
) -> Text:
    """Text with its tokens coloured by what they add to a score: green pulls, red pushes.

    Args:
        pieces: text of each token; joined, they are the whole text.
        scores: number of each token, as many as pieces or more; None for plain text.
        limit: characters to show; of a longer text the part with the strongest tokens.
        dim: tokens to set back, such as those without loss.
        marks: also set strong tokens in +[ ] or -[ ], for output without colours.
    """
    values = np.zeros(len(pieces)) if scores is None else np.asarray(scores, dtype=float)[: len(pieces)]
    back = np.zeros(len(pieces), dtype=bool) if dim is None else np.asarray(dim, dtype=bool)
    top = float(np.abs(values).max(initial=0.0))
    first, last = _window(pieces, np.abs(values), limit)
    text = Text("… " if first else "", style="dim" if first else "")
    for piece, value, faint in zip(pieces[first:last], values[first:last], back[first:last], strict=True):
        share = abs(value) / top if top else 0.0
        colour = "green" if value > 0 else "red"
        shown = _one_line(piece)
        if share < _WEAK or not shown.strip():
            text.append(shown, style="dim" if faint else "")
        elif share < _STRONG:
            text.append(shown, style=colour)
        else:
            bare = shown.lstrip(" ")
            text.append(" " * (len(shown) - len(bare)))
            opening, closing = _MARKS[colour] if marks else ("", "")
            text.append(f"{opening}{bare}{closing}", style=f"black on {colour}")
    if last < len(pieces):
        text.append(" …", style="dim")
    return text


def _window(pieces: Sequence[str], weights: np.ndarray, limit: int) -> tuple[int, int]:
    """First and last token of the run of at most ``limit`` characters that weighs most, the earliest of equals."""
    ends = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    if ends[-1] <= limit:
        return 0, len(pieces)
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    last = np.searchsorted(ends, ends[:-1] + limit, side="right") - 1
    first = int(np.argmax(np.round(sums[last] - sums[:-1], 12)))
    return first, max(int(last[first]), first + 1)


def _one_line(piece: str) -> str:
    return piece.replace("\r", "").replace("\n", "↵").replace("\t", " ")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, wide: str) -> Table:
    """A table whose numbers are set right and whose one wide column takes the room that is left."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        if column == wide:
            out.add_column(column, overflow="fold", ratio=1)
        else:
            out.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def facts(console: Console, pairs: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one a line."""
    out = Table(box=None, show_header=False, pad_edge=False)
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in pairs:
        out.add_row(name, Text(str(value)))
    console.print(out)


def number(value: float) -> str:
    """Four significant digits, with its sign."""
    return f"{value:+.4g}"


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """As ``ticking``, but gives the function to call after each of ``total`` steps."""
    with ticking(what) as tick:
        tick(0, total)
        done = count(1)
        yield lambda: tick(next(done), total)


@contextmanager
def ticking(what: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error, where that is a terminal: gives ``tick(done, total, what=what)``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)

        def tick(done: int, total: int, what: str = what) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield tick


@contextmanager
def status() -> Iterator[Any]:
    """What is being done now, on a terminal."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with console.status("") as status:
        yield status.update


def bytes_text(size: float) -> str:
    """Such as 31.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
