"""Which module serves a command: loaded when it is called, and the twin for diffusion models where one is asked for."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from gradsift.bindings.options import Kind

__all__ = ["Commands", "OfKind"]

_ELSEWHERE = {
    "check": (
        "gradsift.bindings.check.command",
        "Prove on a few of your own examples that gradsift is right about your model.",
    ),
    "compact": (
        "gradsift.bindings.compact",
        "Keep a few bytes of each example, and still find what the whole store finds.",
    ),
    "demo": (
        "gradsift.bindings.demo.command",
        "Watch gradsift find planted training examples, from nothing, on this machine.",
    ),
    "eval": (
        "gradsift.bindings.eval.command",
        "Train again on parts of the data, and see which method had predicted it.",
    ),
    "methods": (
        "gradsift.bindings.methods",
        "The scorers, selectors and corrections that exist, what each needs and costs.",
    ),
}
"""Commands whose module is imported when they are called; each has a typer app named `app`."""


_DIFFUSION = {
    "extract": ("gradsift.bindings.diffusion.command", "extract"),
    "query": ("gradsift.bindings.diffusion.command", "query"),
    "select": ("gradsift.bindings.diffusion.command", "select"),
    "check": ("gradsift.bindings.diffusion.check", "app"),
}
"""Where the twins of commands for diffusion models are: module, and typer app."""


class _Elsewhere(TyperCommand):
    """Stands for a command of another module, so that `gradsift --help` need not import it."""

    def __init__(self, name: str, module: str, help: str) -> None:
        super().__init__(name, help=help)
        self._module = module

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        real = typer.main.get_command(import_module(self._module).app)
        return real.make_context(info_name, args, parent=parent, **extra)


class OfKind(TyperCommand):
    """A command that has a twin for diffusion models, with options of its own: chosen by --kind, or by the store."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Of the twin, where the arguments are about a diffusion model."""
        if _kind(args) != Kind.diffusion:
            return super().make_context(info_name, args, parent=parent, **extra)
        module, name = _DIFFUSION[str(self.name)]
        twin = typer.main.get_command(getattr(import_module(module), name))
        return twin.make_context(info_name, args, parent=parent, **extra)


def _kind(args: list[str]) -> str:
    """What --kind says; else what a store among the arguments was made from."""
    for place, argument in enumerate(args):
        if argument == "--kind":
            return args[place + 1] if place + 1 < len(args) else ""
        if argument.startswith("--kind="):
            return argument.removeprefix("--kind=")
    for argument in args:
        try:
            text = (Path(argument) / "zarr.json").read_text(encoding="utf-8")
            return str(json.loads(text)["attributes"]["gradsift"]["notes"].get("kind", Kind.lm))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
    return Kind.lm


class Commands(TyperGroup):
    """Own commands first, in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return ["demo", "check", *super().list_commands(ctx), "eval", "methods"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, or what stands for it until it is called."""
        if cmd_name in _ELSEWHERE:
            return _Elsewhere(cmd_name, *_ELSEWHERE[cmd_name])
        return super().get_command(ctx, cmd_name)
