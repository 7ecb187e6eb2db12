"""Real processes, really killed: whatever the instant, the next run ends in the bytes of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from killable import INSTANTS, run, slow_checkpoints
from toy import tree

import gradsift as gs

KILLS = 10
"""At chosen instants, and as many at random ones."""


class Whole(NamedTuple):
    """An extraction that nobody disturbed."""

    files: dict[str, bytes]
    seconds: float
    renames: int


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Processes that start with everything imported: a kill costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["zarr", "numcodecs.vlen", "gradsift.engine.extraction.extract"])
    return context


@pytest.fixture(scope="module")
def whole(context: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    for name in ("warm", "timed"):
        start = time.perf_counter()
        process = _start(context, folder / name, counted=folder / "renames")
        assert _end(process) == 0
        seconds = time.perf_counter() - start
    assert tree(folder / "warm") == tree(folder / "timed")
    return Whole(tree(folder / "timed"), seconds, int((folder / "renames").read_text()))


def _start(context: ForkServerContext, *arguments: object, **named: object) -> BaseProcess:
    process = context.Process(target=run, args=arguments, kwargs=named)
    process.start()
    return process


def _end(process: BaseProcess) -> int | None:
    process.join(60)
    code = process.exitcode
    process.close()
    return code


def _at_chosen_instants(context: ForkServerContext, whole: Whole, folder: Path, kills: int, seed: int) -> None:
    """Every file in turn is left half written, or not yet or just renamed; each store dies once or twice."""
    chance = random.Random(seed)
    done = 0
    while done < kills:
        path = folder / f"{done}.zarr"
        for _ in range(chance.choice([1, 2])):
            instant = INSTANTS[done % len(INSTANTS)]
            process = _start(context, path, instant, chance.randint(1, whole.renames // 2))
            assert _end(process) == -signal.SIGKILL
            done += 1
        _finish(context, whole, path, f"{instant}, seed {seed}")


def _at_random(context: ForkServerContext, whole: Whole, folder: Path, kills: int, seed: int) -> None:
    """A signal from outside after a random time, until a run gets through."""
    chance = random.Random(seed)
    done = attempt = 0
    while done < kills:
        attempt += 1
        path = folder / f"{attempt}.zarr"
        for _ in range(chance.choice([1, 2, 3])):
            process = _start(context, path)
            time.sleep(chance.uniform(0.05, 0.9) * whole.seconds)
            assert process.pid is not None
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            done += _end(process) == -signal.SIGKILL
        _finish(context, whole, path, f"random, seed {seed}, attempt {attempt}")


def _finish(context: ForkServerContext, whole: Whole, path: Path, how: str) -> None:
    assert _end(_start(context, path)) == 0, how
    files = tree(path)
    assert sorted(files) == sorted(whole.files), how
    assert [name for name in files if files[name] != whole.files[name]] == [], how
    gs.FeatureStore.open(path).verify()


def test_killed_at_chosen_instants(context: ForkServerContext, whole: Whole, tmp_path: Path) -> None:
    _at_chosen_instants(context, whole, tmp_path, KILLS, seed=0)


def test_killed_at_random(context: ForkServerContext, whole: Whole, tmp_path: Path) -> None:
    _at_random(context, whole, tmp_path, KILLS, seed=time.time_ns())


def test_killed_at_several_checkpoints_with_adam(context: ForkServerContext, tmp_path: Path) -> None:
    """Checkpoints, groups and Adam's updates: as many files, more columns, the same bytes."""
    whole = tmp_path / "whole"
    assert _end(_start(context, whole, counted=tmp_path / "renames", extract=slow_checkpoints)) == 0
    renames = int((tmp_path / "renames").read_text())
    for number, instant in enumerate(INSTANTS):
        path = tmp_path / str(number)
        killed = _start(context, path, instant, renames * (number + 1) // 5, extract=slow_checkpoints)
        assert _end(killed) == -signal.SIGKILL
        assert _end(_start(context, path, extract=slow_checkpoints)) == 0
        assert tree(path) == tree(whole), instant


@pytest.mark.soak
@pytest.mark.skipif(not os.environ.get("GRADSIFT_SOAK"), reason="a hundred kills: set GRADSIFT_SOAK=1")
def test_killed_a_hundred_times(context: ForkServerContext, whole: Whole, tmp_path: Path) -> None:
    _at_chosen_instants(context, whole, tmp_path / "chosen", 50, seed=time.time_ns())
    _at_random(context, whole, tmp_path / "random", 50, seed=time.time_ns())
