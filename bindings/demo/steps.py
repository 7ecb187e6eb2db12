"""How a demo tells of its steps: a bar while one runs, a line with its seconds when it is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from gradsift.bindings.render import ticking

__all__ = ["Ticks", "ending", "quiet", "step"]

Ticks = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class _Ticking(Protocol):
    ticks: Ticks


@contextmanager
def quiet() -> Iterator[None]:
    """No notes of the engine about what a demo does on purpose, such as leaving the tiny model's norms out."""
    logger = logging.getLogger("gradsift")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def step(console: Console, what: str, run: _Ticking | None = None) -> Iterator[Ticks]:
    """A bar on a terminal while a step runs, which the run's ``ticks`` move; then a line with its seconds."""
    start = time.perf_counter()
    with ticking(what) as ticks:
        if run is not None:
            run.ticks = ticks
        yield ticks
    console.print(f"[dim]{time.perf_counter() - start:6.1f} s  {escape(what)}[/dim]", highlight=False)


def ending(console: Console, done: str, store: Path, picture: Path | None, command: str) -> None:
    """What was found, where it lies, and what to try next; no picture where none could be drawn."""
    console.print()
    console.print(f"[green]done[/green]  {escape(done)}")
    console.print(f"store    {escape(str(store))}", highlight=False)
    if picture is not None:
        console.print(f"picture  {escape(str(picture))}", highlight=False)
    console.print(f"next     {escape(command)}", highlight=False, soft_wrap=True)
