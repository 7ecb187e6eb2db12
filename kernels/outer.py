"""Per-example gradients of one parameter, sketched: out[n] += S vec(sum_t g_t x_t^T).

With x (tokens, q), g (tokens, p) and example n owning the tokens segments[n]..segments[n + 1], the gradient
of the parameter W (p, q) in y = x W^T is G_n = sum_t g_t x_t^T; the tokens of a convolution are its patches
(``images``). No backend holds more than a bounded number of G_n at once (torch up to 64 MiB of them or one, Triton
up to 32 MiB or one). A spec with ``project`` has large gradients projected from both sides first (``project``).
With ``adam`` it is Adam's update of G_n that is sketched (``adam``), of the whole sum over tokens.

Accumulation: float32 (float64 for float64 operands), never TF32 or bfloat16, also inside autocast.
Determinism: on the CPU the same call gives the same bits at the same thread count; on a GPU the default
backend gives an example the same bits whatever batch it stands in.
Source: Charikar et al. 2002 (CountSketch); Kane & Nelson 2014 (SJLT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import BackendError, ShapeError, SpecError
from gradsift.kernels.hashing import buckets_and_signs, matrix_shape
from gradsift.kernels.operands import Operands, Tokens, squared_norms, sum_dtype, words
from gradsift.kernels.project import projections
from gradsift.kernels.sketch import identity_offset, sketch_dense
from gradsift.kernels.spec import SketchSpec

__all__ = ["BACKENDS", "Held", "sketch_operands", "sketch_outer", "sketch_outer_reference"]

BACKENDS = ("auto", "torch", "triton", "triton-atomic")

_CHUNK = 1 << 24
"""Gradient entries that the torch path holds at once: 64 MiB of float32."""

_LOW_PRECISION = (torch.float32, torch.float16, torch.bfloat16)


class Held:
    """Gradients that ``sketch_outer`` computed and has not sketched yet, at most 2**24 numbers of them.

    A training step evicts the code of a sketch from the caches before it comes to the next map, so sketching many
    gradients in a row is faster than sketching each as it arrives. The order, so every bit, is the same.
    """

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self._numbers = 0

    def add(self, numbers: int, work: Callable[[], None]) -> None:
        """Do this later; everything so far at once where too much would be held."""
        self._work.append(work)
        self._numbers += numbers
        if self._numbers > _CHUNK:
            self.release()

    def release(self) -> None:
        """Do what is left."""
        work, self._work, self._numbers = self._work, [], 0
        with torch.no_grad():
            for do in work:
                do()


def sketch_outer_reference(
    x: Tensor,
    g: Tensor,
    offsets: Sequence[int],
    spec: SketchSpec,
    name: str,
    shape: tuple[int, ...],
    adam: AdamStep | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one example at a time in float64: sketch (n, dim) and squared norm (n,); for tests."""
    x, g = x.detach().double(), g.detach().double()
    grads = torch.stack([g[a:b].t() @ x[a:b] for a, b in pairwise(offsets)])
    if adam is not None:
        grads = adam(grads.view(-1, *shape))
    grads = grads.flatten(1)
    out = grads.new_zeros(len(grads), spec.dim)
    sketch_dense(grads, spec, name, shape, out)
    return out, grads.square().sum(1)


def sketch_outer(
    x: Tensor,
    g: Tensor,
    segments: Tensor | Sequence[int] | None,
    spec: SketchSpec,
    *,
    name: str,
    shape: tuple[int, ...],
    out: Tensor | None = None,
    sqnorm: Tensor | None = None,
    backend: str = "auto",
    held: Held | None = None,
    adam: AdamStep | None = None,
) -> Tensor:
    """Add the sketch of every example's weight gradient of one linear map.

    ``out[n, :] += S vec(sum over tokens t of example n of g_t x_t^T)``, S drawn from spec and `name`.

    Args:
        x: input activations, shape (tokens, q), or (n, T, q) when every example has T tokens; any strides;
            fp32, fp16, bf16 or (torch path) fp64. The torch path upcasts copies of fp16 and bf16.
        g: loss gradients at the map's output, shape (tokens, p) or (n, T, p).
        segments: offsets of the examples in the tokens, shape (n + 1,), non-decreasing from 0 to tokens;
            None for 3-d operands. Offsets in a list or on the CPU are read without waiting for a GPU.
        spec: the projection; an identity spec must be bound to the parameter.
        name: the parameter's canonical name.
        shape: the parameter's own full shape, p * q numbers in row-major order of G.
        out: shape (n, dim), float32 (or float64 on the torch path); allocated as zeros when None.
        sqnorm: shape (n,), float32 or float64; receives ``+= |G_n|^2``, exact: before the sketch and before a
            projection. Where a gradient is projected, this takes products between its tokens, T^2 (p + q) of them per
            example, or G itself where that is less.
        backend: "auto" is Triton for GPU tensors and torch elsewhere; "torch"; "triton"; or "triton-atomic",
            which saves a launch and is not bit-reproducible.
        held: lets the torch path put off the sketch; out and sqnorm are complete after ``held.release()``.
        adam: the parameter's moments: sketch and norm are then of Adam's update of G_n instead of G_n. An example
            without tokens has the update of a zero gradient, which is not zero.

    Returns:
        out.

    Raises:
        ShapeError: operands, segments, shape, out or sqnorm do not fit each other.
        BackendError: the backend named cannot run these tensors here.
        SpecError: the gradient is projected by its spec, and ``adam`` needs every entry of it.
    """
    operands = Tokens(x, g, segments, name, shape)
    return sketch_operands(
        operands, spec, name=name, shape=shape, out=out, sqnorm=sqnorm, backend=backend, held=held, adam=adam
    )


def sketch_operands(
    operands: Operands,
    spec: SketchSpec,
    *,
    name: str,
    shape: tuple[int, ...],
    out: Tensor | None = None,
    sqnorm: Tensor | None = None,
    backend: str = "auto",
    held: Held | None = None,
    adam: AdamStep | None = None,
) -> Tensor:
    """Add the sketch of every example's gradient of one parameter; as ``sketch_outer``, for operands of any map."""
    n, device = operands.n, operands.device
    if out is None:
        out = torch.zeros(n, spec.dim, dtype=torch.float32, device=device)
    _validate_outputs(out, sqnorm, n, spec, name, device)
    kind = _choose(backend, operands, spec, out)
    if n == 0 or (operands.empty and adam is None):
        return out
    if (sides := projections(spec, name, shape, sum_dtype(operands.dtypes), device)) is not None:
        small = len(sides[0]), len(sides[1])
        if adam is not None:
            raise SpecError(
                f"{name}: Adam works on every entry of a gradient but project={spec.project} has it projected to "
                f"{small} before it is formed: use a spec without project, or leave Adam out"
            )
        with torch.no_grad(), _full_precision(device.type):
            for first, last, x, g, offsets in operands.projected(*sides):
                some = Tokens(x, g, offsets, name, small)
                sketch_operands(some, spec, name=name, shape=small, out=out[first:last], backend=backend, held=held)
            if sqnorm is not None:
                _add_squares(operands, sqnorm)
        return out
    if kind == "torch":
        with torch.no_grad(), _full_precision(device.type):
            _sketch_torch(operands, spec, name, tuple(shape), out, sqnorm, held, adam)
        return out
    from gradsift.kernels.outer_triton import sketch_outer_triton  # here: triton is loaded only when it runs

    atomic = kind == "triton-atomic"
    with torch.no_grad(), _full_precision(device.type):
        for first, last, x, g, offsets in operands.pieces():
            norms = None if sqnorm is None else sqnorm[first:last]
            sketch_outer_triton(x, g, offsets, spec, name, shape, out[first:last], norms, atomic=atomic, adam=adam)
    return out


def _validate_outputs(
    out: Tensor, sqnorm: Tensor | None, n: int, spec: SketchSpec, name: str, device: torch.device
) -> None:
    if out.shape != (n, spec.dim) or out.dtype not in (torch.float32, torch.float64) or out.device != device:
        raise ShapeError(f"{name}: out is {words(out)}, expected float32 of shape ({n}, {spec.dim}) on {device}")
    if sqnorm is not None and (
        sqnorm.shape != (n,) or sqnorm.dtype not in (torch.float32, torch.float64) or sqnorm.device != device
    ):
        raise ShapeError(f"{name}: sqnorm is {words(sqnorm)}, expected float32 of shape ({n},) on {device}")


def _choose(backend: str, operands: Operands, spec: SketchSpec, out: Tensor) -> str:
    """The backend that runs; an explicit one is never replaced."""
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    cause = None
    x, g = operands.dtypes
    if spec.kind == "identity":
        cause = "an identity sketch has no kernel"
    elif x not in _LOW_PRECISION or g not in _LOW_PRECISION or out.dtype != torch.float32:
        cause = f"there is no kernel from {x} and {g} into {out.dtype}"
    if backend == "auto":
        return "triton" if operands.device.type == "cuda" and cause is None else "torch"
    if backend != "torch" and cause is not None:
        raise BackendError(f"backend {backend!r} cannot run this call ({cause}): use backend='auto'")
    return backend


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Entered: neither autocast nor TF32 nor bfloat16 inside float32 products, until it is left."""
    stack = ExitStack()
    if torch.is_autocast_enabled(device_type):
        stack.enter_context(torch.autocast(device_type, enabled=False))
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    products: Any = getattr(backend, "matmul", None)
    if hasattr(products, "fp32_precision"):
        before = products.fp32_precision
        if before not in ("none", "ieee"):
            products.fp32_precision = "ieee"
            stack.callback(setattr, products, "fp32_precision", before)
    elif (mode := torch.get_float32_matmul_precision()) != "highest":  # torch < 2.9
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, mode)
    return stack


def _sketch_torch(
    operands: Operands,
    spec: SketchSpec,
    name: str,
    shape: tuple[int, ...],
    out: Tensor,
    sqnorm: Tensor | None,
    held: Held | None,
    adam: AdamStep | None,
) -> None:
    """G by matrix products, a bounded number of examples at a time, then their sketch at once."""
    step: AdamStep | None = None
    for first, last in _spans(operands):
        grad, transposed = operands.gradients(first, last)
        if adam is not None:
            step = step or adam.oriented(*operands.widths, transposed, grad.device)
            grad = step(grad)
        norms = None if sqnorm is None else sqnorm[first:last]
        add = partial(_add_sketch, grad, transposed, spec, name, shape, out[first:last], norms)
        if held is None:
            add()
        else:
            held.add(grad.numel(), add)


def _spans(operands: Operands) -> Iterator[tuple[int, int]]:
    """All examples, as many at a time as may have their gradients in memory: at least one."""
    p, q = operands.widths
    step = max(1, _CHUNK // (p * q))
    for first in range(0, operands.n, step):
        yield first, min(operands.n, first + step)


def _add_squares(operands: Operands, sqnorm: Tensor) -> None:
    """Norms of gradients that are not sketched themselves, a bounded number at a time."""
    for first, last in _spans(operands):
        sqnorm[first:last] += operands.squares(first, last)


def _add_sketch(
    grad: Tensor,
    transposed: bool,
    spec: SketchSpec,
    name: str,
    shape: tuple[int, ...],
    out: Tensor,
    sqnorm: Tensor | None,
) -> None:
    """Sketch gradients (n, thin, long) that nobody else holds: they are overwritten."""
    n, size = grad.shape[0], grad.shape[1] * grad.shape[2]
    if sqnorm is not None:
        sqnorm.add_(squared_norms(grad))
    if spec.kind == "identity":
        offset = identity_offset(spec, name, shape)
        out[:, offset : offset + size] += (grad.transpose(1, 2) if transposed else grad).reshape(n, size)
        return
    bucket, sign = _buckets_and_signs(spec, name, shape, transposed, grad.device)
    out.index_add_(1, bucket, grad.view(n, size).mul_(sign).to(out.dtype))


@lru_cache(maxsize=4096)
def _buckets_and_signs(
    spec: SketchSpec, name: str, shape: tuple[int, ...], transposed: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """As `buckets_and_signs`, in the order of the gradient that was computed, where it was computed."""
    bucket, sign = buckets_and_signs(spec, name, shape)
    if transposed:
        bucket, sign = (t.view(matrix_shape(shape)).t().reshape(-1) for t in (bucket, sign))
    return bucket.to(device), sign.to(device)
