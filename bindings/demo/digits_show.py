"""What the diffusion demo prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from gradsift.bindings.demo.digits import EIGHT, THREE
from gradsift.bindings.demo.digits_run import Drawn, Found, Run
from gradsift.bindings.render import number, table

__all__ = ["show_answer", "show_precision", "show_shares"]

_SHOWN = 8
"""Images of the answer that are printed."""


def show_answer(console: Console, run: Run, found: Found) -> None:
    """The images that pull most towards the clearest wrong picture, planted or not."""
    digits, names = run.digits, run.digits.names
    rows: list[Sequence[Any]] = []
    for place in range(_SHOWN):
        row = int(found.answer.rows[0, place])
        planted = bool(digits.planted[row])
        mark = Text("planted", style="bold green") if planted else Text("ordinary", style="dim")
        said = f"labelled {digits.labels[row]}" + (f", in truth an {EIGHT}" if planted else "")
        rows.append((place + 1, number(float(found.answer.scores[0, place])), mark, f"{names[row]}  {said}"))
    what = f"why this {EIGHT}, when a {THREE} was asked for?"
    console.print(table(("", "score", "in truth", what), rows, wide=what))


def show_precision(console: Console, found: Found, planted: int) -> None:
    """How well gradsift and every baseline find the planted images."""
    rows: list[Sequence[Any]] = []
    for name in sorted(found.alone, key=lambda name: (-found.alone[name], -found.together[name])):
        alone = found.alone[name]
        bar = Text("█" * round(15 * alone), style="green" if name.startswith("gradsift") else "dim")
        method = Text(name, style="bold" if name == "gradsift" else "")
        rows.append((method, f"{alone:.2f}", f"{found.together[name]:.2f}", bar))
    out = table(("found by", "precision@10,\none picture", f"first {planted},\nall as one", ""), rows, wide="")
    out.columns[0].justify = "left"
    console.print(out)


def show_shares(console: Console, drawn: Mapping[str, Drawn]) -> None:
    """The share of eights after each training."""
    rows = [
        (Text(name), f"{100 * each.share:.1f} %", Text("█" * round(40 * each.share))) for name, each in drawn.items()
    ]
    out = table(("training", f"eights among the drawn {THREE}s", ""), rows, wide="")
    out.columns[0].justify = "left"
    console.print(out)
