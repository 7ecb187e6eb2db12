"""`gradsift compact`: a store of few bytes per example, with the recall that it will give printed first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.describe import describe
from gradsift.bindings.options import AsJson
from gradsift.bindings.render import bytes_text
from gradsift.engine.compaction.compact import BYTES, compact
from gradsift.engine.compaction.measure import SHORTLIST, K, Recall
from gradsift.engine.compaction.store import CompactStore
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["app", "compact_command"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(name="compact", context_settings={"help_option_names": ["-h", "--help"]})
def compact_command(
    store: Annotated[Path, typer.Argument(help="A store that `gradsift extract` wrote.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="The compacted store to write, a new folder.  \\[default: train.compact for train.zarr]"),
    ] = None,
    bytes_: Annotated[
        int | None,
        typer.Option("--bytes", help=f"Of each example's code, its scale included.  \\[default: {BYTES}]"),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(help="Instead of --bytes: the smallest size whose short list, scored again, has this recall."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Per number: 1, 2, 4 or 8.  \\[default: 2; 4 from 256 bytes on]")
    ] = None,
    scorer: Annotated[
        str,
        typer.Option(help="Whose answers are to survive: fisher, dot, cosine, or another whose scores are products."),
    ] = "fisher",
    append: Annotated[
        bool, typer.Option("--append", help="Add the examples to the compacted store at --out, along its axes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Keep 64 to 512 bytes of each example, and still find what the whole store finds.

    [bold]gradsift compact train.zarr --bytes 128[/bold]

    [bold]gradsift compact train.zarr --recall 0.95 --out small.compact[/bold]

    What the codes find of the whole store's best 10 is measured on examples held out of the axes, and printed before
    anything is written. Then ask the small store as you would the large one.

    [dim]examples that came later[/dim]
    [bold]gradsift compact more.zarr --append --out train.compact[/bold]
    """
    opened, console = FeatureStore.open(store), Console()
    out = out or store.with_suffix(".compact")
    if append:
        if (bytes_, recall, bits) != (None, None, None):
            raise DataError("--append codes along the axes that are there: leave --bytes, --recall and --bits out")
        made = CompactStore.open(out).append(opened)
    else:
        lines = _Lines(console, quiet=as_json)
        made = compact(opened, out, bytes_, recall, bits=bits, scorer=scorer, report=lines.add)
    found = describe(made)
    if as_json:
        typer.echo(json.dumps(found))
        return
    if append:
        added = made.metadata["compacted"]["appended"][-1]
        console.print(
            f"added  {added['rows']:,} examples, {added['outside']:.1%} of their squared length outside the axes",
            highlight=False,
        )
    console.print(
        f"[green]done[/green]  {escape(str(out))}: {len(made):,} examples in {made.bytes} bytes each, "
        f"{bytes_text(found['bytes'])} with axes, curvature sample, ids and norms",
        highlight=False,
    )
    console.print(f"next  gradsift query {escape(str(out))} --exact ...", highlight=False)


class _Lines:
    """A table that grows by a line whenever a recall was measured."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet, self._begun = console, quiet, False

    def add(self, recall: Recall) -> None:
        if self._quiet:
            return
        if not self._begun:
            self._begun = True
            names = f"{'bytes':>6}{'numbers':>9}{'bits':>6}{'alone':>8}{f'list of {SHORTLIST}':>13}"
            self._console.print(
                f"recall@{K} of the whole store's {escape(recall.scorer)} answers, {recall.queries} {recall.asked} as "
                f"queries;\nlists of {SHORTLIST} scored again by the whole rows, in place of exact gradients\n"
                f"[bold]{names}[/bold]",
                highlight=False,
            )
        self._console.print(
            f"{recall.bytes:>6}{recall.axes:>9}{recall.bits:>6}{recall.alone:>8.3f}{recall.listed:>13.3f}",
            highlight=False,
        )
