"""The reference model of a loss: another model, or the same one with its adapters off, without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.losses.language import LanguageModelLoss
from gradsift.kernels.errors import DataError, SpecError

__all__ = ["Reference", "adapters_off", "reference_logps", "reference_name"]

Reference = Literal["adapter"] | nn.Module
"""Where reference log-probabilities come from: the model itself with its adapters off, or another model."""


def reference_name(reference: Reference) -> str:
    """In words, for a loss's ``kind``; a model by its class."""
    if isinstance(reference, nn.Module):
        return f"a {type(reference).__name__}"
    if reference != "adapter":
        raise SpecError(f"reference is {reference!r}, expected 'adapter' or the reference model itself")
    return "the model without its adapter"


def reference_logps(
    model: nn.Module, batch: Mapping[str, Any], reference: Reference, loss: LanguageModelLoss, stored: str
) -> Tensor:
    """Log-probability of each label under the reference, (rows, T), 0 where there is none; no gradient.

    The reference runs in eval mode, its dropout off.

    Args:
        stored: the columns that would hold these numbers, for an error's advice.

    Raises:
        DataError: the model has no adapter that could be off.
    """
    with torch.no_grad():
        if isinstance(reference, nn.Module):
            with evaluating(reference):
                return -loss.token_losses(reference, batch).detach()
        with evaluating(model), adapters_off(model, stored):
            return -loss.token_losses(model, batch).detach()


@contextmanager
def adapters_off(model: nn.Module, stored: str) -> Iterator[None]:
    """Every adapter layer of PEFT computes its base layer inside; flags are as they were afterwards.

    PEFT's own ``disable_adapter`` makes adapters trainable on its way out, which would add to ``.grad`` in a pass that
    froze them.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    if not layers:
        raise DataError(
            f"the reference is the model without its adapter, and {type(model).__name__} has no adapter layers of "
            f"PEFT: give reference=the reference model, or {stored} in the batch"
        )
    if any(getattr(layer, "merged", False) for layer in layers):
        raise DataError(
            "the reference is the model without its adapter, which is merged into the base weights: call "
            "model.unmerge_adapter() first"
        )
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
            if not layer.disable_adapters:
                raise SpecError(
                    f"the adapters of a {type(layer).__name__} cannot be switched off in this version of PEFT: give "
                    f"{stored} in the batch"
                )
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off
