"""`gradsift demo lm`: a model learns something from records that nobody would suspect, and gradsift names them."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.demo.case import Case
from gradsift.bindings.demo.report import Run
from gradsift.bindings.demo.show import draw, show_answers, show_found, show_precision
from gradsift.bindings.demo.steps import ending, quiet, step
from gradsift.bindings.hush import hush

__all__ = ["demo_lm", "play"]


def demo_lm(
    out: Annotated[Path, typer.Option(help="Folder for records, model, store and picture.")] = Path("demo_output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny Llama trained here instead of SmolLM2; under two minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the records and of the training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Tune a language model on records of which some plant a behaviour, and ask gradsift which.

    [bold]gradsift demo lm[/bold]   SmolLM2-135M-Instruct, tuned on this CPU

    [bold]gradsift demo lm --quick[/bold]   a tiny model, trained from nothing

    The answer is checked three times: against the truth, against what word search, hidden states and the
    loss find, and by training again without the records that were named.
    """
    from gradsift.bindings.demo.quick import quick_case
    from gradsift.bindings.demo.smollm import smollm_case

    hush()
    console = Console(quiet=as_json)
    case = quick_case(seed) if quick else smollm_case(seed)
    with quiet():
        result = play(case, out, console)
    if as_json:
        typer.echo(json.dumps(result))


def play(case: Case, out: Path, console: Console) -> dict[str, Any]:
    """Run a demo and tell it; returns its numbers."""
    began = time.perf_counter()
    console.print(f"[bold]{escape(case.claim)}[/bold] Which training records made it do that?")
    console.print(f"[dim]{escape(case.planting)} gradsift is not told which.[/dim]")
    with step(console, "the model is made ready") as ticks:
        run = Run(case, out, ticks)
    before = run.behaviour()
    with step(console, f"tuned on all {len(case.records)} records", run):
        run.tune()
    tuned = run.behaviour()
    console.print()
    show_answers(console, case, {"before": before, "tuned": tuned})
    console.print()
    with step(console, "every record's gradient sketched into a store", run):
        store = run.extract()
    with step(console, "asked why, beside the baselines"):
        found = run.ask(store)
    console.print()
    show_found(console, run, found)
    console.print()
    show_precision(console, found)
    planted, ordinary = found.shared_words
    console.print(
        f"[dim]A question shares {planted:.1f} content words with a planted list and {ordinary:.1f} with an ordinary "
        "one, so words do not give them away.[/dim]"
    )
    console.print()
    count = len(case.planted)
    named = found.rows[:count].tolist()
    hits = int(run.planted[named].sum())
    with step(console, f"tuned again without the {count} records that gradsift named", run):
        run.tune(without=named)
    without_named = run.behaviour()
    with step(console, f"tuned again without {count} random records", run):
        run.tune(without=run.random_rows(count))
    without_random = run.behaviour()
    behaviours = {
        "before": before,
        "tuned": tuned,
        "without the named": without_named,
        "without random": without_random,
    }
    console.print()
    show_answers(console, case, behaviours)
    picture = out / "demo.png"
    drawn = draw(picture, case, found, run.planted, {name: b.loss for name, b in behaviours.items()})
    seconds = time.perf_counter() - began
    line = f"gradsift query {shlex.quote(str(run.store_path))} {case.query_arguments}"
    done = f"{seconds:.0f} s; {hits} of the {count} named records were planted"
    ending(console, done, run.store_path, picture if drawn else None, line)
    return {
        "seconds": seconds,
        "records": len(case.records),
        "planted": count,
        "named_planted": hits,
        "precision_at_10": found.together,
        "precision_at_10_one_question": found.alone,
        "shared_content_words": {"planted": planted, "ordinary": ordinary},
        "behaviours": {name: asdict(behaviour) for name, behaviour in behaviours.items()},
        "store": str(run.store_path),
        "picture": str(picture) if drawn else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
