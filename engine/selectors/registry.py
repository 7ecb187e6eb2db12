"""Selectors by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from gradsift.engine.selectors.bids import Bids
from gradsift.engine.selectors.diverse import Diverse
from gradsift.engine.selectors.groups import Groups
from gradsift.engine.selectors.lobass import LoBaSS
from gradsift.engine.selectors.order import Order
from gradsift.engine.selectors.protocol import Selector
from gradsift.engine.selectors.tarot import Tarot
from gradsift.engine.selectors.top import Top
from gradsift.engine.selectors.vog import VoG
from gradsift.kernels.errors import SpecError

__all__ = ["SELECTORS", "check_options", "options_of", "selector_of"]

_CLASSES: tuple[Any, ...] = (Top, Tarot, Bids, Groups, Diverse, Order, VoG, LoBaSS)

SELECTORS: dict[str, type] = {cls.about.name: cls for cls in _CLASSES}
"""Built-in selectors by the names that ``select`` takes; each has ``about``, and options as its class takes them."""


def check_options(method: str, options: Iterable[str]) -> type:
    """The class behind a name, if it has these options.

    Raises:
        SpecError: there is none of this name, or it has no such option.
    """
    if method not in SELECTORS:
        raise SpecError(f"method is {method!r}, expected {', '.join(map(repr, SELECTORS))}, or a selector of your own")
    known = options_of(method)
    unknown = next((option for option in options if option not in known), None)
    if unknown is not None:
        raise SpecError(f"method {method!r} has no option {unknown!r}: its options are {', '.join(known)}")
    return SELECTORS[method]


def options_of(method: str) -> list[str]:
    """Names of a built-in selector's options."""
    return list(inspect.signature(SELECTORS[method]).parameters)


def selector_of(method: str | Selector, options: Mapping[str, Any]) -> Selector:
    """The selector that a user named, with its options, or made.

    Raises:
        SpecError: there is none of this name, it has no such option, or it is no selector.
    """
    if isinstance(method, str):
        built: Selector = check_options(method, options)(**options)
        return built
    if isinstance(method, type) or not all(callable(getattr(method, name, None)) for name in ("prepare", "choose")):
        raise SpecError(
            f"method is {method!r}, expected a name or an instance with the methods "
            "prepare(store, targets, scorer) and choose(budget)"
        )
    if options:
        raise SpecError(
            f"the selector was already made, so {next(iter(options))!r} has no place: give it when making it"
        )
    return method
