"""What a selector is: a class of two methods, prepared once for a store and its targets, then asked for any budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradsift.engine.answers.given import Given
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.protocol import Queries
from gradsift.engine.selectors.tasks import Tasks
from gradsift.kernels.errors import DataError, SpecError

__all__ = ["Choice", "Selector", "Targets", "called", "only_of", "wanted"]


@dataclass(frozen=True, slots=True)
class Targets:
    """Examples of what the model should do, compared with the store already.

    Attributes:
        given: as they were given, for whatever takes queries, such as ``topk``.
        queries: their gradients and norms.
        tasks: which target belongs to which task.
    """

    given: Given
    queries: Queries
    tasks: Tasks


class Choice(NamedTuple):
    """What a selector chose; a plain tuple of the first three is one too.

    Attributes:
        rows: int64 (m,), in the order in which they are to be taken.
        scores: float64 (m,), what each was chosen by.
        reasons: m sentences, or None.
        weights: float64 (m,), where the method weighs what it chose; or the weight of each domain.
        facts: numbers that the method finds by the way, by name.
    """

    rows: np.ndarray
    scores: np.ndarray
    reasons: list[str] | None = None
    weights: np.ndarray | Mapping[Any, float] | None = None
    facts: Mapping[str, float] | None = None


class Selector(Protocol):
    """A way to choose rows; ``gs.select(store, targets, budget, method=...)`` takes an instance.

    Attributes that are read where they are there:
        about: a ``Method`` in words; its name stands in results, else the class's name.
        needs_targets: False for a choice by rows alone.
        scorer: after ``prepare``, the name of the scorer that was used.
    """

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Read what is needed of the store, once; refuse a store or targets that do not fit.

        Args:
            store: the rows.
            targets: what the rows are to help; None when none were given.
            scorer: as of ``topk``.
        """

    def choose(self, budget: int | None) -> Choice | tuple[Any, Any, Any]:
        """At most ``budget`` rows, their scores, and a reason for each or None.

        Args:
            budget: rows; None when the caller leaves the number to the selector.
        """


def called(selector: Selector) -> str:
    """What results call a selector: the name it has, else that of its class."""
    return str(getattr(getattr(selector, "about", None), "name", None) or type(selector).__name__)


def wanted(budget: int | None, method: str) -> int:
    """The budget of a method that does not find one by itself."""
    if budget is None:
        raise DataError(f"method {method!r} does not find how many rows to take by itself: give a budget")
    return budget


def only_of(rule: str, options: Mapping[str, tuple[str, Any, Any]]) -> None:
    """Refuse options of another rule than the one that is used, which would change nothing.

    Args:
        options: name -> (its rule, its value, its default).
    """
    for name, (owner, value, default) in options.items():
        if owner != rule and value != default:
            raise SpecError(f"{name} is an option of rule={owner!r} but rule is {rule!r}: leave it out")
