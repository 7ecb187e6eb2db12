"""What a loss asks of the model inside its wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

__all__ = ["find_inside", "forward_arguments"]


def find_inside(model: nn.Module, what: Callable[[nn.Module], Any]) -> Any:
    """The first true answer along the model, its wrapped model (DDP, compile, PEFT), and so on inwards; else None."""
    return next((answer for answer in map(what, _inwards(model)) if answer), None)


def forward_arguments(model: nn.Module) -> set[str] | None:
    """What the innermost model's forward takes by name; None when it takes anything. Wrappers only say **kwargs."""
    *_, innermost = _inwards(model)
    parameters = inspect.signature(innermost.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def _inwards(model: Any) -> Iterator[nn.Module]:
    seen: set[int] = set()
    while isinstance(model, nn.Module) and id(model) not in seen:
        yield model
        seen.add(id(model))
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        get_base = getattr(model, "get_base_model", None)
        model = inner or (get_base() if callable(get_base) else None)
