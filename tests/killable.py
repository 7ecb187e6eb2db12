"""An extraction that kills its own process (SIGKILL) at a chosen instant; test_kill runs it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from toy import ToyLoss, toy_extract, toy_model

import gradsift as gs

INSTANTS = ("half written", "before rename", "after rename")


class SlowLoss(ToyLoss):
    """Takes long enough for a signal from outside to fall between any two steps."""

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        time.sleep(0.004)
        return super().__call__(model, batch)

    def sampled(self, model: Any, batch: Any, seeds: Any) -> torch.Tensor:
        time.sleep(0.004)
        return super().sampled(model, batch, seeds)


def slow_toy(path: Path) -> None:
    toy_extract(path, loss_fn=SlowLoss())


def slow_checkpoints(path: Path) -> None:
    """At two checkpoints, with moments, in groups."""
    checkpoints = []
    for seed in (1, 2):
        weights = {name: p.detach() for name, p in toy_model(seed).named_parameters()}
        own = {name: w for name, w in weights.items() if name.endswith("weight")}
        adam = gs.AdamMoments(own, {name: w.square() for name, w in own.items()}, {})
        checkpoints.append(gs.Checkpoint(weights, 1.0 / seed, adam))
    toy_extract(path, loss_fn=SlowLoss(), checkpoints=checkpoints, groups="map")


def run(
    path: Path,
    instant: str | None = None,
    count: int = 0,
    counted: Path | None = None,
    extract: Callable[[Path], Any] = slow_toy,
) -> None:
    """Extract to ``path``; die at the ``count``-th ``instant`` if one is given.

    Args:
        counted: a file that receives how often a file was put in its place.
        extract: extracts to a path.
    """
    torch.set_num_threads(1)
    renames = _hook(Path, "replace", instant, "before rename", "after rename", count)
    _hook(os, "fsync", instant, "half written", None, count)
    extract(path)
    if counted is not None:
        counted.write_text(str(renames()))


def _hook(owner: Any, name: str, instant: str | None, before: str, after: str | None, count: int) -> Callable[[], int]:
    real = getattr(owner, name)
    calls = 0

    def hooked(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if instant == before and calls == count:
            _die(arguments[0])
        result = real(*arguments)
        if instant == after and calls == count:
            _die(arguments[0])
        return result

    setattr(owner, name, hooked)
    return lambda: calls


def _die(file: Any) -> None:
    if isinstance(file, int):  # about to be flushed: leave a part of what was written
        with suppress(OSError):  # of a folder
            os.ftruncate(file, os.fstat(file).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)
