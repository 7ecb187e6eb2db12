"""The derivative of every loss along one direction of the weights: two moved forward passes, or forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradsift.engine.answers.gradient import state_names
from gradsift.kernels.errors import BackendError

__all__ = ["Losses", "TokenLosses", "Vector", "central", "directed", "forward_mode"]

TokenLosses = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Vector = Mapping[str, Tensor]


class Losses(nn.Module):
    """The token losses as a module's forward, so that parameters can be exchanged for one call."""

    def __init__(self, model: nn.Module, token_losses: TokenLosses):
        super().__init__()
        self.model = model
        self.token_losses = token_losses

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """(n, ...)."""
        return self.token_losses(self.model, batch)

    def held(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with what token losses hold fixed at the weights as they are: ``token_losses.hold``, if there is
        one. A loss that is no sum over tokens shares its slope out among them, and moved weights would change it.
        """
        hold: Callable[..., Mapping[str, Any]] | None = getattr(self.token_losses, "hold", None)
        return batch if hold is None else hold(self.model, batch)


def directed(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], v: Vector, length: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and v over its length in their dtypes, by the names that ``Losses`` of the model knows them by.

    Divided before it is rounded: no v is then too long or too short for a model in half precision.

    Args:
        parameters, v: by canonical names.
        length: of v; 0 leaves v as it is.
    """
    names = {name: f"model.{plain}" for name, plain in state_names(model, parameters).items()}
    weights = {names[name]: p.detach() for name, p in parameters.items()}
    direction = {names[name]: _shortened(v[name], length).to(p.device, p.dtype) for name, p in parameters.items()}
    return weights, direction


def central(call: Losses, batch: Mapping[str, Any], weights: Vector, direction: Vector, step: float) -> Tensor:
    """Half the difference between the losses at weights moved forth and back, over the step; float64.

    Args:
        weights, direction: by the names that ``call`` knows its parameters by.
        step: of the weights, in lengths of the direction.
    """

    batch = call.held(batch)

    def moved(sign: float) -> Tensor:
        at = {name: torch.add(w, direction[name], alpha=sign * step) for name, w in weights.items()}
        losses: Tensor = functional_call(call, at, (batch,))
        return losses.to(torch.float64)

    return (moved(1.0) - moved(-1.0)) / (2 * step)


def forward_mode(call: Losses, batch: Mapping[str, Any], weights: Vector, direction: Vector) -> Tensor:
    """The same by one pass that carries derivatives along, with plain (math) attention; in the losses' dtype.

    Raises:
        BackendError: an operation of the model has no forward derivative.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _Contiguous(), warnings.catch_warnings():
            # torch's own formulas for forward mode go through TorchScript, which torch calls deprecated.
            warnings.filterwarnings("ignore", r".*torch\.jit", DeprecationWarning)
            dual = {
                name: forward_ad.make_dual(w, direction[name])  # type: ignore[no-untyped-call]
                for name, w in weights.items()
            }
            losses: Tensor = functional_call(call, dual, (batch,))
            tangent: Tensor | None = forward_ad.unpack_dual(losses).tangent  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(
            f"forward-mode differentiation failed ({reason}): load the model in float32 for method='central', or with "
            "attn_implementation='eager' or 'sdpa'"
        ) from error
    return torch.zeros_like(losses) if tangent is None else tangent


def _shortened(t: Tensor, length: float) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32)) / (length or 1.0)


class _Contiguous(TorchFunctionMode):
    """Group norms read contiguous memory: torch's forward derivative of theirs refuses channels-last activations.

    An attention block of a UNet hands such activations on, whatever the layout of its input.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        if func is functional.group_norm and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))
