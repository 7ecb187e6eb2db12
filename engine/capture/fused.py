"""A plain LoRA layer in one step: what PEFT computes, without its scaled copies and sums of activations.

While nothing is trained the layer is a fixed formula, ``y = x W' + b + s (x A') B'``. Written as one function, B is
added into the base's output and A into its input gradient by the product itself, and both factors that capture needs
are at hand. That saves passes over activations in each layer, which pays for the per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.engine.capture.names import loaded_type

__all__ = ["FusedLora", "Override", "is_plain"]


class FusedLora(torch.autograd.Function):
    """``y = x W' + b + s (x A') B'``; its backward hands over (g, u, x, h) with h = x A' and u = s g B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        starter: Tensor,
        base: nn.Linear,
        a: Tensor,
        b: Tensor,
        scale: float,
        receive: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    ) -> Tensor:
        """x (..., d_in) -> y (..., d_out)."""
        y = functional.linear(x, base.weight, base.bias)
        h = functional.linear(x, a)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scale)
        ctx.save_for_backward(x, h)
        ctx.weights = base.weight, a, b, scale
        ctx.receive = receive
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradient at x, where it is wanted; never one of a weight."""
        x, h = ctx.saved_tensors
        weight, a, b, scale = ctx.weights
        flat = g.reshape(-1, g.shape[-1])
        u = (flat @ b).mul_(scale)
        ctx.receive(g, u.view(h.shape), x, h)
        grad = (flat @ weight).addmm_(u, a).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad, None, None, None, None, None, None


class Override:
    """Another ``forward`` for one module, until ``remove``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]):
        self._module = module
        module.forward = forward  # type: ignore[assignment]

    def remove(self) -> None:
        """The class's own forward again."""
        del self._module.forward


def is_plain(layer: Any, adapter: str) -> bool:
    """Whether a LoRA layer is nothing but the formula: frozen, one adapter, no hook, no dropout, and not in low
    precision, where another order of rounding would show."""
    plain: Any = loaded_type("peft.tuners.lora.layer", "Linear")
    if type(layer) is not plain or type(layer.base_layer) is not nn.Linear:
        return False
    down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if any(p.requires_grad for p in (*down.parameters(), *up.parameters())):
        return False
    weights = [p for m in (layer.base_layer, down, up) for p in m.parameters()]
    return (
        [name for name in layer.active_adapters if name in layer.lora_A] == [adapter]
        and type(down) is type(up) is nn.Linear
        and up.bias is None
        and not (dropout.training and getattr(dropout, "p", 0.0) > 0.0)
        and len({(p.dtype, p.device) for p in weights}) == 1
        and down.weight.dtype in (torch.float32, torch.float64)
        and all(type(p.data) is Tensor and not p.requires_grad for p in weights)
        and not any(_is_hooked(m) for m in (layer.base_layer, down, up, dropout))
        and "forward" not in layer.__dict__
    )


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__
