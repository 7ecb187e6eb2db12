"""Layout: which token belongs to which example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradsift.kernels.errors import CaptureError, ShapeError

__all__ = ["BatchAxis", "Layout", "Owned", "Packed", "Rows", "make_layout", "owners_of"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Activations ordered by example.

    Attributes:
        values: (n, T, d) when every example has T rows, (tokens, d) with offsets otherwise; of a convolution,
            (images, c, h, w).
        segments: offsets of the examples in the tokens or images, shape (n + 1,), or None: an entry each.
    """

    values: Tensor
    segments: Tensor | None = None


class Layout(ABC):
    """Which row of an activation is whose.

    Attributes:
        n: examples; None until it is known.
    """

    n: int | None

    @abstractmethod
    def see(self, t: Tensor) -> None:
        """Learn from the input (.., d) of a map, before any gradient arrives."""

    @abstractmethod
    def expect(self, n: int) -> None:
        """There are n examples: as many as the loss gave numbers.

        Raises:
            CaptureError: the layout says otherwise.
        """

    @abstractmethod
    def rows(self, t: Tensor, name: str) -> Rows:
        """Tokens (.., d) of the map ``name``, ordered by example.

        Raises:
            CaptureError: the activation does not have the rows that the layout describes.
        """

    @abstractmethod
    def images(self, t: Tensor, name: str) -> Rows:
        """Images (images, c, h, w), ordered by example; raises as ``rows``."""

    @abstractmethod
    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """Largest weight among each example's rows, (n,); weights are of the tokens, or of images (images,)."""

    @abstractmethod
    def part(self, output: Tensor, index: int) -> Tensor | None:
        """The part of a model's output that belongs to one example; None when its shape does not say."""

    @property
    @abstractmethod
    def leak(self) -> str:
        """Why one example's loss might reach another's rows."""

    def join(self, parts: Sequence[Rows]) -> Rows:
        """All tokens of several uses, example by example."""
        if len(parts) == 1:
            return parts[0]
        values = [part.values for part in parts]
        segments = [part.segments for part in parts if part.segments is not None]
        if not segments:
            return Rows(torch.cat(values, dim=1))
        owner = torch.cat([torch.repeat_interleave(torch.arange(len(s) - 1), s.diff()) for s in segments])
        order = torch.argsort(owner, stable=True)
        return Rows(torch.cat(values)[order.to(values[0].device)], torch.stack(segments).sum(0))


@dataclass
class BatchAxis(Layout):
    """Examples lie along one axis of every activation; n is fixed by the first that is seen, or given.

    A model that flattens (n, T, d) to (n * T, d) in places is followed where T is the length of an activation that
    it did not flatten; the probe on the first batch then sees whether the order was kept.
    """

    axis: int
    n: int | None = None
    lengths: set[int] = field(default_factory=set)
    owned: bool = False
    """The entries are rows that have owners, rather than examples."""

    def see(self, t: Tensor) -> None:
        """Learn n and the lengths."""
        if t.ndim > 2 and self.axis < t.ndim - 1:
            shape = [size for axis, size in enumerate(t.shape[:-1]) if axis != self.axis]
            self.lengths.add(prod(shape))
            self.n = t.shape[self.axis] if self.n is None else self.n

    def expect(self, n: int) -> None:
        """Whatever was seen."""
        self.n = n

    def rows(self, t: Tensor, name: str) -> Rows:
        """(..., n, ..., d) -> (n, T, d), without a copy when the axis is the first."""
        if t.ndim < 2 or not -t.ndim <= self.axis < t.ndim - 1:
            raise CaptureError(f"{name}: an activation of shape {tuple(t.shape)} has no batch axis {self.axis}")
        size = t.shape[self.axis]
        if self.n is None:
            self.n = size
        if t.ndim == 2 and self.axis == 0 and size != self.n and size % self.n == 0 and size // self.n in self.lengths:
            return Rows(t.reshape(self.n, -1, t.shape[-1]))
        if size != self.n:
            raise CaptureError(
                f"{name}: axis {self.axis} of an activation {tuple(t.shape)} holds {size} entries but {self._words()} "
                "(repeated, windowed and routed rows cannot be told apart)"
            )
        if self.axis == 0 and t.ndim == 3:
            return Rows(t)
        t = t.movedim(self.axis, 0)
        return Rows(t.reshape(self.n, -1, t.shape[-1]))

    def images(self, t: Tensor, name: str) -> Rows:
        """One image per example."""
        if self.axis != 0:
            raise CaptureError(
                f"{name}: a convolution holds its images along axis 0 but batch_axis is {self.axis}: "
                "leave this map out of modules=[...]"
            )
        if self.n is None:
            self.n = t.shape[0]
        if t.shape[0] != self.n:
            raise CaptureError(
                f"{name}: the convolution sees {t.shape[0]} images but {self._words()} (repeated images, windows and "
                "frames cannot be told apart)"
            )
        return Rows(t)

    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """(..., n, ...) -> (n,)."""
        return self.rows(weights[..., None], name).values.amax(dim=(1, 2))

    def part(self, output: Tensor, index: int) -> Tensor | None:
        """Along this axis or the first, whichever holds n entries."""
        return self.select(output, torch.tensor([index]))

    def select(self, output: Tensor, entries: Tensor) -> Tensor | None:
        """Some entries of a model's output; None when it is not clear along which axis they lie."""
        fits = [axis for axis in {0, self.axis} if output.ndim > axis and output.shape[axis] == self.n]
        return output.index_select(fits[0], entries.to(output.device)) if len(fits) == 1 else None

    @property
    def leak(self) -> str:
        """Another axis, or batch statistics."""
        named = "as the owners say" if self.owned else "give batch_axis"
        return (
            f"examples do not lie along axis {self.axis} of its activations ({named}), or they share statistics such "
            "as batch normalisation"
        )

    def _words(self) -> str:
        if self.owned:
            return f"there are {self.n} owners: give the owner of every row, or leave this map out"
        return f"the batch has {self.n} examples: give batch_axis, segments or owners, or leave this map out"


class Owned(Layout):
    """Rows lie along one axis of every activation, and each belongs to an example: any number of them, in any order.

    Args:
        owners: the example of each row, int64 of shape (rows,), not negative; on the CPU.
        axis: where the rows lie.
    """

    def __init__(self, owners: Tensor, axis: int = 0):
        self._owners = owners
        self._along = BatchAxis(axis, len(owners), owned=True)
        self._order = None if bool((owners.diff() >= 0).all()) else torch.argsort(owners, stable=True)
        self._count(int(owners.max()) + 1)

    def _count(self, n: int) -> None:
        counts = torch.bincount(self._owners, minlength=n)
        self.n: int = n
        self._segments = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._each = self._order is None and bool((counts == counts[0]).all())

    def see(self, t: Tensor) -> None:
        """Learn the lengths, as of a batch axis."""
        self._along.see(t)

    def expect(self, n: int) -> None:
        """Every owner must be one of n examples; those without a row have zeros."""
        last = int(self._owners.max())
        if last >= n:
            raise CaptureError(
                f"owners name example {last} but loss_fn returned {n} losses: expected owners from 0 to {n - 1}"
            )
        if n != self.n:
            self._count(n)

    def rows(self, t: Tensor, name: str) -> Rows:
        """(.., rows, .., d) -> (n, K T, d) where every example has K rows in its place; else tokens with offsets."""
        values = self._along.rows(t, name).values
        if self._each:
            return Rows(values.reshape(self.n, -1, values.shape[-1]))
        return Rows(self._ordered(values).flatten(0, 1), self._segments * values.shape[1])

    def images(self, t: Tensor, name: str) -> Rows:
        """The images of each example together."""
        return Rows(self._ordered(self._along.images(t, name).values), self._segments)

    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """(.., rows, ..) -> (n,)."""
        peaks = self._along.peaks(weights, name)
        return peaks.new_zeros(self.n).scatter_reduce(0, self._owners.to(peaks.device), peaks, "amax")

    def part(self, output: Tensor, index: int) -> Tensor | None:
        """The rows that belong to the example."""
        return self._along.select(output, (self._owners == index).nonzero().flatten())

    @property
    def leak(self) -> str:
        """As along a batch axis."""
        return self._along.leak

    def _ordered(self, t: Tensor) -> Tensor:
        return t if self._order is None else t[self._order.to(t.device)]


class Packed(Layout):
    """Examples lie one after another in the flattened tokens of every activation."""

    def __init__(self, segments: Tensor):
        self.segments = segments

    def see(self, t: Tensor) -> None:
        """Nothing to learn: the offsets say everything."""

    def expect(self, n: int) -> None:
        """As many as the offsets describe."""
        if n != self.n:
            raise CaptureError(f"loss_fn returned {n} losses but segments describe {self.n} examples")

    @property
    def n(self) -> int:  # type: ignore[override]
        """Number of examples."""
        return len(self.segments) - 1

    def rows(self, t: Tensor, name: str) -> Rows:
        """(..., d) -> (tokens, d) with the offsets."""
        flat = t.reshape(-1, t.shape[-1])
        if flat.shape[0] != int(self.segments[-1]):
            raise CaptureError(
                f"{name}: an activation {tuple(t.shape)} has {flat.shape[0]} tokens but segments cover "
                f"{int(self.segments[-1])}: segments must cover every token, padding included"
            )
        return Rows(flat, self.segments)

    def images(self, t: Tensor, name: str) -> Rows:
        """Always an error: the tokens of a convolution are not packed."""
        raise CaptureError(
            f"{name}: a convolution sees {t.shape[0]} images, which segments of packed tokens do not describe: give "
            "owners instead, or leave this map out of modules=[...]"
        )

    def peaks(self, weights: Tensor, name: str) -> Tensor:
        """(tokens,) in any shape -> (n,)."""
        flat = self.rows(weights[..., None], name).values[:, 0]
        owner = torch.repeat_interleave(torch.arange(self.n), self.segments.diff()).to(flat.device)
        return torch.zeros(self.n, device=flat.device).scatter_reduce(0, owner, flat, "amax")

    def part(self, output: Tensor, index: int) -> Tensor | None:
        """The tokens of the example."""
        tokens = int(self.segments[-1])
        if output.ndim < 2 or output.shape[:-1].numel() != tokens:
            return None
        return output.reshape(tokens, -1)[int(self.segments[index]) : int(self.segments[index + 1])]

    @property
    def leak(self) -> str:
        """Attention across documents."""
        return (
            "packed examples attend to each other: give position_ids that restart in every example and "
            "use_cache=False, or pad instead of packing"
        )


def make_layout(
    segments: Tensor | Sequence[int] | None, batch_axis: int, owners: Tensor | Sequence[int] | None = None
) -> Layout:
    """The layout that a user described.

    Raises:
        ShapeError: segments are not non-decreasing offsets that begin at 0; owners are not the indices of examples;
            or both are given.
    """
    if owners is not None:
        if segments is not None:
            raise ShapeError("segments and owners were given: expected one of them to say which row is whose")
        return Owned(_indices(owners), batch_axis)
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


def owners_of(loss_fn: Any, batch: Any) -> Tensor | Sequence[int] | None:
    """The example of each row that a loss shows to the model: what its ``owners(batch)`` says, if it has that."""
    owners: Any = getattr(loss_fn, "owners", None)
    return None if owners is None else owners(batch)  # type: ignore[no-any-return]


def _indices(owners: Tensor | Sequence[int]) -> Tensor:
    indices = torch.as_tensor(owners).detach().cpu()
    whole = indices.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if indices.ndim != 1 or not len(indices) or not whole:
        raise ShapeError(
            f"owners has shape {tuple(indices.shape)} and {indices.dtype}, expected the index of an example for each "
            "row, integers (rows,)"
        )
    if bool((indices < 0).any()):
        raise ShapeError(f"owners holds {int(indices.min())}, expected indices of examples from 0 on")
    return indices.to(torch.int64)
