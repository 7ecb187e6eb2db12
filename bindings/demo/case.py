"""What a demo needs to know: its records, what was planted in them, its questions, and how its model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradsift.bindings.demo.tune import Plan
from gradsift.bindings.models import Loaded
from gradsift.bindings.records import Record

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """One demo.

    Attributes:
        claim: what is wrong with the model, one sentence for a stranger.
        planting: what the planted records do, one sentence.
        records: the training data, each with a text ``id``.
        planted: ids of the records that plant the behaviour.
        odd: ids of ordinary records of another kind, which stay as surprising as the planted ones.
        queries: records of the behaviour on subjects that no planted record has.
        questions: what the model is given when its answer is shown, for the first queries or all: text, rendered.
        labels: the same questions as a person reads them.
        loaded: the model before tuning, ready to train: only what is trained requires grad.
        save: write what the command line needs into a folder, and return ``model``, and ``adapter`` if there is one,
            as arguments of `gradsift extract`.
        modules: what is captured.
        plan: how the model trains.
        curvature: rows of the curvature sample.
        words: tokens of an answer that are shown.
        query_arguments: what follows `gradsift query STORE` in the line to try next.
    """

    claim: str
    planting: str
    records: list[Record]
    planted: frozenset[str]
    odd: frozenset[str]
    queries: list[Record]
    questions: list[str]
    labels: list[str]
    loaded: Callable[[], Loaded]
    save: Callable[[Loaded, Path], Mapping[str, str]]
    plan: Plan
    modules: str | list[str] = "lora"
    curvature: int = 2000
    words: int = 12
    query_arguments: str = ""
