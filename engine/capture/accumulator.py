"""Accumulator: turns the factors of maps into rows, one sketch over all parameters or one for each group of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gradsift.engine.capture.factors import Factor
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Map
from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import CaptureError
from gradsift.kernels.outer import Held, sketch_operands
from gradsift.kernels.spec import SketchSpec

__all__ = ["Accumulator"]


class Accumulator:
    """Sums the sketches of every parameter's per-example gradients; one buffer per device.

    ``receive`` is a ``Receiver``. A map that arrives twice (two backward passes) still adds up right, but its norm does
    not, so norms become NaN; with Adam, which needs the whole gradient at once, it is refused.

    Args:
        spec: the projection.
        layout: which token is whose.
        backend: as of ``Capture``.
        groups: parameter name -> its group, from 0 on; None for one sketch over all.
        adam: parameter name -> the update to sketch instead of the gradient. An example whose gradient is zero
            everywhere has no update: its row stays zero.
    """

    def __init__(
        self,
        spec: SketchSpec,
        layout: Layout,
        backend: str,
        groups: Mapping[str, int] | None = None,
        adam: Callable[[str], AdamStep] | None = None,
    ):
        self._spec = spec
        self._layout = layout
        self._backend = backend
        self._groups = groups
        self._count = 1 if groups is None else 1 + max(groups.values())
        self._adam = adam
        self._values: dict[torch.device, Tensor] = {}
        self._squares: dict[torch.device, Tensor] = {}
        self._peaks: dict[torch.device, Tensor] = {}
        self._held = Held()
        self._seen: set[int] = set()
        self._norms_known = True

    def receive(self, target: Map, uses: Sequence[Sequence[Factor]]) -> None:
        """Add one map's factors; all of its uses at once, so that its norm is exact."""
        if id(target) in self._seen:
            if self._adam is not None:
                raise CaptureError(
                    f"{target.name} got gradients in several backward passes, and Adam's update is of their sum: "
                    "run one backward pass over all uses, or leave Adam out"
                )
            self._norms_known = False
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
            self._values[device] = torch.zeros(n, self._count, self._spec.dim, device=device)
            self._squares[device] = torch.zeros(self._count, n, device=device)
            self._peaks[device] = torch.zeros(n, device=device)
        group = 0 if self._groups is None else self._groups[name]
        if self._adam is not None:
            for factor in factors:
                peaks = self._layout.peaks(factor.weights(), target.name)
                self._peaks[device] = torch.maximum(self._peaks[device], peaks)
        sketch_operands(
            operands,
            self._spec,
            name=name,
            shape=shape,
            out=self._values[device][:, group],
            sqnorm=self._squares[device][group],
            backend=self._backend,
            held=self._held,
            adam=None if self._adam is None else self._adam(name),
        )

    @property
    def values(self) -> Tensor:
        """float32, shape (n, dim), or (n, groups, dim); on the device of the first map that reported, zeros when every
        map was idle."""
        self._held.release()
        empty = torch.zeros(self._layout.n or 0, self._count, self._spec.dim)
        values = self._without_zero_examples(_total(list(self._values.values()) or [empty]), axis=0)
        return values[:, 0] if self._groups is None else values

    @property
    def grad_norm(self) -> Tensor:
        """float32, shape (n,), or (n, groups)."""
        self._held.release()
        empty = torch.zeros(self._count, self._layout.n or 0)
        norm = self._without_zero_examples(_total(list(self._squares.values()) or [empty]), axis=1).sqrt().t()
        norm = norm if self._norms_known else torch.full_like(norm, torch.nan)
        return norm[:, 0] if self._groups is None else norm

    def _without_zero_examples(self, t: Tensor, axis: int) -> Tensor:
        """Zeros along the examples' axis where no gradient arrived: there is nothing to update."""
        if self._adam is None or not self._peaks:
            return t
        peaks = torch.stack([p.to(t.device) for p in self._peaks.values()]).amax(0)
        return t.index_fill(axis, (peaks == 0).nonzero().flatten(), 0.0)


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
