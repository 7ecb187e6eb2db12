"""Products with matrices that are never formed: the sample's gradients, and the Gauss-Newton matrix of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.answers.directional import Losses, directed, forward_mode
from gradsift.engine.answers.gradient import backward
from gradsift.engine.answers.rescore import Method, Rescorer
from gradsift.engine.capture.capture import LossFunction
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.engine.curvature.vectors import Flat
from gradsift.kernels.errors import SpecError

__all__ = ["Counted", "Products"]

Batches = Iterable[Mapping[str, Any]]


class Counted:
    """Batches that tell when they have been used."""

    def __init__(self, batches: Batches, advance: Callable[[], None] | None) -> None:
        self._batches, self._advance = batches, advance

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._batches:
            yield batch
            if self._advance is not None:
                self._advance()


class Products:
    """Products of flat vectors with R, the (N, P) gradients of a sample, and with its loss's Gauss-Newton matrix.

    The model runs in eval mode and gets its own mode back.

    Args:
        model, loss_fn: ``loss_fn(model, batch) -> (n,)``, summed over the loss's parts.
        batches: re-iterable; the N examples in the order of R's rows.
        modules: over which parameters.
        method: of the directional derivatives, as of ``Rescorer``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        loss_fn: LossFunction,
        modules: Modules = "lora",
        method: Method = "auto",
    ) -> None:
        self.model, self.batches, self.loss_fn = model, batches, loss_fn
        self.modules, self.method = modules, method
        self.parameters = parameters_of(model, modules)
        self.flat = Flat({name: tuple(p.shape) for name, p in self.parameters.items()})

    def count(self) -> int:
        """N, by a forward pass: packed batches do not show it."""
        with evaluating(self.model), torch.no_grad():
            return sum(len(self.loss_fn(self.model, batch)) for batch in self.batches)

    def times(self, u: Tensor) -> Tensor:
        """``R u``, float64 (N,): one directional derivative of each example's loss."""

        def one_column(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            return self.loss_fn(model, batch)[:, None]

        def all_of_them(_: Sequence[int]) -> Batches:
            return self.batches

        along = Rescorer(self.model, all_of_them, one_column, [self.flat.split(u)], self.method, self.modules)
        return along(0, np.empty(0, dtype=np.int64)).scores

    def combine(self, c: Tensor) -> Tensor:
        """``R' c``, float64 (P,), for c (N,): a backward pass of losses weighted with c."""
        total = torch.zeros(self.flat.size, dtype=torch.float64)
        # Weights of at most 1, so that no c is too large or too small for a model in half precision.
        largest = float(c.abs().max()) or 1.0
        weights = c / largest
        start = 0
        for batch in self.batches:
            taken = 0

            def weighted(model: nn.Module, batch: Mapping[str, Any], start: int = start) -> Tensor:
                nonlocal taken
                loss = self.loss_fn(model, batch)
                taken = len(loss)
                return loss * weights[start : start + taken].to(loss)

            total += self._backward(batch, weighted)
            start += taken
        return largest * total

    def gauss_newton(self, u: Tensor) -> Tensor:
        """``sum_i J_i' H_i J_i u``, float64 (P,): J the outputs' derivative, H the loss's second one at the outputs.

        Forward mode gives J u; the loss's own ``gauss_newton`` says what the outputs are and multiplies by H; a
        backward pass ends it. Which labels the batches carry does not matter for a cross-entropy or a squared error.

        Raises:
            SpecError: the loss has no ``gauss_newton``.
            BackendError: an operation of the model has no forward derivative.
        """
        hook = self.curved_loss()
        length = float(torch.linalg.vector_norm(u)) or 1.0
        weights, direction = directed(self.model, self.parameters, self.flat.split(u), length)
        outputs = Losses(self.model, lambda model, batch: hook(model, batch)[0])
        total = torch.zeros(self.flat.size, dtype=torch.float64)
        for batch in self.batches:
            with evaluating(self.model), torch.no_grad():
                tangent = forward_mode(outputs, batch, weights, direction)

            def bent(model: nn.Module, batch: Mapping[str, Any], tangent: Tensor = tangent) -> Tensor:
                out, hessian = hook(model, batch)
                return (out * hessian(tangent).detach()).flatten()

            total += self._backward(batch, bent)
        return length * total

    def curved_loss(self) -> Callable[..., tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """The loss's ``gauss_newton``, if it has one."""
        hook = getattr(self.loss_fn, "gauss_newton", None)
        if hook is None:
            kind = getattr(self.loss_fn, "kind", type(self.loss_fn).__name__)
            raise SpecError(
                f"the loss {kind!r} does not say what its outputs and their second derivative are (gauss_newton): use "
                "method='fisher', which needs gradients only"
            )
        return hook  # type: ignore[no-any-return]

    def _backward(self, batch: Mapping[str, Any], loss_fn: LossFunction) -> Tensor:
        with evaluating(self.model):
            return self.flat.join(backward(self.model, batch, loss_fn, self.parameters))
