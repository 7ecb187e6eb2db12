"""`gradsift demo`: the app of all demos."""

from __future__ import annotations

import typer

from gradsift.bindings.demo.diffusion import demo_diffusion
from gradsift.bindings.demo.lm import demo_lm

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Watch gradsift find planted training examples, from nothing, on this machine.",
)
app.command(name="lm")(demo_lm)
app.command(name="diffusion")(demo_diffusion)
