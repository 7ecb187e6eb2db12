"""The unsketched gradient of a loss, by plain autograd, with the model left as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.kernels.errors import CaptureError

__all__ = ["backward", "gradient", "state_names"]

logger = logging.getLogger(__name__)


def gradient(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    modules: Modules = "lora",
) -> dict[str, Tensor]:
    """Gradient of the summed loss of a batch with respect to the captured parameters.

    The loss runs on stand-ins that share the parameters' memory, so nothing of the model is touched: neither its
    ``.grad`` and ``requires_grad``, nor hooks that wait for its gradients. It runs in the mode (train or eval) in
    which the model is, like a capture.

    Args:
        batch: what ``loss_fn`` reads.
        loss_fn: ``loss_fn(model, batch) -> (n,)``.
        modules: "lora", a glob, or a list of globs: as of ``Capture``.

    Returns:
        {canonical parameter name: gradient of the parameter's shape and dtype}, in the order of ``capture.table``.
        A parameter that this batch does not reach (an expert without tokens) has zeros, and a warning names it.

    Raises:
        CaptureError: no captured parameter is reached; or ``modules`` selects nothing that can be captured.
    """
    return backward(model, batch, loss_fn, parameters_of(model, modules))


def backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    captured: Mapping[str, nn.Parameter],
) -> dict[str, Tensor]:
    """``gradient`` for parameters that have been found: finding them again for every batch is felt on small models.

    Args:
        captured: canonical name -> parameter, as of ``parameters_of``.
    """
    names = state_names(model, captured)
    stand_ins = {
        name: parameter.detach().requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in names.values()
    }
    for name in names.values():
        stand_ins[name].requires_grad_(True)
    call = _Backward(model, loss_fn)
    with torch.enable_grad():
        functional_call(call, {f"model.{name}": leaf for name, leaf in stand_ins.items()}, (batch,))
    gradients = {name: stand_ins[plain].grad for name, plain in names.items()}
    idle = [name for name, grad in gradients.items() if grad is None]
    if len(idle) == len(gradients):
        raise CaptureError(
            f"the loss does not depend on any of the {len(idle)} captured parameters, such as {idle[0]}: "
            "expected a loss computed by this model with its adapter active"
        )
    if idle:
        logger.warning("%d captured parameters got no gradient, such as %s: they count as zero", len(idle), idle[0])
    return {name: torch.zeros_like(captured[name]) if g is None else g for name, g in gradients.items()}


def state_names(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Canonical name -> the name by which ``model.named_parameters`` knows it."""
    plain = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: plain[id(parameter)] for name, parameter in parameters.items()}


class _Backward(nn.Module):
    """Forward and backward in one call, so that recomputed activations see the stand-ins too."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Mapping[str, Any]], Tensor]):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Mapping[str, Any]) -> None:
        """Run ``loss_fn`` and its backward pass."""
        loss = self.loss_fn(self.model, batch).sum()
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
