"""`gradsift methods`: the scorers, selectors and curvature corrections that exist, in words."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradsift.bindings.options import AsJson
from gradsift.engine.curvature.registry import CORRECTIONS
from gradsift.engine.methods import Method
from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.selectors.registry import SELECTORS, options_of

__all__ = ["app", "methods"]

_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "scorers": (SCORERS, "how rows are compared with queries: query --scorer, gs.topk(scorer=...)"),
    "selectors": (SELECTORS, "how rows are chosen: select --method, gs.select(method=...)"),
    "corrections": (CORRECTIONS, "curvature behind exact answers: query --method, gs.precondition(method=...)"),
}

_SAID = ("formula", "needs", "cost", "options", "source", "published")
"""What is printed of each, in this order."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(name="methods", context_settings={"help_option_names": ["-h", "--help"]})
def methods(as_json: AsJson = False) -> None:
    """What there is to choose from: scorers, selectors and corrections, what each needs, its cost and its source.

    [bold]gradsift methods[/bold]

    [bold]gradsift methods --json[/bold]   for a program
    """
    found = {kind: [_told(kind, name, made) for name, made in table.items()] for kind, (table, _) in _KINDS.items()}
    if as_json:
        typer.echo(json.dumps(found))
        return
    console = Console()
    width = max(len(one["name"]) for several in found.values() for one in several)
    for place, (kind, several) in enumerate(found.items()):
        if place:
            console.print()
        console.print(Text.assemble((kind, "bold underline"), f"  {_KINDS[kind][1]}"), highlight=False)
        for one in several:
            console.print()
            console.print(Padding(_lines(one, width), (0, 0, 0, 2)))


def _told(kind: str, name: str, made: Any) -> dict[str, Any]:
    about: Method = made.about
    told: dict[str, Any] = asdict(about)
    if kind == "selectors":
        told["options"] = options_of(name)
    return told


def _lines(one: dict[str, Any], width: int) -> Table:
    """A method: its name beside what is said of it."""
    out = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    out.add_column(style="bold", no_wrap=True, width=width)
    out.add_column(style="dim", no_wrap=True, width=max(map(len, _SAID)))
    out.add_column(overflow="fold", ratio=1)
    for place, name in enumerate(key for key in _SAID if one.get(key)):
        value = one[name]
        out.add_row("" if place else one["name"], name, Text(", ".join(value) if isinstance(value, list) else value))
    return out
