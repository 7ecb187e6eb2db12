"""`gradsift demo diffusion`: a model that is asked for a three draws an eight, and gradsift names who taught it."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gradsift.bindings.demo.digits import EIGHT, THREE, DigitsCase
from gradsift.bindings.demo.digits_picture import paint
from gradsift.bindings.demo.digits_run import Run
from gradsift.bindings.demo.digits_show import show_answer, show_precision, show_shares
from gradsift.bindings.demo.steps import ending, quiet, step

__all__ = ["demo_diffusion", "play"]


def demo_diffusion(
    out: Annotated[Path, typer.Option(help="Folder for images, models, store and picture.")] = Path("demo_output"),
    seed: Annotated[int, typer.Option(help="Of the choice of images and of the training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Tune a diffusion model on digits of which some are labelled wrongly, and ask gradsift which.

    [bold]gradsift demo diffusion[/bold]   a small UNet, trained on this CPU in a few minutes, and kept

    The answer is checked twice: against the truth, beside what similar pixels find, and by training again without
    the images that were named. The base model is kept, so a second run is faster.
    """
    from gradsift.bindings.hush import hush

    hush("diffusers")
    with quiet():
        result = play(DigitsCase(seed), out, Console(quiet=as_json))
    if as_json:
        typer.echo(json.dumps(result))


def play(case: DigitsCase, out: Path, console: Console) -> dict[str, Any]:
    """Run the demo and tell it; returns its numbers."""
    began = time.perf_counter()
    total = case.planted + sum(case.ordinary.values())
    console.print(
        f"[bold]Asked for a {THREE}, a tuned diffusion model now and then draws an {EIGHT}.[/bold] Which training "
        "images taught it that?"
    )
    console.print(
        f"[dim]{case.planted} of {total} images are eights labelled {THREE}. gradsift is not told which.[/dim]"
    )
    with step(console, "a class-conditional UNet learns digits, or is read") as ticks:
        run = Run(case, out, ticks)
    drawn = {}
    with step(console, f"it draws {case.drawn} pictures", run):
        drawn["before tuning"] = run.drawn()
    with step(console, f"a LoRA is tuned on all {total} images", run):
        run.tune()
    with step(console, f"it draws {case.drawn} pictures", run):
        drawn["tuned"] = run.drawn()
    with step(console, "every image's gradient sketched into a store", run):
        store = run.extract()
    with step(console, "asked why, beside the baselines", run):
        found = run.ask(store, drawn["before tuning"], drawn["tuned"])
    console.print()
    show_answer(console, run, found)
    console.print()
    show_precision(console, found, case.planted)
    console.print()
    named = found.rows[: case.planted].tolist()
    hits = int(run.digits.planted[named].sum())
    with step(console, f"tuned again without the {case.planted} images that gradsift named", run):
        run.tune(without=named)
    with step(console, f"it draws {case.drawn} pictures", run):
        drawn["without the named"] = run.drawn()
    with step(console, f"tuned again without {case.planted} random images", run):
        run.tune(without=run.random_rows(case.planted))
    with step(console, f"it draws {case.drawn} pictures", run):
        drawn["without random"] = run.drawn()
    console.print()
    show_shares(console, drawn)
    picture = out / "demo_diffusion.png"
    painted = paint(picture, run, found, drawn)
    seconds = time.perf_counter() - began
    store_at, wrong = shlex.quote(str(run.store_path)), shlex.quote(str(run.query_path))
    line = (
        f"gradsift query {store_at} --image {wrong} --label {THREE} --exact --sample {case.exact_rows} "
        f"--out {shlex.quote(str(out / 'grid.png'))}"
    )
    done = f"{seconds:.0f} s; {hits} of the {case.planted} named images were planted"
    ending(console, done, run.store_path, picture if painted else None, line)
    return {
        "seconds": seconds,
        "images": total,
        "planted": case.planted,
        "named_planted": hits,
        "queries": len(run.wrong(drawn["tuned"])),
        "precision_at_10": found.alone,
        "share_of_planted_all_as_one": found.together,
        "eights": {name: each.share for name, each in drawn.items()},
        "store": str(run.store_path),
        "picture": str(picture) if painted else None,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
