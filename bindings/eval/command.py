"""`gradsift eval`: does it predict retraining, on your model?"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from gradsift.kernels.errors import DataError

__all__ = ["app"]

_QUERIES = 20
"""Queries without whose best examples is trained again, at most."""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class BuiltIn(StrEnum):
    """Built-in cases."""

    digits = "digits"
    lm = "lm"
    diffusion = "diffusion"
    smollm2 = "smollm2"


@app.command()
def evaluate(
    store: Annotated[
        Path | None, typer.Argument(help="A store that `gradsift extract` wrote.", show_default=False)
    ] = None,
    retrain: Annotated[
        str | None, typer.Option(help="Your training, module:function: called with line numbers and a seed.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(help="Examples whose losses are to be predicted, in the columns of the data.")
    ] = None,
    case: Annotated[BuiltIn | None, typer.Option(help="A built-in case instead of a store.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Only these rows, a glob such as '*fisher*'; may be repeated.")
    ] = None,
    subsets: Annotated[int | None, typer.Option(min=1, help="Random halves to train on.  \\[default: 60]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each half.  \\[default: 2]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="16 halves, one seed, no removal, smaller digits: a first look.")
    ] = False,
    cache: Annotated[Path, typer.Option(help="Where the outcome of every training is kept.")] = Path("fidelity"),
    out: Annotated[Path | None, typer.Option(help="A picture to draw, such as fidelity.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Train again on parts of the data, and see which method had predicted it.

    [bold]gradsift eval --case digits[/bold]   a built-in case; lm, diffusion and smollm2 take longer

    [dim]your own model: retrain(lines, seed) in train.py trains on these lines of the data file, counted from 0, and
    returns the model or the folder of its adapter[/dim]
    [bold]gradsift eval train.zarr --retrain train:retrain --queries questions.jsonl --out fidelity.png[/bold]

    Every outcome is kept at once: stopped at any moment, the same command goes on where it was, and run in several
    shells (on several GPUs) it shares the trainings.
    """
    from gradsift.bindings.eval.render import print_evaluation
    from gradsift.bindings.hush import hush
    from gradsift.bindings.render import ticking
    from gradsift.engine.fidelity.evaluate import REMOVED
    from gradsift.engine.fidelity.evaluate import evaluate as run

    if (case is None) == (store is None):
        raise DataError("give either a store with --retrain and --queries, or --case digits, lm, diffusion or smollm2")
    if store is not None and (retrain is None or queries is None):
        raise DataError("a store alone cannot be trained again: give --retrain module:function and --queries FILE too")
    if case is not None and (retrain is not None or queries is not None):
        raise DataError(f"--case {case.value} brings its own training and queries: leave --retrain and --queries out")
    hush()
    if out is not None:
        from gradsift.bindings.eval.plot import check

        check(out)
    with ticking("making the case") as tick:
        made = _built_in(case, cache, quick, tick) if case is not None else _own(store, retrain, queries)
    count, times = subsets or (16 if quick else 60), seeds or (1 if quick else 2)
    removed = () if quick else REMOVED
    if not as_json:
        Console(stderr=True).print(_cost(count, times, len(removed), cache), highlight=False)
    with ticking("training") as tick:
        found = run(
            made,
            method,
            cache,
            count=count,
            seeds=times,
            removed=removed,
            remove_queries=_QUERIES,
            progress=lambda what, done, total: tick(done, total, what),
        )
    console = Console()
    if as_json:
        typer.echo(json.dumps({**found.to_json(), "picture": None if out is None else str(out)}))
    else:
        print_evaluation(console, found)
    if out is not None:
        from gradsift.bindings.eval.plot import draw

        draw(out, found)
        if not as_json:
            console.print(f"[green]done[/green]  {escape(str(out))}")


def _cost(halves: int, seeds: int, methods: int, cache: Path) -> str:
    """How often is trained at most, which says how long this takes."""
    from gradsift.engine.fidelity.methods import MODELS

    parts = [f"{halves} halves x {seeds} seed" + "s" * (seeds > 1)]
    if methods:
        parts.append(f"{methods} methods x {_QUERIES} queries + 1 for the removal of the best")
    parts.append(f"{MODELS - 1} for the row of {MODELS} models, where it fits")
    most = halves * seeds + (methods * _QUERIES + 1 if methods else 0) + MODELS - 1
    told = f"at most {most} retrainings: {', '.join(parts)}; what '{cache}' holds is not trained again"
    return f"[dim]{escape(told)}[/dim]"


def _built_in(case: BuiltIn, cache: Path, quick: bool, tick: Any) -> Any:
    if case == BuiltIn.digits:
        from gradsift.bindings.eval.cases.digits import digits_case

        return digits_case(200) if quick else digits_case()
    if case == BuiltIn.lm:
        from gradsift.bindings.eval.cases.lm import lm_case

        return lm_case(cache, report=tick)
    if case == BuiltIn.diffusion:
        from gradsift.bindings.eval.cases.diffusion import diffusion_case

        return diffusion_case(cache, tick)
    from gradsift.bindings.eval.cases.smollm2 import smollm2_case

    return smollm2_case()


def _own(store: Path | None, retrain: str | None, queries: str | None) -> Any:
    from gradsift.bindings.eval.own import function, own_case
    from gradsift.bindings.losses import loss_of
    from gradsift.bindings.workspace import Workspace, remembered
    from gradsift.engine.store.reader import FeatureStore

    assert store is not None and retrain is not None and queries is not None
    trains, key = function(retrain)
    opened = FeatureStore.open(store)
    kind = opened.metadata["loss"]["kind"]
    if kind != loss_of(opened).kind:  # such as a diffusion model's
        raise DataError(
            f"'{store}' holds rows of the loss {kind}, which no training of the command line has: evaluate it from "
            "Python, gs.evaluate(gs.FidelityCase(...)), as docs/fidelity.md shows"
        )
    space = Workspace(opened, remembered(opened))
    return own_case(space, space.questions(queries), trains, key, store.stem)
