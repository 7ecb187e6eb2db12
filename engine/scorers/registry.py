"""Scorers by name."""

from __future__ import annotations

import inspect
from typing import Any

from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.scorers.datainf import DataInf
from gradsift.engine.scorers.dmin import DMin
from gradsift.engine.scorers.empirical import DTrak, Trak
from gradsift.engine.scorers.fisher import TrueFisher
from gradsift.engine.scorers.less import Less
from gradsift.engine.scorers.own import FisherSelf, SelfInfluence
from gradsift.engine.scorers.plain import Cosine, Dot
from gradsift.engine.scorers.protocol import LinearScorer, Scorer
from gradsift.kernels.errors import SpecError

__all__ = ["SCORERS", "scorer_of"]

_BUILT_IN: tuple[Any, ...] = (TrueFisher, Dot, Cosine, Less, DataInf, Trak, DMin, DTrak, SelfInfluence, FisherSelf)

SCORERS: dict[str, type] = {cls.about.name: cls for cls in _BUILT_IN}
"""Built-in scorers by the names that ``topk`` and ``select`` take; each has ``about``."""


def scorer_of(given: str | Fisher | Scorer | LinearScorer, damping: float | None = None) -> Scorer | LinearScorer:
    """The scorer that a user named or made.

    Args:
        given: a name; an instance, taken as it is; or a fitted ``Fisher``.
        damping: of a scorer that has one; its own default unless given.

    Raises:
        SpecError: there is no scorer of this name, it is no scorer, or it has no damping.
    """
    if isinstance(given, Fisher):
        given = TrueFisher(fitted=given)
    if isinstance(given, str):
        if given not in SCORERS:
            raise SpecError(f"scorer is {given!r}, expected {', '.join(map(repr, SCORERS))}, or a scorer of your own")
        made = SCORERS[given]
        if damping is None:
            return _checked(made())
        if "damping" not in inspect.signature(made).parameters:
            raise SpecError(f"damping is {damping} but the scorer {given!r} has none: leave it out")
        return _checked(made(damping=damping))
    if damping is not None:
        raise SpecError(f"damping is {damping} but the scorer was already made: give it when you make the scorer")
    return _checked(given)


def _checked(scorer: Any) -> Scorer | LinearScorer:
    if isinstance(scorer, type) or not all(callable(getattr(scorer, method, None)) for method in ("prepare", "score")):
        raise SpecError(
            f"scorer is {scorer!r}, expected a name or an instance with the methods prepare(store) and "
            "score(queries, rows)"
        )
    found: Scorer | LinearScorer = scorer
    return found
