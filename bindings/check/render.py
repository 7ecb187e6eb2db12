"""What `gradsift check` prints: a row per kind of map, a line per check, one example's mask, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradsift.bindings.data import Dataset
from gradsift.engine.check.report import KindRow, Report, Result
from gradsift.engine.losses import IGNORE

__all__ = ["mask", "masked", "print_report"]

_MARKS = {
    "ok": ("✓", "green"),
    "warn": ("!", "yellow"),
    "fail": ("✗", "bold red"),
    "skip": ("-", "dim"),
}
_SHOWN = 400
"""Characters of the example whose mask is shown."""

_LEGEND = (
    "energy: share of the squared gradient norm · autograd: rows of one example at a time against plain autograd · "
    "sum: rows of a batch against its gradient · batch: the same example alone and in a batch (largest relative "
    "errors) · precision: mean cosine of rows in low and full precision · sketch: error of inner products at dim {dim}"
)


def print_report(console: Console, report: Report, total: int, dim: int, trained: Sequence[RenderableType]) -> None:
    """Print everything that a check found.

    Args:
        total: examples in the data.
        dim: of the sketch.
        trained: what is trained on.
    """
    one_by_one, ranked = report.examples
    console.print(
        f"{one_by_one} examples one by one and up to {ranked} in rankings, of {total:,} in the data",
        highlight=False,
    )
    if report.kinds:
        console.print()
        console.print(_kinds(report))
        console.print(Padding(Text(_LEGEND.format(dim=dim), style="dim"), (1, 0, 0, 0)))
    console.print()
    console.print(_checks(report.results))
    console.print()
    for part in trained:
        console.print(part)
    console.print()
    mark, style = _MARKS["fail" if not report.ok else "warn" if report.warned else "ok"]
    console.print(Text(f"{mark} {report.verdict}", style=style if style.startswith("bold") else f"bold {style}"))


def masked(console: Console, dataset: Dataset, row: int) -> tuple[RenderableType, ...]:
    """What a language model is trained on, in words and as one example with its mask."""
    marks = console.no_color or not console.is_terminal
    said = Text.assemble(("trained on", "bold"), f": {dataset.encoder.trained_on}; for example, ", _name(dataset, row))
    return said, Padding(mask(*_pieces(dataset, row), marks=marks), (0, 2))


def mask(pieces: Sequence[str], trained: Sequence[bool], marks: bool = False) -> Text:
    """Text whose tokens with loss stand out; in [ ] where there are no colours."""
    text, length, inside = Text(), 0, False
    for piece, on in zip(pieces, trained, strict=True):
        shown = piece.replace("\r", "").replace("\n", "↵") or ("<end>" if on else "")
        if length + len(shown) > _SHOWN:
            text.append(" …", style="dim")
            break
        if marks and on != inside:
            text.append("[" if on else "]")
        inside = on
        length += len(shown)
        text.append(shown, style="green" if on else "dim")
    if marks and inside:
        text.append("]")
    return text


def _kinds(report: Report) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    out.add_column("kind of map", no_wrap=True)
    for column in ("maps", "parameters", "energy", "autograd", "sum", "batch", "precision", "sketch"):
        out.add_column(column, justify="right", no_wrap=True)
    for kind in report.kinds:
        out.add_row(
            kind.kind,
            str(kind.maps),
            f"{kind.numbers:,}",
            Text("-", style="dim") if kind.energy is None else Text(f"{kind.energy:.0%}"),
            *(_error(kind, column, report[column]) for column in ("features", "conservation", "batch")),
            _cosine(kind.precision, report["precision"]),
            Text("-", style="dim") if kind.sketch is None else Text(f"{kind.sketch:.1%}"),
        )
    return out


def _error(kind: KindRow, column: str, result: Result) -> Text:
    value: float | None = getattr(kind, column)
    if value is None:
        return Text("-", style="dim")
    wrong = result.verdict == "fail" and result.limit is not None and not value <= result.limit
    return Text(f"{value:.0e}" if value else "0", style="bold red" if wrong else "")


def _cosine(value: float | None, result: Result) -> Text:
    if value is None:
        return Text("-", style="dim")
    low = result.verdict in ("warn", "fail") and result.limit is not None and value < result.limit
    return Text(f"{value:.4f}", style="yellow" if low else "")


def _checks(results: Sequence[Result]) -> Table:
    """A line per check; those that did not run for one reason share a line at the end."""
    out = Table(box=None, show_header=False, pad_edge=False)
    out.add_column(no_wrap=True)
    out.add_column(no_wrap=True, style="bold")
    out.add_column(overflow="fold")
    skipped: dict[str, list[str]] = {}
    for result in results:
        mark, style = _MARKS[result.verdict]
        if result.verdict == "skip":
            skipped.setdefault(result.sentence, []).append(result.name)
        else:
            colour = "" if result.verdict == "ok" else style.removeprefix("bold ")
            out.add_row(Text(mark, style=style), result.name, Text(result.sentence, style=colour))
    for sentence, names in skipped.items():
        out.add_row(*(Text(cell, style="dim") for cell in ("-", "not run", f"{', '.join(names)}: {sentence}")))
    return out


def _name(dataset: Dataset, row: int) -> str:
    return f"example {dataset.id(row)}:"


def _pieces(dataset: Dataset, row: int) -> tuple[list[str], list[bool]]:
    example = dataset.example(row)
    trained = [bool(label != IGNORE) for label in example.labels]
    if not dataset.encoder.encoder_decoder:
        trained[0] = False  # nothing predicts the first token
    return list(example.pieces), trained
