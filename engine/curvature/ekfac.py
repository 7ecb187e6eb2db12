"""EK-FAC: Kronecker-factored curvature with corrected eigenvalues, fitted in two passes over a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.capture.capture import Capture, LossFunction
from gradsift.engine.capture.factors import ConvFactor, Factor
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Map, Modules
from gradsift.engine.capture.recorder import Receiver
from gradsift.engine.curvature.bases import Side
from gradsift.engine.curvature.kronecker import Eigenvalues, KroneckerFactor
from gradsift.kernels.errors import ShapeError
from gradsift.kernels.hashing import matrix_shape
from gradsift.kernels.spec import SketchSpec

__all__ = ["RANK", "EkFac", "fit"]

RANK = 256
"""Axes kept of a side wider than four times this."""

_AT_ONCE = 1 << 24
"""Numbers of per-example gradients, or of patches, that are held at a time: 64 MiB of float32."""


class EkFac:
    """``F`` as one Kronecker factor per parameter.

    Args:
        factors: canonical parameter name -> factor.
        examples: that they were fitted to.

    Attributes:
        trace: the mean squared norm of the gradients that it was fitted to.
    """

    def __init__(self, factors: Mapping[str, KroneckerFactor], examples: int) -> None:
        self.factors, self.examples = dict(factors), examples
        self.trace = sum(factor.trace for factor in self.factors.values())

    def solve(self, v: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """``(F + damping I)^-1 v``, float64, on the CPU."""
        out = {}
        for name, t in v.items():
            matrix = t.to("cpu", torch.float64).reshape(matrix_shape(tuple(t.shape)))
            out[name] = self.factors[name].solve(matrix, damping).reshape(t.shape)
        return out


def fit(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    loss_fn: LossFunction,
    modules: Modules = "lora",
    rank: int = RANK,
    eigenvalues: Iterable[Mapping[str, Any]] | None = None,
    *,
    allow_idle: Sequence[str] = (),
    batch_axis: int = 0,
) -> EkFac:
    """Fit the factors: one pass for the covariances of x and g, one for the eigenvalues.

    The first pass adds up ``x x'`` and ``g g'`` over all tokens with a gradient; their eigenvectors are the basis. The
    second rotates each example's own gradient into it and takes the mean square of every number, so that tokens of
    one example are not taken for independent. Parameters are independent of each other, A and B of a LoRA included. A
    convolution's tokens are the patches that it sees; with groups, those of all groups together.

    Args:
        batches: re-iterable, with labels drawn from the model: ``sampled_batch``. The curvature is that of the labels.
        loss_fn: ``loss_fn(model, batch) -> (n,)``, summed over its parts.
        rank: axes kept of a side that is wider than four times this; see ``Side``.
        eigenvalues: batches of the second pass, where these should be others.
        allow_idle, batch_axis: see ``Capture``.

    Raises:
        ShapeError: the batches hold no example.
        CaptureError: as of ``Capture``.

    Source: Martens & Grosse 2015; George et al. 2018 (arXiv 1806.03884).
    """
    capture = Capture(model, SketchSpec(), modules, allow_idle=allow_idle)
    covariances = _Covariances(capture, rank)
    _pass(capture, batches, loss_fn, lambda _: covariances.receive, batch_axis)
    rotated = {name: Eigenvalues(left.axes(), right.axes()) for name, (left, right) in covariances.sides.items()}
    second = batches if eigenvalues is None else eigenvalues
    count = _pass(capture, second, loss_fn, _Rotated(capture, rotated), batch_axis)
    return EkFac({name: values.factor(count) for name, values in rotated.items()}, count)


def _pass(
    capture: Capture,
    batches: Iterable[Mapping[str, Any]],
    loss_fn: LossFunction,
    receive: Callable[[Layout], Receiver],
    batch_axis: int,
) -> int:
    """One pass over the batches; the number of examples."""
    count = 0
    with evaluating(capture.model):
        for batch in batches:
            count += len(capture.factors(batch, loss_fn, receive, batch.get("segments"), batch_axis))
    if not count:
        raise ShapeError("there is no example to fit a curvature to: give the curvature sample's batches")
    return count


class _Covariances:
    """Both sides of every parameter."""

    def __init__(self, capture: Capture, rank: int) -> None:
        self.sides: dict[str, tuple[Side, Side]] = {}
        for row in capture.table:
            p, q = matrix_shape(tuple(row.shape))
            self.sides[row.name] = Side(p, rank, f"{row.name} left"), Side(q, rank, f"{row.name} right")

    def receive(self, _: Map, uses: Sequence[Sequence[Factor]]) -> None:
        """Tokens without a gradient, padding among them, are left out."""
        for factor in (factor for use in uses for factor in use):
            left, right = self.sides[factor.parameter]
            for x, g in _tokens(factor):
                counted = (g != 0).any(dim=1)
                left.add(g[counted])
                right.add(x[counted])


class _Rotated:
    """Makes the receivers of the second pass."""

    def __init__(self, capture: Capture, rotated: Mapping[str, Eigenvalues]) -> None:
        self._shapes = {row.name: tuple(row.shape) for row in capture.table}
        self._rotated = rotated

    def __call__(self, layout: Layout) -> Receiver:
        """The receiver of one pass."""

        def receive(target: Map, uses: Sequence[Sequence[Factor]]) -> None:
            with torch.no_grad():
                for factors in zip(*uses, strict=True):
                    name = factors[0].parameter
                    operands = factors[0].gather(factors, layout, target.name, self._shapes[name])
                    p, q = operands.widths
                    step = max(1, _AT_ONCE // (p * q))
                    for first in range(0, operands.n, step):
                        grad, transposed = operands.gradients(first, min(operands.n, first + step))
                        self._rotated[name].add(grad.mT if transposed else grad)

        return receive


def _tokens(factor: Factor) -> Iterable[tuple[Tensor, Tensor]]:
    """x and g of one use as tokens (t, q) and (t, p)."""
    x, g = factor.x.detach(), factor.g.detach()
    if not isinstance(factor, ConvFactor):
        yield x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return
    window = factor.window
    numbers = x.shape[1] * window.kernel[0] * window.kernel[1] * g.shape[2] * g.shape[3]
    step = max(1, _AT_ONCE // numbers)
    for first in range(0, len(x), step):
        seen = window.patches(window.pad(x[first : first + step]))
        given = g[first : first + step].flatten(2).mT
        if window.groups == 1:
            yield seen.flatten(0, 1), given.flatten(0, 1)
            continue
        # Each group's rows see that group's patches: the other rows of g are zero there.
        for group, (patches, rows) in enumerate(
            zip(seen.chunk(window.groups, dim=2), given.chunk(window.groups, dim=2), strict=True)
        ):
            alone = torch.zeros_like(given).unflatten(2, (window.groups, -1))
            alone[:, :, group] = rows
            yield patches.flatten(0, 1), alone.flatten(2).flatten(0, 1)
