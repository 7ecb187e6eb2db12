"""Replay: a tapped model's first call once more, to see whether examples keep to their own rows.

A tap never sees losses per example, so it asks the model's output instead: the part that belongs to one example must
depend on that example's rows alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Replay"]


class Replay:
    """Remembers the first call of a model while a tap is open."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def watch(self) -> RemovableHandle:
        """Remember the arguments of the next call; references, not copies."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._call is None and torch.is_grad_enabled():
                self._call = args, dict(kwargs)

        return self._model.register_forward_pre_hook(hook, with_kwargs=True)

    def output(self) -> Tensor | None:
        """The output of the remembered call, computed again: its logits, or its first floating-point tensor."""
        if self._call is None:
            return None
        args, kwargs = self._call
        return _main_tensor(self._model(*args, **kwargs))

    def forget(self) -> None:
        """Drop the references."""
        self._call = None


def _main_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() and output.ndim >= 2 else None
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values: Iterable[Any] = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    )
    return next((found for value in values if (found := _main_tensor(value)) is not None), None)
