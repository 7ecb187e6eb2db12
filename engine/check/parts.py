"""A capture that keeps rows apart by map, and the surroundings in which checks run a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsift.engine.capture.accumulator import Accumulator
from gradsift.engine.capture.capture import Capture, LossFunction
from gradsift.engine.capture.factors import Factor
from gradsift.engine.capture.frozen import frozen, same_randomness
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Map
from gradsift.kernels.sketch import sketch_dense
from gradsift.kernels.spec import SketchSpec

__all__ = ["PartCapture", "Parts", "in_dtype", "kind_of", "relative", "repeatable", "sketched", "trainable"]


class Parts(NamedTuple):
    """Rows of one batch by part, on the CPU: {part: float32 (n, dim)} and {part: squared norm (n,)}."""

    loss: Tensor
    rows: dict[str, Tensor]
    squares: dict[str, Tensor]

    @property
    def values(self) -> Tensor:
        """All parts together, (n, dim): what a capture returns."""
        return torch.stack(list(self.rows.values())).sum(0)


def kind_of(name: str) -> str:
    """What maps of one kind share: the last part of the name that is no number, such as "q_proj" or "to_out.*"."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    named = [place for place, part in enumerate(parts) if part != "*"]
    return ".".join(parts[named[-1] :] if named else parts)


class PartCapture(Capture):
    """A capture whose rows stay apart, by parameter or by kind of map; maps without a gradient give no part."""

    def parts(
        self, batch: Any, loss_fn: LossFunction, key: Callable[[Map, str], str], segments: Any, batch_axis: int
    ) -> Parts:
        """One pass over a batch, without the probe for leaks.

        Args:
            key: (map, parameter name) -> name of the part that receives its rows.
        """
        with frozen(self.model):
            layout = self.layout(batch, loss_fn, segments, batch_axis)
            split = _Split(self.spec, layout, self.backend, key)
            loss = self._run(batch, loss_fn, layout, split.receive, torch.sum)
        rows = {part: rows.values.cpu() for part, rows in split.parts.items()}
        return Parts(loss.float().cpu(), rows, {part: r.grad_norm.square().cpu() for part, r in split.parts.items()})

    def isolate(self, batch: Any, loss_fn: LossFunction, loss: Tensor, segments: Any, batch_axis: int) -> None:
        """One pass with the loss of one example.

        Raises:
            CaptureError: it reaches rows of another.
        """
        with frozen(self.model):
            layout = self.layout(batch, loss_fn, segments, batch_axis)
            layout.expect(len(loss))
            self._probe(batch, loss_fn, layout, loss)

    def may_idle(self, found: Map) -> bool:
        """Any map may: what is missing is the finding, not an error."""
        return True


class _Split:
    """A ``Receiver`` with one accumulator per part."""

    def __init__(self, spec: SketchSpec, layout: Layout, backend: str, key: Callable[[Map, str], str]):
        self._arguments = (spec, layout, backend)
        self._key = key
        self.parts: dict[str, Accumulator] = {}

    def receive(self, target: Map, uses: Sequence[Sequence[Factor]]) -> None:
        """Add one map's factors to the part of each of its parameters."""
        for factors in zip(*uses, strict=True):
            part = self._key(target, factors[0].parameter)
            if part not in self.parts:
                self.parts[part] = Accumulator(*self._arguments)
            self.parts[part].receive(target, [(factor,) for factor in factors])


def sketched(gradients: Mapping[str, Tensor], spec: SketchSpec) -> dict[str, Tensor]:
    """S_m vec(gradient) of every parameter, in float64: {name: (dim,)}."""
    rows = {}
    for name, gradient in gradients.items():
        out = torch.zeros(1, spec.dim, dtype=torch.float64)
        sketch_dense(gradient.reshape(1, -1).double().cpu(), spec, name, tuple(gradient.shape), out)
        rows[name] = out[0]
    return rows


def relative(got: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each row, (n,).

    A row that is a hundred times smaller than the largest is measured against a hundredth of that one: what
    is left of an almost vanished gradient is rounding.
    """
    size = expected.double().norm(dim=1)
    error = (got.double() - expected.double()).norm(dim=1)
    return torch.where(error == 0, 0.0, error / size.clamp_min(float(size.max()) / 100))


@contextmanager
def repeatable(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Every pass inside draws the same random numbers, and none of the caller's are used up."""
    with same_randomness(model):
        torch.manual_seed(seed)
        yield


@contextmanager
def trainable(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Only these parameters require gradients inside; flags and ``.grad`` are put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters}
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        yield
    finally:
        for parameter, flag, grad in before:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def in_dtype(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Floating-point weights hold copies of another dtype inside, and the very same memory as before afterwards."""
    before = [(parameter, parameter.data) for parameter in parameters if parameter.is_floating_point()]
    try:
        with torch.no_grad():
            for parameter, data in before:
                parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
