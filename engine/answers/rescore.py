"""Exact scores of a few examples, place by place, without any of their gradients: directional derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from gradsift.engine.answers.gradient import state_names
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.kernels.errors import BackendError, ShapeError, SpecError

__all__ = ["STEP", "Exact", "Method", "Rescorer", "pad_alike", "rescore"]

STEP = 3e-3
"""Length of the move of the weights in a central difference, where errors of curvature and of rounding balance.

Measured on five small language models, largest error of a score: 1e-3: 1e-4 to 1e-3; 3e-3: 5e-5 to 3e-4; 1e-2: 5e-5 to
4e-3.
"""

Method = Literal["auto", "forward", "central"]
TokenLosses = Callable[[nn.Module, Mapping[str, Any]], Tensor]
Vector = Mapping[str, Tensor]

_HALF = (torch.bfloat16, torch.float16)


class Exact(NamedTuple):
    """Exact inner products of examples' gradients with one vector.

    Attributes:
        scores: float64 (n,): ``<gradient of example i, v>``, the sum of its tokens; (n, parts) for a loss in parts.
        tokens: float64, shaped as the losses: what each token (n, T) or latent position of an image (n, H, W) adds, 0
            where there is none; (n, parts, ...) for a loss in parts.
    """

    scores: Tensor
    tokens: Tensor


def rescore(
    model: nn.Module,
    batch: Mapping[str, Any],
    token_losses: TokenLosses,
    v: Vector,
    method: Method = "auto",
    *,
    modules: Modules = "lora",
) -> Exact:
    """Inner products of each example's gradient with v: the derivative of its loss when the weights move along v.

    With v the gradient of a query's loss, positive = training on the example lowers the query's loss. The model runs
    in eval mode (its own mode is put back) on moved copies of the captured weights: the weights are never written.

    Args:
        batch: what ``token_losses`` reads; all its examples are scored at once.
        token_losses: ``token_losses(model, batch) -> (n, T)``, 0 where there is no loss; any number of axes after the
            first, such as (n, H, W) for the latent positions of images.
        v: {canonical parameter name: tensor}, one for every captured parameter, as of ``gradient``.
        method: "central": two forward passes, the weights moved by plus and minus ``STEP * v / |v|``; any attention
            kernel, relative error below 1e-3, float32 models only (in bf16 the difference drowns in rounding: errors of
            100 % were measured). "forward": one pass of forward-mode differentiation, three to four times the cost of
            a forward pass, with plain (math) attention; relative error 1e-6 in float32, 1e-2 in bf16. "auto":
            "central" for a float32 or float64 model, "forward" for one that computes in half precision.
        modules: what v was taken over.

    Raises:
        SpecError: v's names or shapes are not those of the model's captured parameters.
        ShapeError: v is zero or not finite, or losses have no axis of tokens or positions.
        BackendError: "central" on half precision; or no forward derivative of an operation of the model.
    """
    if method not in ("auto", "forward", "central"):
        raise SpecError(f"method is {method!r}, expected 'auto', 'forward' or 'central'")
    parameters = parameters_of(model, modules)
    length = _length(parameters, v)
    half = _half_precision(model)
    if method == "central" and half is not None:
        raise BackendError(
            f"the model computes in {half}, whose rounding hides a central difference: use method='forward', or load "
            "the model in float32"
        )
    call = _Losses(model, token_losses)
    names = {name: f"model.{plain}" for name, plain in state_names(model, parameters).items()}
    weights = {names[name]: parameter.detach() for name, parameter in parameters.items()}
    direction = {names[name]: v[name].detach().to(p.device, p.dtype) for name, p in parameters.items()}
    with evaluating(model), torch.no_grad():
        if half is not None or method == "forward":
            tokens = _forward(call, batch, weights, direction)
        else:
            tokens = _central(call, batch, weights, direction, STEP / length)
    if tokens.ndim < 2:
        raise ShapeError(
            f"token losses have shape {tuple(tokens.shape)}, expected (examples, tokens) or (examples, height, width): "
            "give the loss's token_losses"
        )
    tokens = tokens.to("cpu", torch.float64)
    return Exact(tokens.flatten(1).sum(dim=1), tokens)


@dataclass(frozen=True, slots=True)
class Rescorer:
    """Exact scores of rows of a store: what ``topk(..., rescore=)`` calls on each query's short list.

    Args:
        model: the model whose gradients the store holds.
        fetch: ``fetch(rows)`` gives the batches that hold these rows' examples, in this order.
        token_losses: as of ``rescore``; or one per part of the loss, which a "cosine" over several parts needs since it
            divides each part by its own norms.
        vectors: one v per query, or one per query and part. For the scorers "dot" and "cosine" the query's
            ``gradient``; for "fisher" that gradient after ``precondition``, else the exact scores would undo the
            curvature.
        method, modules: as of ``rescore``.
    """

    model: nn.Module
    fetch: Callable[[Sequence[int]], Iterable[Mapping[str, Any]]]
    token_losses: TokenLosses | Sequence[TokenLosses]
    vectors: Sequence[Vector] | Sequence[Sequence[Vector]]
    method: Method = "auto"
    modules: Modules = "lora"

    def __call__(self, query: int, rows: np.ndarray) -> Exact:
        """Exact scores of these rows for one query, in their order; tokens padded with 0 to the largest batch's."""
        parts = self._parts(query)
        batches = [
            torch.stack(
                [
                    rescore(self.model, batch, losses, v, self.method, modules=self.modules).tokens
                    for losses, v in parts
                ],
                dim=1,
            )
            for batch in self.fetch([int(row) for row in rows])
        ]
        tokens = torch.cat(pad_alike(batches)) if batches else torch.zeros(0, len(parts), 0)
        scores = tokens.flatten(2).sum(dim=2)
        return Exact(scores, tokens) if isinstance(self.token_losses, Sequence) else Exact(scores[:, 0], tokens[:, 0])

    def _parts(self, query: int) -> list[tuple[TokenLosses, Vector]]:
        """Each part's losses with the vector of this query that they are differentiated along."""
        v = self.vectors[query]
        if isinstance(self.token_losses, Sequence) == isinstance(v, Mapping):
            raise ShapeError(
                "a rescorer got token losses for each part but one vector per query, or the other way round: "
                "give both per part or neither"
            )
        if isinstance(v, Mapping):
            return [(cast(TokenLosses, self.token_losses), v)]
        losses = cast(Sequence[TokenLosses], self.token_losses)
        if len(losses) != len(v):
            raise ShapeError(
                f"a rescorer got token losses of {len(losses)} parts but {len(v)} vectors of query {query}: "
                "give one per part, in the order of the loss's parts"
            )
        return list(zip(losses, v, strict=True))


def pad_alike(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts with zeros at the end of every axis but the first, so that all are as large as the largest.

    Args:
        parts: tensors of one number of axes.
    """
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    missing = [[full - size for size, full in zip(part.shape[1:], largest, strict=True)] for part in parts]
    return [
        functional.pad(part, [n for axis in reversed(ends) for n in (0, axis)])
        for part, ends in zip(parts, missing, strict=True)
    ]


class _Losses(nn.Module):
    """The token losses as a module's forward, so that parameters can be exchanged for one call."""

    def __init__(self, model: nn.Module, token_losses: TokenLosses):
        super().__init__()
        self.model = model
        self.token_losses = token_losses

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """(n, ...)."""
        return self.token_losses(self.model, batch)


def _central(call: nn.Module, batch: Mapping[str, Any], weights: Vector, direction: Vector, step: float) -> Tensor:
    def moved(sign: float) -> Tensor:
        at = {name: torch.add(w, direction[name], alpha=sign * step) for name, w in weights.items()}
        losses: Tensor = functional_call(call, at, (batch,))
        return losses.to(torch.float64)

    return (moved(1.0) - moved(-1.0)) / (2 * step)


def _forward(call: nn.Module, batch: Mapping[str, Any], weights: Vector, direction: Vector) -> Tensor:
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


class _Contiguous(TorchFunctionMode):
    """Group norms read contiguous memory: torch's forward derivative of theirs refuses channels-last activations.

    An attention block of a UNet hands such activations on, whatever the layout of its input.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        if func is functional.group_norm and args:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _length(parameters: Mapping[str, nn.Parameter], v: Vector) -> float:
    """|v|, after v was found to fit the parameters."""
    missing = [name for name in parameters if name not in v]
    unknown = [name for name in v if name not in parameters]
    if missing or unknown:
        what = f"v lacks {missing[0]}" if missing else f"v has {unknown[0]}, which the model does not"
        raise SpecError(
            f"{what} ({len(missing)} names missing, {len(unknown)} unknown): expected the {len(parameters)} captured "
            "parameters, take v and scores with the same model and modules"
        )
    for name, parameter in parameters.items():
        if v[name].shape != parameter.shape:
            raise SpecError(f"v[{name!r}] has shape {tuple(v[name].shape)}, expected {tuple(parameter.shape)}")
    length = float(sum(t.detach().to(torch.float64).square().sum().item() for t in v.values()) ** 0.5)
    if not 0 < length < float("inf"):
        raise ShapeError(f"v has length {length}, expected a positive number: look at the query's loss")
    return length


def _half_precision(model: nn.Module) -> torch.dtype | None:
    """The half precision that the model computes in, if it does."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next((p.dtype for p in model.parameters() if p.dtype in _HALF), None)
