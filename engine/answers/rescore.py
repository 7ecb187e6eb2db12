"""Exact scores of a few examples, place by place, without any of their gradients: directional derivatives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.engine.answers.directional import Losses, TokenLosses, Vector, central, directed, forward_mode
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.kernels.errors import BackendError, ShapeError, SpecError

if TYPE_CHECKING:
    from gradsift.engine.curvature.curvature import Curvature

__all__ = ["STEP", "Exact", "Method", "Rescorer", "pad_alike", "rescore"]

STEP = 3e-3
"""Length of the move of the weights in a central difference, where errors of curvature and of rounding balance.

Measured on five small language models, largest error of a score: 1e-3: 1e-4 to 1e-3; 3e-3: 5e-5 to 3e-4; 1e-2: 5e-5 to
4e-3.
"""

Method = Literal["auto", "forward", "central"]
_APART = 3e-3
"""How far, over the largest, a central difference may change when its step doubles: three times its error then."""

_HALF = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


class Exact(NamedTuple):
    """Exact inner products of examples' gradients with one vector.

    Attributes:
        scores: float64 (n,): ``<gradient of example i, v>``, the sum of its tokens; (n, parts) for a loss in parts.
        tokens: float64, shaped as the losses: what each token (n, T) or latent position of an image (n, H, W) adds, 0
            where there is none; (n, parts, ...) for a loss in parts.
        lengths: float64, (parts,) for a loss in parts and () otherwise: the norm of the vector, if it is told.
    """

    scores: Tensor
    tokens: Tensor
    lengths: Tensor | None = None


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
        ShapeError: v is zero or not finite, losses have no axis of tokens or positions, or a score is not finite.
        BackendError: "central" on half precision; or no forward derivative of an operation of the model.
    """
    along = _Along(model, token_losses, v, parameters_of(model, modules))
    _some_positive([along.length])
    tokens = along.derivatives(batch, method)
    return Exact(_finite(tokens.flatten(1).sum(dim=1)), tokens)


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
            curvature: ``corrected`` does that.
        method, modules: as of ``rescore``; but "auto" tries a central difference with twice the step on a query's first
            batch, and goes over to "forward" when the two differ by more than errors of 1e-3 explain.
        curvature: the sample that ``corrected`` needs.
    """

    model: nn.Module
    fetch: Callable[[Sequence[int]], Iterable[Mapping[str, Any]]]
    token_losses: TokenLosses | Sequence[TokenLosses]
    vectors: Sequence[Vector] | Sequence[Sequence[Vector]]
    method: Method = "auto"
    modules: Modules = "lora"
    curvature: Curvature | None = None

    def corrected(self, method: str, *, k: float | None = None, progress: Callable[[], None] | None = None) -> Self:
        """The same with every query's vector after its curvature: what ``topk(..., method=)`` calls.

        Args:
            method, k, progress: as of ``precondition``.

        Raises:
            SpecError: there is no curvature to correct by.
            ShapeError: vectors are kept per part: F is that of the summed loss.
        """
        if method == "none":
            return self
        if self.curvature is None:
            raise SpecError(
                f"method is {method!r} but the Rescorer has no curvature: give it Rescorer(..., "
                "curvature=gs.Curvature.of(store, ...))"
            )
        whole = [v for v in self.vectors if isinstance(v, Mapping)]
        if len(whole) != len(self.vectors):
            raise ShapeError(
                f"method is {method!r} but vectors are given per part: correct the gradient of the summed loss, one "
                "vector per query"
            )
        vectors = [self.curvature.correct(v, method, k=k, progress=progress) for v in whole]
        return replace(self, vectors=vectors)

    def __call__(self, query: int, rows: np.ndarray) -> Exact:
        """Exact scores of these rows for one query, in their order; tokens padded with 0 to the largest batch's.

        A part whose vector is zero adds nothing. Errors are those of ``rescore``.
        """
        parts = self._parts(query)
        _some_positive([part.length for part in parts])
        tried = [_Tried(part, self.method) for part in parts]
        batches = [
            torch.stack([part(batch) for part in tried], dim=1) for batch in self.fetch([int(row) for row in rows])
        ]
        tokens = torch.cat(pad_alike(batches)) if batches else torch.zeros(0, len(parts), 0)
        scores = _finite(tokens.flatten(2).sum(dim=2))
        lengths = torch.tensor([part.length for part in parts], dtype=torch.float64)
        if isinstance(self.token_losses, Sequence):
            return Exact(scores, tokens, lengths)
        return Exact(scores[:, 0], tokens[:, 0], lengths[0])

    def _parts(self, query: int) -> list[_Along]:
        """Each part's losses along its vector of this query."""
        v = self.vectors[query]
        if isinstance(self.token_losses, Sequence) == isinstance(v, Mapping):
            raise ShapeError(
                "a rescorer got token losses for each part but one vector per query, or the other way round: "
                "give both per part or neither"
            )
        parameters = parameters_of(self.model, self.modules)
        if isinstance(v, Mapping):
            return [_Along(self.model, cast(TokenLosses, self.token_losses), v, parameters)]
        losses = cast(Sequence[TokenLosses], self.token_losses)
        if len(losses) != len(v):
            raise ShapeError(
                f"a rescorer got token losses of {len(losses)} parts but {len(v)} vectors of query {query}: "
                "give one per part, in the order of the loss's parts"
            )
        return [_Along(self.model, of_part, along, parameters) for of_part, along in zip(losses, v, strict=True)]


class _Along:
    """Derivatives of losses along one vector, batch after batch.

    Args:
        model, token_losses, v: as of ``rescore``.
        parameters: the captured ones, as of ``parameters_of``.
    """

    def __init__(
        self, model: nn.Module, token_losses: TokenLosses, v: Vector, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.length = _norm(v)
        _fits(parameters, v)
        self._model, self._call = model, Losses(model, token_losses)
        self._weights, self._direction = directed(model, parameters, v, self.length)

    @property
    def half(self) -> torch.dtype | None:
        """The half precision that the model computes in, if it does."""
        return _half_precision(self._model)

    def derivatives(self, batch: Mapping[str, Any], method: Method, step: float = STEP) -> Tensor:
        """Of a batch, float64, shaped as its losses."""
        if method not in ("auto", "forward", "central"):
            raise SpecError(f"method is {method!r}, expected 'auto', 'forward' or 'central'")
        half = self.half
        if method == "central" and half is not None:
            raise BackendError(
                f"the model computes in {half}, whose rounding hides a central difference: use method='forward', or "
                "load the model in float32"
            )
        with evaluating(self._model), torch.no_grad():
            if half is not None or method == "forward":
                tokens = forward_mode(self._call, batch, self._weights, self._direction)
            else:
                tokens = central(self._call, batch, self._weights, self._direction, step)
        if tokens.ndim < 2:
            raise ShapeError(
                f"token losses have shape {tuple(tokens.shape)}, expected (examples, tokens) or (examples, height, "
                "width): give the loss's token_losses"
            )
        return self.length * tokens.to("cpu", torch.float64)


class _Tried:
    """Derivatives by a method that the first batch has tried."""

    def __init__(self, along: _Along, method: Method):
        self._along = along
        self._method: Method = "forward" if method == "auto" and along.half is not None else method

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Derivatives of a batch, shaped as its losses."""
        if self._method != "auto":
            return self._along.derivatives(batch, self._method)
        tokens, twice = (self._along.derivatives(batch, "central", step) for step in (STEP, 2 * STEP))
        self._method = "central"
        apart, largest = float((twice - tokens).abs().max()), float(tokens.abs().max())
        if apart <= _APART * largest:
            return tokens
        try:
            exact = self._along.derivatives(batch, "forward")
        except BackendError as error:
            logger.warning(
                "exact scores may be off by %.1g of the largest: central differences change with their step, and %s",
                apart / (3 * largest),
                error,
            )
            return tokens
        self._method = "forward"
        return exact


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


def _fits(parameters: Mapping[str, nn.Parameter], v: Vector) -> None:
    """Refuse a v of other names or shapes than the parameters."""
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


def _norm(v: Vector) -> float:
    """|v|, or an error where it is not finite."""
    length = float(sum(t.detach().to(torch.float64).square().sum().item() for t in v.values()) ** 0.5)
    if not length < float("inf"):
        raise ShapeError(f"v has length {length}, expected a finite number: look at the query's loss")
    return length


def _some_positive(lengths: Sequence[float]) -> None:
    """Refuse vectors that are all zero."""
    if not any(lengths):
        raise ShapeError("v has length 0, expected a positive number: look at the query's loss")


def _finite(scores: Tensor) -> Tensor:
    """Scores (n,), or (n, parts), none of which is infinite or NaN."""
    broken = (~torch.isfinite(scores)).nonzero()
    if len(broken):
        place = tuple(broken[0].tolist())
        raise ShapeError(
            f"the exact score of example {place[0]} is {float(scores[place])}, expected a finite number: look at its "
            "loss, and use float32 or bfloat16 where float16 overflows"
        )
    return scores


def _half_precision(model: nn.Module) -> torch.dtype | None:
    """The half precision that the model computes in, if it does."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return next((p.dtype for p in model.parameters() if p.dtype in _HALF), None)
