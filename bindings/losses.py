"""Losses by their names on the command line: what options each has, and which columns it reads."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradsift.bindings.space import Loss
from gradsift.engine.losses import DPO, PolicyGradient, language_model
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["forms_of", "loss_named", "loss_of"]

_MADE: dict[str, type[DPO] | type[PolicyGradient]] = {"dpo": DPO, "policy_gradient": PolicyGradient}
_LANGUAGE = ("messages", "prompt", "text")
_FORMS = {"dpo": ("pair",), "policy_gradient": ("rollouts",)}


def loss_named(name: str, options: Sequence[str] = ()) -> Loss:
    """A loss by its name, with options as a user writes them: ``beta=0.2``.

    Raises:
        DataError: it has no such option, or one of another type.
        SpecError: a value is out of range.
    """
    if name not in _MADE:
        if options:
            raise DataError(f"the loss {name} has no options but --loss-option {options[0]} is given: leave it out")
        return language_model
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(_MADE[name]).parameters.values()
        if parameter.name != "reference"
    }
    given: dict[str, Any] = {}
    for option in options:
        key, found, text = option.partition("=")
        if not found or key not in defaults:
            raise DataError(
                f"--loss-option {option}: expected NAME=VALUE, where the loss {name} has {', '.join(sorted(defaults))}"
            )
        given[key] = _value(text, defaults[key], option)
    return _MADE[name](**given)


def loss_of(store: FeatureStore) -> Loss:
    """The loss that a store's rows are gradients of."""
    settings: Mapping[str, Any] = store.metadata["loss"].get("settings") or {}
    made = _MADE.get(str(settings.get("name")))
    return language_model if made is None else made.from_settings(settings)


def forms_of(loss: Loss) -> tuple[str, ...]:
    """Forms of record that a loss is taken of: see ``encode.form_of``."""
    settings = getattr(loss, "settings", None) or {}
    return _FORMS.get(str(settings.get("name")), _LANGUAGE)


def _value(text: str, default: Any, option: str) -> Any:
    """What a user's text means for an option that usually has this value; None stands for a number."""
    if isinstance(default, str):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    wanted = bool if isinstance(default, bool) else int | float
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        what = "true or false" if isinstance(default, bool) else "a number"
        raise DataError(f"--loss-option {option}: expected {what}")
    return value
