"""Layout: which token belongs to which example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from gradsift.kernels.errors import CaptureError, ShapeError

__all__ = ["BatchAxis", "Layout", "Packed", "Rows", "make_layout"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Activations ordered by example.

    Attributes:
        values: (n, T, d) when every example has T rows; (tokens, d) with offsets otherwise.
        segments: offsets of the examples, shape (n + 1,), or None for the first form.
    """

    values: Tensor
    segments: Tensor | None = None


@dataclass(slots=True)
class BatchAxis:
    """Examples lie along one axis of every activation; n is fixed by the first that is seen, or given.

    A model that flattens (n, T, d) to (n * T, d) in places is followed where T is the length of an activation that
    it did not flatten; the probe on the first batch then sees whether the order was kept.
    """

    axis: int
    n: int | None = None
    lengths: set[int] = field(default_factory=set)

    def see(self, t: Tensor) -> None:
        """Learn n and the lengths from an input of a map, before any gradient arrives."""
        if t.ndim > 2 and self.axis < t.ndim - 1:
            shape = [size for axis, size in enumerate(t.shape[:-1]) if axis != self.axis]
            self.lengths.add(prod(shape))
            self.n = t.shape[self.axis] if self.n is None else self.n

    def rows(self, t: Tensor, name: str) -> Rows:
        """(..., n, ..., d) -> (n, T, d), without a copy when the axis is the first.

        Raises:
            CaptureError: the axis does not hold n examples.
        """
        if t.ndim < 2 or not -t.ndim <= self.axis < t.ndim - 1:
            raise CaptureError(f"{name}: an activation of shape {tuple(t.shape)} has no batch axis {self.axis}")
        size = t.shape[self.axis]
        if self.n is None:
            self.n = size
        if t.ndim == 2 and self.axis == 0 and size != self.n and size % self.n == 0 and size // self.n in self.lengths:
            return Rows(t.reshape(self.n, -1, t.shape[-1]))
        if size != self.n:
            raise CaptureError(
                f"{name}: axis {self.axis} of an activation {tuple(t.shape)} holds {size} entries but the batch has "
                f"{self.n} examples: give batch_axis or segments, or leave this map out (repeated, windowed and "
                "routed rows cannot be told apart)"
            )
        if self.axis == 0 and t.ndim == 3:
            return Rows(t)
        t = t.movedim(self.axis, 0)
        return Rows(t.reshape(self.n, -1, t.shape[-1]))

    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """Largest weight among each example's rows: (..., n, ...) -> (n,)."""
        return self.rows(weights[..., None], name).values.amax(dim=(1, 2))

    def join(self, parts: Sequence[Rows]) -> Rows:
        """All rows of several uses, example by example."""
        return parts[0] if len(parts) == 1 else Rows(torch.cat([part.values for part in parts], dim=1))


@dataclass(slots=True)
class Packed:
    """Examples lie one after another in the flattened tokens of every activation."""

    segments: Tensor

    def see(self, t: Tensor) -> None:
        """Nothing to learn: the offsets say everything."""

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.segments) - 1

    def rows(self, t: Tensor, name: str) -> Rows:
        """(..., d) -> (tokens, d) with the offsets.

        Raises:
            CaptureError: the activation has another number of tokens.
        """
        flat = t.reshape(-1, t.shape[-1])
        if flat.shape[0] != int(self.segments[-1]):
            raise CaptureError(
                f"{name}: an activation {tuple(t.shape)} has {flat.shape[0]} tokens but segments cover "
                f"{int(self.segments[-1])}: segments must cover every token, padding included"
            )
        return Rows(flat, self.segments)

    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """Largest weight among each example's rows: (tokens,) in any shape -> (n,)."""
        flat = self.rows(weights[..., None], name).values[:, 0]
        owner = torch.repeat_interleave(torch.arange(self.n), self.segments.diff()).to(flat.device)
        return torch.zeros(self.n, device=flat.device).scatter_reduce(0, owner, flat, "amax")

    def join(self, parts: Sequence[Rows]) -> Rows:
        """All rows of several uses, example by example."""
        if len(parts) == 1:
            return parts[0]
        lengths = self.segments.diff()
        owner = torch.repeat_interleave(torch.arange(self.n), lengths).repeat(len(parts))
        order = torch.argsort(owner, stable=True)
        values = torch.cat([part.values for part in parts])
        return Rows(values[order.to(values.device)], self.segments * len(parts))


Layout = BatchAxis | Packed


def make_layout(segments: Tensor | Sequence[int] | None, batch_axis: int) -> Layout:
    """The layout that a user described.

    Raises:
        ShapeError: segments are not non-decreasing offsets that begin at 0.
    """
    if segments is None:
        return BatchAxis(batch_axis)
    offsets = torch.as_tensor(segments).detach().cpu()
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.is_floating_point():
        raise ShapeError(
            f"segments has shape {tuple(offsets.shape)} and {offsets.dtype}, expected integer offsets (n + 1,)"
        )
    offsets = offsets.to(torch.int64)
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ShapeError("segments must begin at 0 and never decrease: give the offsets of the examples in the tokens")
    return Packed(offsets)
