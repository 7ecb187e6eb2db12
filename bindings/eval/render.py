"""What `gradsift eval` prints: a table of methods, best first, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from gradsift.bindings.render import bytes_text, table
from gradsift.engine.fidelity.intervals import Interval
from gradsift.engine.fidelity.result import Evaluation, Row

__all__ = ["COLOURS", "print_evaluation"]

COLOURS = {"baseline": "grey62", "exact": "cyan", "sketch": "green", "codes": "yellow", "own": "magenta"}
"""Of the families of methods, on a terminal."""

_ROOM_FOR_BARS = 100
_BAR = 20
_NARROW = 4
"""Columns beside the method's name that fit 80 characters."""

_Column = tuple[str, Callable[[Row], str | None]]


def print_evaluation(console: Console, found: Evaluation) -> None:
    """The table, what was left out, and which method to use."""
    console.print(
        f"[bold]{escape(found.case)}[/bold]  {found.examples:,} examples, {found.queries} queries; trained again on "
        f"{found.subsets} random halves x {found.seeds} seeds",
        highlight=False,
    )
    columns: list[_Column] = [("bytes", _bytes), ("LDS", _lds), ("QLD", _qld), ("AUC", _auc)]
    columns += [("class", _class), ("exact", _exact)]
    shown = [column for column in columns if any(column[1](row) for row in found.rows)]
    bars = console.width >= _ROOM_FOR_BARS
    if len(shown) > _NARROW and not bars:
        shown = [column for column in shown if column[0] != "bytes"]  # the names tell it
    lines: list[Sequence[Text | str]] = []
    for row in found.ranked:
        cells: list[Text | str] = [Text(row.name, style=COLOURS[row.family])]
        cells += [read(row) or "" for _, read in shown]
        if bars:
            length = round(_BAR * max(0.0, row.lds.mean)) if row.lds is not None else 0
            cells.append(Text("█" * length, style=COLOURS[row.family]))
        lines.append(cells)
    names = ["method", *(name for name, _ in shown), *([""] if bars else [])]
    out = table(names, lines, wide="method" if not bars else "")
    out.columns[0].justify = "left"
    console.print(out)
    _legend(console, [name for name, _ in shown])
    for name, count in found.undefined.items():
        told = f"{name} has no correlation with {count} of {found.queries} queries, and its LDS is of the others"
        console.print(f"[dim]{escape(told)}[/dim]", highlight=False)
    if found.left_out:
        console.print()
        for name, why in found.left_out.items():
            console.print(f"[dim]not measured: {escape(name)}, for {escape(why)}[/dim]", highlight=False)
    console.print()
    for number, sentence in enumerate(found.advice):
        console.print(Text(sentence, style="bold" if number == 0 else ""))


def _bytes(row: Row) -> str | None:
    return None if row.bytes is None else bytes_text(row.bytes)


def _lds(row: Row) -> str | None:
    return None if row.lds is None else _around(row.lds.mean, row.lds.interval)


def _qld(row: Row) -> str | None:
    return None if row.qld is None else _around(row.qld.mean, row.qld.interval, 3)


def _auc(row: Row) -> str | None:
    return None if row.auc is None else f"{row.auc.value:.3f}"


def _class(row: Row) -> str | None:
    return None if row.classes is None else f"{row.classes.value:.2f}"


def _exact(row: Row) -> str | None:
    return None if row.agreement is None else f"{row.agreement.recall.value:.2f}"


def _around(value: float, interval: Interval, digits: int = 2) -> str:
    """Such as 0.47 ±.05: half of a 95 % interval."""
    half = f"{(interval.high - interval.low) / 2:.{digits}f}".removeprefix("0")
    return f"{value:.{digits}f} ±{half}"


def _legend(console: Console, shown: Sequence[str]) -> None:
    meaning = {
        "bytes": "kept per example",
        "LDS": "rank correlation with retraining on random halves",
        "QLD": "rise of the query's loss without its best 1 %",
        "AUC": "mislabelled examples told from right ones",
        "class": "of the best 10, the share of the query's class",
        "exact": "of the best 10 by exact gradients, the share that is found",
    }
    told = "; ".join(f"{name}: {meaning[name]}" for name in shown)
    console.print(f"[dim]{told}. ± is half of a 95 % interval.[/dim]", highlight=False)
