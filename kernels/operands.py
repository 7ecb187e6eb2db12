"""Operands: the two tensors that one parameter's per-example gradients are products of, and those products.

A parameter's gradient for example n is ``G_n = sum_t g_t x_t^T`` over the tokens of n. How tokens are read differs
between maps: those of a linear map lie in memory (``Tokens``), those of a convolution are patches (``Images``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError
from gradsift.kernels.hashing import matrix_shape

__all__ = [
    "Offsets",
    "Operands",
    "Piece",
    "Tokens",
    "check_offsets",
    "check_shape",
    "squared_norms",
    "sum_dtype",
    "words",
]

Offsets = tuple[int, ...]

_COPIED = 1 << 24
"""Numbers of an operand in low precision that are copied at once to be projected: 64 MiB of float32."""


class Piece(NamedTuple):
    """Examples first..last as tokens in memory: x (n, T, q) and g (n, T, p), or (tokens, d) with offsets."""

    first: int
    last: int
    x: Tensor
    g: Tensor
    offsets: Offsets | None


class Operands(ABC):
    """What the sketch of a parameter needs.

    Attributes:
        n: examples.
        widths: (p, q) of the gradient.
        dtypes: of x and g.
        device: of both.
        empty: no example has a token.
    """

    __slots__ = ("device", "dtypes", "empty", "n", "widths")

    n: int
    widths: tuple[int, int]
    dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    empty: bool

    @abstractmethod
    def gradients(self, first: int, last: int) -> tuple[Tensor, bool]:
        """G of examples first..last, new memory (n, p, q); or (n, q, p) with True.

        float32 (float64 for float64 operands); the caller sees to it that products are not rounded.
        """

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """All examples as tokens in memory, for a kernel."""

    @abstractmethod
    def projected(self, outward: Tensor, inward: Tensor) -> Iterator[Piece]:
        """Tokens with x projected by ``inward`` (r, q) and g by ``outward`` (r, p), in the dtype of the projections.

        Pieces may cover the same examples: their gradients add up.
        """

    def squares(self, first: int, last: int) -> Tensor:
        """|G|^2 of examples first..last, (n,)."""
        return squared_norms(self.gradients(first, last)[0])


class Tokens(Operands):
    """Operands of a linear map."""

    __slots__ = ("_g", "_offsets", "_x")

    def __init__(
        self, x: Tensor, g: Tensor, segments: Tensor | Sequence[int] | None, name: str, shape: tuple[int, ...]
    ):
        """See ``sketch_outer`` for the arguments, and for what is raised."""
        self._x, self._g, self._offsets = _as_tokens(x, g, segments, name, shape)
        self.n = self._x.shape[0] if self._offsets is None else len(self._offsets) - 1
        self.widths = g.shape[-1], x.shape[-1]
        self.dtypes = x.dtype, g.dtype
        self.device = x.device
        self.empty = x.numel() == 0 or g.numel() == 0

    def gradients(self, first: int, last: int) -> tuple[Tensor, bool]:
        """Always thin^T long, so G^T where p > q: BLAS is slower at the (long, thin) product (bench_primitives.py)."""
        dtype = sum_dtype(self.dtypes)
        transposed = self.widths[0] > self.widths[1]
        thin, long = (self._x, self._g) if transposed else (self._g, self._x)
        if self._offsets is None:
            some = slice(first, last)
            return torch.bmm(thin[some].to(dtype).mT, long[some].to(dtype)), transposed
        grad = torch.empty(last - first, thin.shape[-1], long.shape[-1], dtype=dtype, device=self.device)
        for i, (a, b) in enumerate(pairwise(self._offsets[first : last + 1])):
            torch.mm(thin[a:b].t().to(dtype), long[a:b].to(dtype), out=grad[i])
        return grad, transposed

    def pieces(self) -> Iterator[Piece]:
        """The operands as they are."""
        yield Piece(0, self.n, self._x, self._g, self._offsets)

    def projected(self, outward: Tensor, inward: Tensor) -> Iterator[Piece]:
        """All at once: they are smaller than the operands."""
        yield Piece(0, self.n, _project(self._x, inward), _project(self._g, outward), self._offsets)

    def squares(self, first: int, last: int) -> Tensor:
        """From the products between tokens, ``sum_st (x_s . x_t) (g_s . g_t)``, where that is less work than G."""
        (p, q), offsets = self.widths, self._offsets
        examples = range(first, last)
        if offsets is None:
            tokens = self._x.shape[1]
            ends = [(self._x[first:last], self._g[first:last])]
        else:
            tokens = max(offsets[i + 1] - offsets[i] for i in examples)
            spans = [slice(offsets[i], offsets[i + 1]) for i in examples]
            ends = [(self._x[None, span], self._g[None, span]) for span in spans]
        if tokens * (p + q) >= p * q:
            return super().squares(first, last)
        dtype = sum_dtype(self.dtypes)
        products = [[t @ t.mT for t in (x.to(dtype), g.to(dtype))] for x, g in ends]
        return torch.cat([(x * g).sum((1, 2)) for x, g in products]).clamp_min_(0)  # rounding can be below 0


def _project(t: Tensor, onto: Tensor) -> Tensor:
    """t (.., d) -> (.., r), from a bounded copy in the dtype of the projection."""
    step = max(1, _COPIED // max(1, t[0].numel()))
    return torch.cat([some.to(onto.dtype) @ onto.mT for some in t.split(step)])


def squared_norms(grad: Tensor) -> Tensor:
    """|G|^2 of gradients (n, p, q), row by row: on the CPU a norm of millions of numbers at once is 1e-3 off."""
    square: Tensor = torch.linalg.vector_norm(grad, dim=2).square_().sum(1)
    return square


def sum_dtype(dtypes: tuple[torch.dtype, torch.dtype]) -> torch.dtype:
    """What products are summed in."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_shape(p: int, q: int, name: str, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless a (p, q) gradient is one of a parameter of this shape."""
    rows, columns = matrix_shape(tuple(shape)) if shape else (0, 0)
    if (rows, columns) != (p, q) and not (1 in (p, q) and rows == 1 and columns == p * q):
        raise ShapeError(
            f"{name}: g of width {p} and x of width {q} make a ({p}, {q}) gradient but the parameter has "
            f"shape {tuple(shape)}: swap x and g if its weight is stored transposed"
        )


def check_offsets(offsets: Offsets, tokens: int, name: str) -> None:
    """Raise ShapeError unless offsets run from 0 to the number of tokens and never decrease."""
    if not offsets or offsets[0] != 0 or offsets[-1] != tokens:
        ends = f"from {offsets[0]} to {offsets[-1]}" if offsets else "nothing"
        raise ShapeError(
            f"{name}: segments cover {ends} but there are {tokens} tokens: they must run from 0 to {tokens}"
        )
    for i in range(len(offsets) - 1):
        if offsets[i + 1] < offsets[i]:
            raise ShapeError(
                f"{name}: segments decrease from {offsets[i]} to {offsets[i + 1]} at example {i}: sort the offsets"
            )


def _as_tokens(
    x: Tensor, g: Tensor, segments: Tensor | Sequence[int] | None, name: str, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Offsets | None]:
    """Operands as (n, T, d) with offsets None, or as (tokens, d) with offsets."""
    if x.ndim not in (2, 3) or x.shape[:-1] != g.shape[:-1] or x.device != g.device:
        raise ShapeError(
            f"{name}: x is {words(x)} and g is {words(g)}, expected (tokens, d) or (n, T, d) with the same "
            "tokens on the same device"
        )
    check_shape(g.shape[-1], x.shape[-1], name, shape)
    if segments is None:
        if x.ndim == 2:
            raise ShapeError(
                f"{name}: x of shape {tuple(x.shape)} does not say which token is whose: give segments, or "
                "operands of shape (n, T, d)"
            )
        return x, g, None
    if x.ndim == 3:
        x, g = x.flatten(0, 1), g.flatten(0, 1)
    offsets = tuple(segments.tolist()) if isinstance(segments, Tensor) else tuple(segments)
    check_offsets(offsets, x.shape[0], name)
    length = offsets[1] if len(offsets) > 1 else 0
    if length and all(o == i * length for i, o in enumerate(offsets)):
        n = len(offsets) - 1
        return x.view(n, length, x.shape[1]), g.view(n, length, g.shape[1]), None
    return x, g, offsets


def words(t: Tensor) -> str:
    """dtype, shape and device of a tensor, for errors."""
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}"
