"""Images: per-example gradients of a convolution's kernel, without a copy of its unfolded input.

With x (images, c, h, w) and g (images, o, h', w'), the gradient of the kernel (o, c / groups, kh, kw), read as the
matrix (o, (c / groups) kh kw), is ``sum over images and output positions of g_t patch_t^T``. All patches together are
kh kw times as large as x. Here column (c, i, j) for a fixed tap (i, j) is a product of g with x shifted by the tap: on
x padded and flattened, and on g with as many zeros behind each row, a shift is an offset in memory. So a gradient is
kh kw matrix products of views. With stride s, x is first parted into its s x s phases, each of which is then read with
stride 1. A fused kernel wants tokens in memory, so for it patches are unfolded, a bounded number at a time.

Bound: ``UNFOLDED`` numbers of patches (or one output row of one image) are covered by one product, or copied.
Accumulation: as in ``outer``; the images and rows of one example are added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.kernels.errors import ShapeError
from gradsift.kernels.operands import Operands, Piece, check_offsets, check_shape, sum_dtype, words

__all__ = ["UNFOLDED", "Images", "Window"]

UNFOLDED = 1 << 24
"""Numbers of patches that are read at once: 64 MiB of float32 where they are copied."""


class Window(NamedTuple):
    """How a convolution reads its input; pairs are (height, width).

    Attributes:
        padding: (left, right, top, bottom).
        mode: of the padding, as torch.nn.functional.pad names it.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    mode: str = "constant"
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Window:
        """The window of a module, as it is now."""
        kernel, dilation = _pair(conv.kernel_size), _pair(conv.dilation)
        if conv.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            top, left = (t // 2 for t in total)
            padding = left, total[1] - left, top, total[0] - top
        else:
            top, left = (0, 0) if conv.padding == "valid" else _pair(conv.padding)  # type: ignore[arg-type]
            padding = left, left, top, top
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return cls(kernel, _pair(conv.stride), dilation, padding, mode, conv.groups)

    @property
    def span(self) -> tuple[int, int]:
        """Height and width of what one output position sees."""
        (kh, kw), (dh, dw) = self.kernel, self.dilation
        return (kh - 1) * dh + 1, (kw - 1) * dw + 1

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.padding
        (sh, sw), (h, w) = self.stride, self.span
        return (height + top + bottom - h) // sh + 1, (width + left + right - w) // sw + 1

    def pad(self, x: Tensor) -> Tensor:
        """x with its borders, as the convolution sees it."""
        return functional.pad(x, self.padding, self.mode) if any(self.padding) else x

    def patches(self, x: Tensor) -> Tensor:
        """Padded images (n, c, h, w) -> every patch as a token, (n, positions, c kh kw)."""
        (sh, sw), (dh, dw), (h, w) = self.stride, self.dilation, self.span
        seen = x.unfold(2, h, sh).unfold(3, w, sw)[..., ::dh, ::dw]
        n, c, rows, columns, kh, kw = seen.shape
        return seen.permute(0, 2, 3, 1, 4, 5).reshape(n, rows * columns, c * kh * kw)


class Images(Operands):
    """Operands of a convolution: every use of its kernel in one pass.

    Args:
        uses: (x, g, window) of each use: x (images, c, h, w), g (images, o, h', w'), any strides.
        segments: offsets of the examples in the images, shape (n + 1,); None for one image each.
        name, shape: of the parameter, shape (o, c / groups, kh, kw).

    Raises:
        ShapeError: the tensors do not fit each other, the window, the segments or the parameter.
    """

    __slots__ = ("_each", "_groups", "_kernel", "_offsets", "_uses")

    def __init__(
        self,
        uses: Sequence[tuple[Tensor, Tensor, Window]],
        segments: Tensor | Sequence[int] | None,
        name: str,
        shape: tuple[int, ...],
    ):
        for x, g, window in uses:
            _check_use(x, g, window, name)
        x, g, window = uses[0]
        images = x.shape[0]
        offsets = range(images + 1) if segments is None else segments
        self._offsets = tuple(offsets.tolist()) if isinstance(offsets, Tensor) else tuple(offsets)
        check_offsets(self._offsets, images, name)
        self.n = len(self._offsets) - 1
        each = images // self.n if self.n else 0
        self._each = each if all(o == i * each for i, o in enumerate(self._offsets)) else 0
        self._groups, self._kernel = window.groups, window.kernel
        self._uses = [(x, g, window) for x, g, window in uses if x.numel() and g.numel()]
        kh, kw = self._kernel
        self.widths = g.shape[1], x.shape[1] // self._groups * kh * kw
        check_shape(*self.widths, name, shape)
        self.dtypes = x.dtype, g.dtype
        self.device = x.device
        self.empty = not self._uses

    def gradients(self, first: int, last: int) -> tuple[Tensor, bool]:
        """G^T where o > c, for the same reason as of a linear map; never with groups."""
        n, (kh, kw), groups = last - first, self._kernel, self._groups
        o, c = self.widths[0] // groups, self.widths[1] // (kh * kw)
        transposed = groups == 1 and o > c
        rows, columns = (c, o) if transposed else (o, c)
        taps = torch.zeros(
            kh * kw, n * groups, rows, columns, dtype=sum_dtype(self.dtypes), device=self.device
        )  # G by tap, so that each is the target of a product
        for x, g, window in self._uses:
            for block in self._blocks(first, last, x, g):
                own = slice((block.first - first) * groups, (block.last - first) * groups)
                _add_taps(taps[:, own], x[block.images], g[block.images], window, block, transposed)
        if transposed:
            return taps.permute(1, 2, 0, 3).contiguous().view(n, c * kh * kw, o), True
        grad = taps.view(kh * kw, n, groups, o, c).permute(1, 2, 3, 4, 0).contiguous()
        return grad.view(n, groups * o, c * kh * kw), False

    def pieces(self) -> Iterator[Piece]:
        """Patches in memory where those of an example are within the bound.

        Else its gradient itself, which is the sum of the outer products of its rows (or columns) with unit vectors.
        """
        size = sum(self._each * _unfolded(x, g, window) for x, g, window in self._uses)
        step = UNFOLDED // size if size else 0
        if self._groups == 1 and step:
            for first in range(0, self.n, step):
                last = min(self.n, first + step)
                images = slice(first * self._each, last * self._each)
                x = torch.cat([_tokens(w.patches(w.pad(x[images])), last - first) for x, _, w in self._uses], dim=1)
                g = torch.cat([_tokens(g[images].flatten(2).mT, last - first) for _, g, _ in self._uses], dim=1)
                yield Piece(first, last, x, g, None)
            return
        for i in range(self.n):
            grad, transposed = self.gradients(i, i + 1)
            whole = grad.mT if transposed else grad
            unit = torch.eye(min(self.widths), dtype=grad.dtype, device=grad.device)[None]
            few_rows = self.widths[0] <= self.widths[1]
            yield Piece(i, i + 1, *((whole.contiguous(), unit) if few_rows else (unit, whole.mT.contiguous())), None)

    def projected(self, outward: Tensor, inward: Tensor) -> Iterator[Piece]:
        """Use by use; a token for each output position and group.

        Patches are projected as a convolution with r kernels, so they are never unfolded.
        """
        most = max(b - a for a, b in pairwise(self._offsets))
        for x, g, window in self._uses:
            tokens = self._groups * g.shape[2] * g.shape[3]
            step = max(1, UNFOLDED // (most * max(tokens * len(inward), x[0].numel(), g[0].numel())))
            for first in range(0, self.n, step):
                last = min(self.n, first + step)
                begin, end = self._offsets[first], self._offsets[last]
                offsets = tuple((o - begin) * tokens for o in self._offsets[first : last + 1])
                seen = _project_patches(x[begin:end], inward, window, (g.shape[2], g.shape[3]))
                given = _project_channels(g[begin:end], outward, self._groups)
                yield Piece(first, last, seen, given, offsets)

    def _blocks(self, first: int, last: int, x: Tensor, g: Tensor) -> Iterator[_Block]:
        """Examples first..last in blocks within the bound."""
        rows = g.shape[2]
        row = g.shape[3] * x.shape[1] * self._kernel[0] * self._kernel[1]
        whole = slice(0, rows)
        if self._each and (step := UNFOLDED // (self._each * rows * row)):
            for start in range(first, last, step):
                end = min(last, start + step)
                yield _Block(start, end, slice(start * self._each, end * self._each), whole)
            return
        step, height = UNFOLDED // (rows * row), max(1, UNFOLDED // row)
        for example in range(first, last):
            begin, end = self._offsets[example : example + 2]
            for image in range(begin, end, step or 1):
                images = slice(image, min(end, image + (step or 1)))
                for top in [0] if step else range(0, rows, height):
                    yield _Block(example, example + 1, images, whole if step else slice(top, min(rows, top + height)))


class _Block(NamedTuple):
    """Examples first..last: these of their images, these of their output rows."""

    first: int
    last: int
    images: slice
    rows: slice


def _add_taps(taps: Tensor, x: Tensor, g: Tensor, window: Window, block: _Block, transposed: bool) -> None:
    """Add the products of a block to taps (kh kw, n groups, o, c), or (.., c, o)."""
    n, (sh, sw), (dh, dw), (span, _) = block.last - block.first, window.stride, window.dilation, window.span
    x = window.pad(x.to(taps.dtype))
    top, end = block.rows.start, block.rows.stop
    if (top, end) != (0, g.shape[2]):
        x, g = x[:, :, top * sh : (end - 1) * sh + span], g[:, :, top:end]
    (kh, kw), (height, width) = window.kernel, g.shape[2:]
    below, beside = (kh - 1) * dh // sh, (kw - 1) * dw // sw
    height, width = height + below, width + beside
    g = _flat(g.to(taps.dtype), height, width, n, window.groups)
    length = g.shape[2] - below * width - beside
    g = g[:, :, :length]
    phases: dict[tuple[int, int], Tensor] = {}
    for tap, (i, j) in zip(taps, product(range(kh), range(kw)), strict=True):
        (row, up), (column, left) = divmod(i * dh, sh), divmod(j * dw, sw)
        if (up, left) not in phases:
            part = x[:, :, up::sh, left::sw][:, :, :height, :width]
            phases[up, left] = _flat(part, height, width, n, window.groups)
        begin = row * width + column
        seen = phases[up, left][:, :, begin : begin + length]
        tap.baddbmm_(seen, g.mT) if transposed else tap.baddbmm_(g, seen.mT)


def _project_patches(x: Tensor, inward: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """x (images, c, h, w) -> every patch times ``inward`` (r, c / groups kh kw): (images groups positions, r).

    A matrix product per tap, on x as that tap sees it: neither TF32 nor a choice of algorithm, as of a library's own.
    """
    (kh, kw), (sh, sw), (dh, dw), (h, w) = window.kernel, window.stride, window.dilation, size
    x = window.pad(x.to(inward.dtype)).unflatten(1, (window.groups, -1)).flatten(0, 1)
    kernels = inward.unflatten(1, (-1, kh, kw))
    total = x.new_zeros(len(x), len(inward), h * w)
    for i, j in product(range(kh), range(kw)):
        top, left = i * dh, j * dw
        seen = x[:, :, top : top + (h - 1) * sh + 1 : sh, left : left + (w - 1) * sw + 1 : sw]
        total.baddbmm_(kernels[:, :, i, j].expand(len(x), -1, -1), seen.flatten(2))
    return total.mT.flatten(0, 1)


def _project_channels(g: Tensor, outward: Tensor, groups: int) -> Tensor:
    """g (images, o, h', w') -> ``outward`` (r, o) times it, each group apart: (images groups positions, r)."""
    g = g.to(outward.dtype).unflatten(1, (groups, -1)).flatten(3)
    given: Tensor = outward.unflatten(1, (groups, -1)).movedim(1, 0) @ g
    return given.mT.flatten(0, 2)


def _flat(t: Tensor, height: int, width: int, n: int, groups: int) -> Tensor:
    """(images, c, ..) -> (n groups, c / groups, images / n * height * width), with zeros up to height and width."""
    if t.shape[2:] != (height, width):
        t = functional.pad(t, (0, width - t.shape[3], 0, height - t.shape[2]))
    each = t.shape[0] // n
    t = t.unflatten(0, (n, each)).transpose(1, 2)
    return t.reshape(n * groups, t.shape[1] // groups, each * height * width)


def _tokens(t: Tensor, n: int) -> Tensor:
    """(images, positions, d) -> (n, all positions of an example, d)."""
    return t.reshape(n, -1, t.shape[2])


def _unfolded(x: Tensor, g: Tensor, window: Window) -> int:
    """Numbers in the patches of one image."""
    return x.shape[1] * window.kernel[0] * window.kernel[1] * g.shape[2] * g.shape[3]


def _check_use(x: Tensor, g: Tensor, window: Window, name: str) -> None:
    if x.ndim != 4 or g.ndim != 4 or x.shape[0] != g.shape[0] or x.device != g.device:
        raise ShapeError(f"{name}: x is {words(x)} and g is {words(g)}, expected (images, c, h, w) of the same images")
    expected = window.output(*x.shape[2:])
    if tuple(g.shape[2:]) != expected:
        raise ShapeError(
            f"{name}: its output is {tuple(g.shape[2:])} in size but its kernel, stride, padding and dilation make "
            f"{expected} of an input {tuple(x.shape[2:])}: it computes something else than its convolution"
        )


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width
