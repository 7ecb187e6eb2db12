"""The command line in this process, as a user meets it: what it returned and printed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from gradsift.bindings.cli import main


class Run(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Run]


@contextmanager
def commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs `gradsift` with some arguments; logging and hooks are as before afterwards."""
    handlers, level, hook = logging.root.handlers[:], logging.getLogger("gradsift").level, sys.excepthook
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["gradsift", *arguments])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return Run(int(code or 0), *capsys.readouterr())

    yield run
    logging.root.handlers[:] = handlers
    logging.getLogger("gradsift").setLevel(level)
    sys.excepthook = hook


def refused(run: Run, *words: str) -> None:
    """Exit code 2 with one sentence that has these words."""
    assert run.code == 2, run
    assert run.err.count("\n") == 1, run.err
    assert "Traceback" not in run.err
    for word in words:
        assert word in run.err
