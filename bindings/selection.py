"""What `gradsift select` does: options turned into a selection, and the chosen records as JSONL ready to train on."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.space import Examples, Space
from gradsift.engine.answers.select import Selection, least_share, select, write_jsonl
from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.selectors.registry import SELECTORS, check_options
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["Choosing", "parse_budget", "report", "write_selection"]

_USUAL = "5%"
"""Budget unless one is given or the method finds it."""

_LABELLED = {"groups": "groups", "vog": "classes"}
"""Methods that take labels of the training examples, and what they call them."""

_MOST_SHOWN = 12
"""Groups whose weights are printed."""


@dataclass(frozen=True, slots=True)
class Choosing:
    """How to choose, as the command line has it; whatever can be refused without reading anything is refused here.

    Attributes:
        method: a name of ``SELECTORS``. scorer: a name of ``SCORERS``.
        budget: see ``parse_budget``; None for 5 %, or for a method that finds it.
        tasks: column of the targets with the name of their task.
        labels: column of the training data with labels; or, for "groups", a number of clusters.
        reference: store of the same data under another model, of "lobass".
        rule, reduce: of the methods that have one.

    Raises:
        SpecError: there is no such method, or it has no such option.
        DataError: what the method needs is missing.
    """

    method: str = "top"
    scorer: str = "fisher"
    budget: str | None = None
    tasks: str | None = None
    labels: str | None = None
    reference: Path | None = None
    rule: str | None = None
    reduce: str | None = None

    def __post_init__(self) -> None:
        given = {"rule": self.rule, "reduce": self.reduce, "reference": self.reference}
        given = {name: value for name, value in given.items() if value is not None}
        made = check_options(self.method, given)
        if self.labels is not None and self.method not in _LABELLED:
            raise DataError(f"--labels is of {' and '.join(_LABELLED)} but the method is {self.method}: leave it out")
        if self.method == "groups" and self.labels is None:
            raise DataError("method groups needs --labels: a column of the training data, or a number of clusters")
        if self.method == "lobass" and self.reference is None:
            raise DataError("method lobass needs --reference: a store of the same data under the reference model")
        made(**given, **({"groups": 2} if self.method == "groups" else {}))  # refuses values that its options lack

    def before_reading(self, examples: int, targets: bool) -> None:
        """Refuse what cannot be, before a model is loaded.

        Args:
            examples: rows of the store. targets: whether some are given.

        Raises:
            DataError: the budget does not fit, or targets are missing.
        """
        self.rows(examples)
        alone = not getattr(SELECTORS[self.method], "needs_targets", True)
        alone |= not getattr(SCORERS.get(self.scorer), "needs_queries", True)
        if not targets and not alone:
            raise DataError(f"method {self.method} compares with targets: give --targets")
        if not targets and self.tasks is not None:
            raise DataError("--tasks is a column of the targets but there are none: give both or neither")

    def rows(self, examples: int) -> int | None:
        """The budget in rows; None where the method finds it."""
        if self.budget is None and (self.rule == "otm" or self.method == "order"):
            return None
        return parse_budget(self.budget or _USUAL, examples)

    def options(self, space: Space) -> dict[str, Any]:
        """Options of the method."""
        given: dict[str, Any] = {"rule": self.rule, "reduce": self.reduce}
        options = {name: value for name, value in given.items() if value is not None}
        if self.reference is not None:
            options["reference"] = FeatureStore.open(self.reference)
        if self.labels is not None:
            options[_LABELLED[self.method]] = self._labels(space)
        return options

    def _labels(self, space: Space) -> list[Any] | int:
        indices = space.data.find(list(space.store.ids))
        first = space.data.record(indices[0])
        if self.method == "groups" and str(self.labels).isdigit() and self.labels not in first:
            return int(str(self.labels))
        return [_value(space.data, index, str(self.labels), "training example") for index in indices]


def parse_budget(text: str, examples: int) -> int:
    """A budget as a user writes it: ``5%``, ``0.05`` or ``200``; shares are rounded down.

    Returns:
        number of examples, at least 1.

    Raises:
        DataError: it is none of these, less than one example, or more than there are.
    """
    digits = text.strip().removesuffix("%")
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    share = text.strip().endswith("%") or ("." in digits and 0 < value <= 1)
    if text.strip().endswith("%"):
        value *= examples / 100
    elif share:
        value *= examples
    if not 0 < value <= examples:
        raise DataError(f"budget is '{text}', expected such as 5%, 0.05 or a number up to {examples}")
    count = int(value + 1e-9)
    if count < 1:
        least = 100 * least_share(examples)
        raise DataError(f"a budget of {text} of {examples} examples is less than one: give at least {least:g}%")
    return count


def write_selection(space: Space, targets: Examples | None, choosing: Choosing, out: Path) -> Selection:
    """Select and write; the file appears whole or not at all.

    Each line is the record as it was, with ``id``, ``score``, and ``reason`` and ``weight`` where the method gives them
    (``gradsift_score`` and so on where the record has one of its own).
    """
    tasks = None
    if choosing.tasks is not None and targets is not None:
        tasks = [_value(targets, index, choosing.tasks, "target") for index in range(len(targets))]
    options = choosing.options(space)  # before any gradient is taken: labels may be refused
    chosen = select(
        space.store,
        None if targets is None else space.capture(targets),
        choosing.rows(len(space.store)),
        choosing.method,
        scorer=choosing.scorer,
        tasks=tasks,
        **options,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, _lines(space, chosen))
    return chosen


def report(chosen: Selection, out: Path, total: int, as_json: bool) -> None:
    """Print what was chosen, of how many, and what else the method says."""
    if as_json:
        typer.echo(json.dumps(_summary(chosen, out, total)))
        return
    console = Console()
    found = f"{len(set(chosen.rows.tolist())):,} of {total:,} examples"
    if len(chosen.rows):
        found += f", scores {chosen.scores[0]:+.4g} to {chosen.scores[-1]:+.4g}"
    console.print(f"[green]done[/green]  {escape(str(out))}: {found}")
    for name, value in chosen.facts.items():
        console.print(f"      {name.replace('_', ' ')} {value:.4g}", highlight=False)
    if isinstance(chosen.weights, Mapping):
        ranked = sorted(chosen.weights.items(), key=lambda pair: -pair[1])
        shares = ", ".join(f"{escape(str(name))} {weight:.1%}" for name, weight in ranked[:_MOST_SHOWN])
        more = f", and {len(ranked) - _MOST_SHOWN} more" if len(ranked) > _MOST_SHOWN else ""
        console.print(f"      mixture in tokens: {shares}{more}", highlight=False)


def _summary(chosen: Selection, out: Path, total: int) -> dict[str, Any]:
    scores = chosen.scores
    found: dict[str, Any] = {
        "out": str(out),
        "method": chosen.method,
        "scorer": chosen.scorer,
        "chosen": len(set(chosen.rows.tolist())),
        "of": total,
        "dropped": len(chosen.dropped),
        "best": float(scores[0]) if len(scores) else None,
        "last": float(scores[-1]) if len(scores) else None,
        "facts": dict(chosen.facts),
    }
    if isinstance(chosen.weights, Mapping):
        found["weights"] = {str(name): weight for name, weight in chosen.weights.items()}
    return found


def _lines(space: Space, chosen: Selection) -> Iterator[dict[str, Any]]:
    indices = space.data.find([space.store.ids[row] for row in chosen.rows.tolist()])
    for place, index in enumerate(indices):
        record = space.data.record(index)
        said: dict[str, Any] = {"score": float(chosen.scores[place])}
        if chosen.reasons is not None:
            said["reason"] = chosen.reasons[place]
        if isinstance(chosen.weights, np.ndarray):
            said["weight"] = float(chosen.weights[place])
        yield {
            "id": space.data.id(index),
            **record,
            **{f"gradsift_{name}" if name in record else name: value for name, value in said.items()},
        }


def _value(examples: Examples, index: int, column: str, what: str) -> Any:
    """A label of an example, from a column of its record."""
    value = examples.record(index).get(column)
    if value is None or value == "":
        raise DataError(f"{what} {examples.id(index)!r} has nothing in column {column!r}: give every one a label")
    if not isinstance(value, Hashable):
        raise DataError(
            f"{what} {examples.id(index)!r} has a {type(value).__name__} in column {column!r}, expected text or a "
            "number"
        )
    return value
