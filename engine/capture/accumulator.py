"""Accumulator: turns the factors of maps into rows, one sketch over all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsift.engine.capture.factors import Factor
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Map
from gradsift.kernels.outer import Held, sketch_operands
from gradsift.kernels.spec import SketchSpec

__all__ = ["Accumulator"]


class Accumulator:
    """Sums the sketches of every parameter's per-example gradients; one buffer per device.

    ``receive`` is a ``Receiver``. A map that arrives twice (two backward passes) still adds up right, but its norm does
    not, so norms become NaN.
    """

    def __init__(self, spec: SketchSpec, layout: Layout, backend: str):
        self._spec = spec
        self._layout = layout
        self._backend = backend
        self._values: dict[torch.device, Tensor] = {}
        self._squares: dict[torch.device, Tensor] = {}
        self._held = Held()
        self._seen: set[int] = set()
        self._norms_known = True

    def receive(self, target: Map, uses: Sequence[Sequence[Factor]]) -> None:
        """Add one map's factors; all of its uses at once, so that its norm is exact."""
        self._norms_known &= id(target) not in self._seen
        self._seen.add(id(target))
        with torch.no_grad():
            for factors in zip(*uses, strict=True):
                self._add(target, factors)

    def _add(self, target: Map, factors: Sequence[Factor]) -> None:
        name = factors[0].parameter
        shape = tuple(target.parameters[name].shape)
        operands = factors[0].gather(factors, self._layout, target.name, shape)
        n, device = operands.n, operands.device
        if device not in self._values:
            self._values[device] = torch.zeros(n, self._spec.dim, device=device)
            self._squares[device] = torch.zeros(n, device=device)
        sketch_operands(
            operands,
            self._spec,
            name=name,
            shape=shape,
            out=self._values[device],
            sqnorm=self._squares[device],
            backend=self._backend,
            held=self._held,
        )

    @property
    def values(self) -> Tensor:
        """float32, shape (n, dim), on the device of the first map that reported; zeros when every map was idle."""
        self._held.release()
        return _total(list(self._values.values()) or [torch.zeros(self._layout.n or 0, self._spec.dim)])

    @property
    def grad_norm(self) -> Tensor:
        """float32, shape (n,)."""
        self._held.release()
        norm = _total(list(self._squares.values()) or [torch.zeros(self._layout.n or 0)]).sqrt()
        return norm if self._norms_known else torch.full_like(norm, torch.nan)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
