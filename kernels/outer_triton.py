"""The fused kernel: per-example gradient tiles, sketched on the spot. Launched by `sketch_outer`.

    out[n, 64 block + (lane ^ mask)] += sign * G_n[row, column]      G_n = sum_t g_t x_t^T

or, with moments, Adam's update of G_n: (first + a G) / (sqrt(second + b G^2) + eps), applied to the finished tile.

The longer of the two widths is the long side (L columns), the other the thin side (R rows): for a LoRA pair R is the
rank. One program owns a tile (BLOCK_L columns, BLOCK_R rows) of one example and loops over that example's tokens.

Ordered (default), two launches: tiles go to a scratch in row-major order, then a program that owns 64 numbers of one
example's output gathers the row segments that hash there, through a list sorted by block. Bytes: x and g once per
BLOCK_R rows, 8 n R L for the scratch (in L2 while below its size), 8 n dim for out. Atomic: signed tiles straight
into out, 4 n R L of atomic traffic. Moments: 8 R L read per example.

Accumulation: float32; float32 operands by IEEE products, never TF32. Determinism (ordered): no atomics, and nothing
that changes rounding depends on the batch: an example's bits follow from its own tokens, the map's shape, the dtype,
the alignment of the operands, the architecture and the Triton version.
Source: row segments as in `hashing`; batch invariance by fixed tiles and an owner per output block.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# No `from __future__ import annotations`: Triton reads the constexpr annotations as objects.

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import BackendError
from gradsift.kernels.hashing import parameter_key, segment_hashes
from gradsift.kernels.spec import SEGMENT, SketchSpec

__all__ = ["GATHER", "INTERPRETED", "SCRATCH_BYTES", "Tile", "sketch_outer_triton", "tile_for"]

SCRATCH_BYTES = 32 << 20
"""Bound of the ordered mode's scratch; one example's BLOCK_R rows are the least that is held."""


class Tile(NamedTuple):
    """Launch parameters of the tile kernel. They follow from widths, dtypes and alignment, never from the batch."""

    block_t: int
    block_l: int
    block_r: int
    num_warps: int
    num_stages: int


class Gather(NamedTuple):
    """Launch parameters of the gather kernel: segments read at once, partial sums read at once."""

    block_j: int
    block_p: int
    num_warps: int


GATHER = Gather(block_j=16, block_p=128, num_warps=4)


def tile_for(rows: int, dtypes: tuple[torch.dtype, torch.dtype], aligned: bool) -> Tile:
    """The tile for a thin side of `rows` and operands of these dtypes.

    The values spill nothing on any target of `aot`; `aligned` is about the long operand.
    """
    block_r = min(64, max(16, triton.next_power_of_2(rows)))
    if dtypes[0] == dtypes[1] != torch.float32:
        if aligned:
            return Tile(64, 128, block_r, num_warps=8 if block_r == 64 else 4, num_stages=3)
        return Tile(32, 64, block_r, num_warps=4, num_stages=1)
    block_t = 16 if block_r == 64 else 32
    return Tile(block_t, 64, block_r, num_warps=4, num_stages=2 if aligned else 1)


@triton.jit
def _mix(x):
    """32-bit finaliser; equal to hashing._mix."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _key(keys_ptr, i: tl.constexpr):
    return tl.load(keys_ptr + i).to(tl.uint32, bitcast=True)


@triton.jit
def _tile_kernel(
    # pointers
    long_ptr,
    thin_ptr,
    bounds_ptr,
    keys_ptr,
    out_ptr,
    partial_ptr,
    first_ptr,
    second_ptr,
    # Adam's coefficients
    a_adam,
    b_adam,
    eps_adam,
    # sizes
    long,
    first_row,
    last_row,
    tiles_l,
    tiles_r,
    blocks,
    # strides
    stride_ln,
    stride_lt,
    stride_lc,
    stride_tn,
    stride_tt,
    stride_tc,
    stride_on,
    # constants
    ATOMIC: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ADAM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of one example's gradient; rows first_row..last_row of the thin side are covered by the grid."""
    pid = tl.program_id(0)
    tile = pid % (tiles_l * tiles_r)
    example = (pid // (tiles_l * tiles_r)).to(tl.int64)
    tile_l = tile // tiles_r
    tile_r = tile % tiles_r
    begin = tl.load(bounds_ptr + 2 * example)
    end = tl.load(bounds_ptr + 2 * example + 1)

    offs_l = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_r = first_row + tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_t = tl.arange(0, BLOCK_T)
    mask_l = offs_l < long
    mask_r = offs_r < last_row
    long_ptrs = long_ptr + example * stride_ln + (begin + offs_t)[:, None] * stride_lt
    long_ptrs += offs_l.to(tl.int64)[None, :] * stride_lc
    thin_ptrs = thin_ptr + example * stride_tn + (begin + offs_t)[:, None] * stride_tt
    thin_ptrs += offs_r.to(tl.int64)[None, :] * stride_tc

    acc = tl.zeros((BLOCK_L, BLOCK_R), dtype=tl.float32)
    tokens = (end - begin).to(tl.int32)
    for t in range(0, tokens, BLOCK_T):
        mask_t = (offs_t < tokens - t)[:, None]
        a = tl.load(long_ptrs, mask=mask_t & mask_l[None, :], other=0.0)  # (BLOCK_T, BLOCK_L)
        b = tl.load(thin_ptrs, mask=mask_t & mask_r[None, :], other=0.0)  # (BLOCK_T, BLOCK_R)
        if a.dtype != b.dtype:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
        long_ptrs += tl.cast(BLOCK_T, tl.int64) * stride_lt
        thin_ptrs += tl.cast(BLOCK_T, tl.int64) * stride_tt

    if HAS_ADAM:  # moments are (rows, long); outside of them the update is 0 / 1
        offs_m = offs_r.to(tl.int64)[None, :] * long + offs_l[:, None]
        mask_m = mask_l[:, None] & mask_r[None, :]
        root = tl.load(second_ptr + offs_m, mask=mask_m, other=1.0)  # (BLOCK_L, BLOCK_R)
        root = tl.sqrt(root + b_adam * acc * acc) + eps_adam
        acc = (tl.load(first_ptr + offs_m, mask=mask_m, other=0.0) + a_adam * acc) / root

    if HAS_NORM:
        square = tl.sum(acc * acc)  # axis by axis, triton 3.6 fails to compile for sm_100
        if ATOMIC:
            tl.atomic_add(partial_ptr + example, square.to(partial_ptr.dtype.element_ty))
        else:
            tl.store(partial_ptr + pid, square)
    per_row = (long + 63) // 64
    if ATOMIC:
        lane = (offs_l % 64)[:, None]
        index = offs_r[None, :] * per_row + (offs_l // 64)[:, None]
        hashed = _mix(index.to(tl.uint32) + _key(keys_ptr, 0))
        h = _mix(hashed ^ _key(keys_ptr, 1))
        low = _mix(hashed ^ _key(keys_ptr, 2))
        high = _mix(hashed ^ _key(keys_ptr, 3))
        word = tl.where(lane < 32, low, high)
        minus = ((word >> (lane % 32).to(tl.uint32)) & 1) != 0
        block = ((h.to(tl.uint64) * tl.cast(blocks, tl.uint64)) >> 32).to(tl.int64)
        offs_o = block * 64 + (lane ^ (h & 63).to(tl.int32))
        value = tl.where(minus, -acc, acc)  # (BLOCK_L, BLOCK_R)
        tl.atomic_add(
            out_ptr + example * stride_on + offs_o, value, mask=mask_l[:, None] & mask_r[None, :], sem="relaxed"
        )
    else:
        # lanes past the long side are written too, as zeros: the gather reads whole segments
        offs_s = (offs_r - first_row).to(tl.int64)[None, :] * (per_row * 64) + offs_l[:, None]
        mask_s = (offs_l < per_row * 64)[:, None] & mask_r[None, :]
        tl.store(out_ptr + example * stride_on + offs_s, acc, mask=mask_s)  # (BLOCK_L, BLOCK_R)


@triton.jit
def _gather_kernel(
    # pointers
    scratch_ptr,
    order_ptr,
    starts_ptr,
    keys_ptr,
    out_ptr,
    partial_ptr,
    sqnorm_ptr,
    # sizes
    blocks,
    first_index,
    partials,
    # strides
    stride_sn,
    stride_on,
    # constants
    HAS_NORM: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """64 numbers of one example's row: the signed sum of the row segments that hash to this block."""
    pid = tl.program_id(0)
    block = pid % blocks
    example = (pid // blocks).to(tl.int64)
    begin = tl.load(starts_ptr + block)
    end = tl.load(starts_ptr + block + 1)
    k0 = _key(keys_ptr, 0)
    k1 = _key(keys_ptr, 1)
    k2 = _key(keys_ptr, 2)
    k3 = _key(keys_ptr, 3)
    lane = tl.arange(0, 64)[None, :]
    offs_j = tl.arange(0, BLOCK_J)
    acc = tl.zeros((BLOCK_J, 64), dtype=tl.float32)
    for j in range(begin, end, BLOCK_J):
        mask_j = j + offs_j < end
        index = tl.load(order_ptr + j + offs_j, mask=mask_j, other=0)  # (BLOCK_J,)
        t = _mix(index.to(tl.uint32) + k0)
        mask = (_mix(t ^ k1) & 63).to(tl.int32)
        source = lane ^ mask[:, None]
        word = tl.where(source < 32, _mix(t ^ k2)[:, None], _mix(t ^ k3)[:, None])
        minus = ((word >> (source % 32).to(tl.uint32)) & 1) != 0
        offs_s = (index - first_index).to(tl.int64)[:, None] * 64 + source
        value = tl.load(scratch_ptr + example * stride_sn + offs_s, mask=mask_j[:, None], other=0.0)
        acc += tl.where(minus, -value, value)  # (BLOCK_J, 64)
    out_ptrs = out_ptr + example * stride_on + block * 64 + tl.arange(0, 64)
    tl.store(out_ptrs, tl.load(out_ptrs) + tl.sum(acc, axis=0))

    if HAS_NORM and block == 0:
        offs_p = tl.arange(0, BLOCK_P)
        square = tl.zeros((BLOCK_P,), dtype=tl.float32)
        for p in range(0, partials, BLOCK_P):
            mask_p = p + offs_p < partials
            square += tl.load(partial_ptr + example * partials + p + offs_p, mask=mask_p, other=0.0)
        total = tl.load(sqnorm_ptr + example) + tl.sum(square, axis=0)
        tl.store(sqnorm_ptr + example, total)


INTERPRETED = not isinstance(_tile_kernel, triton.runtime.jit.JITFunction)
"""True when this module was imported under TRITON_INTERPRET=1."""


def sketch_outer_triton(
    x: Tensor,
    g: Tensor,
    offsets: tuple[int, ...] | None,
    spec: SketchSpec,
    name: str,
    shape: tuple[int, ...],
    out: Tensor,
    sqnorm: Tensor | None,
    *,
    atomic: bool,
    adam: AdamStep | None = None,
) -> None:
    """Launch the kernels on operands that `sketch_outer` has validated: (n, T, d), or (tokens, d) with offsets.

    Raises:
        BackendError: the tensors are not on a GPU and the interpreter is off.
    """
    if not x.is_cuda and not INTERPRETED:
        raise BackendError(
            f"backend 'triton' was asked for {name} on {x.device}: move the tensors to a GPU, use backend='auto', "
            "or set TRITON_INTERPRET=1 before Python starts"
        )
    if INTERPRETED:  # it computes on the bits of bfloat16 as if they were integers
        x, g = (t.float() if t.dtype == torch.bfloat16 else t for t in (x.detach(), g.detach()))
    p, q = g.shape[-1], x.shape[-1]
    long, thin = (x, g) if p <= q else (g, x)
    aligned = _aligned(long)
    tile = tile_for(min(p, q), (long.dtype, thin.dtype), aligned)
    moments = None if adam is None else adam.oriented(p, q, p > q, x.device)
    call = _Call(spec, name, tuple(shape), min(p, q), max(p, q), tile, moments)
    bounds = _bounds(offsets, x.shape[0], 0 if offsets is not None else x.shape[1], x.device)
    with torch.cuda.device_of(x):
        if atomic:
            _launch_atomic(call, long, thin, bounds, out, sqnorm)
        else:
            _launch_ordered(call, long, thin, bounds, out, sqnorm)


class _Call(NamedTuple):
    spec: SketchSpec
    name: str
    shape: tuple[int, ...]
    rows: int
    long: int
    tile: Tile
    adam: AdamStep | None


def _aligned(t: Tensor) -> bool:
    """Whether Triton may assume multiples of 16 for the long operand's address, strides and width."""
    strides = t.stride()
    return strides[-1] == 1 and t.data_ptr() % 16 == 0 and not any(s % 16 for s in (*strides[:-1], t.shape[-1]))


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Strides (example, token, column); with offsets the example's place is in the bounds."""
    return (0, *t.stride()) if t.ndim == 2 else t.stride()  # type: ignore[return-value]


@lru_cache(maxsize=64)
def _bounds(offsets: tuple[int, ...] | None, n: int, tokens: int, device: torch.device) -> Tensor:
    """First and past-the-last token of every example, int64 of shape (n, 2)."""
    pairs = [(0, tokens)] * n if offsets is None else list(pairwise(offsets))
    return torch.tensor(pairs, dtype=torch.int64, device=device)


@lru_cache(maxsize=65536)
def _keys(seed: int, name: str, device: torch.device) -> Tensor:
    """k0..k3 as int32 bits: a scalar argument would compile one kernel per size of key."""
    words = torch.tensor(parameter_key(seed, name), dtype=torch.int64)
    return words.to(torch.int32).to(device)


@lru_cache(maxsize=4096)
def _lists(
    spec: SketchSpec, name: str, rows: int, long: int, group: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row segments sorted by (row group, block), and where each (row group, block) begins; both int32."""
    block = segment_hashes(spec, name, rows, long).block
    blocks = spec.dim // SEGMENT
    owner = (torch.arange(rows) // group)[:, None] * blocks + block
    order = torch.argsort(owner.view(-1), stable=True)
    count = torch.bincount(owner.view(-1), minlength=-(-rows // group) * blocks)
    starts = torch.cat([count.new_zeros(1), count.cumsum(0)])
    return order.to(device, torch.int32), starts.to(device, torch.int32)


def _launch_ordered(
    call: _Call, long: Tensor, thin: Tensor, bounds: Tensor, out: Tensor, sqnorm: Tensor | None
) -> None:
    """Groups of rows (fixed by the shape), and within a group as many examples as the scratch holds."""
    spec, tile = call.spec, call.tile
    per_row = -(-call.long // SEGMENT)
    row_bytes = per_row * SEGMENT * 4
    group = max(1, SCRATCH_BYTES // (row_bytes * tile.block_r)) * tile.block_r
    group = min(group, call.rows)
    order, starts = _lists(spec, call.name, call.rows, call.long, group, out.device)
    keys = _keys(spec.seed, call.name, out.device)
    blocks = spec.dim // SEGMENT
    n = out.shape[0]
    step = max(1, min(n, SCRATCH_BYTES // (row_bytes * group)))
    tiles_l = triton.cdiv(call.long, tile.block_l)
    tiles_r = triton.cdiv(group, tile.block_r)
    scratch = torch.empty(step, group * per_row * SEGMENT, dtype=torch.float32, device=out.device)
    partial = torch.empty(step, tiles_l * tiles_r, dtype=torch.float32, device=out.device)
    for first_row in range(0, call.rows, group):
        last_row = min(call.rows, first_row + group)
        tiles_r = triton.cdiv(last_row - first_row, tile.block_r)
        for first in range(0, n, step):
            count = min(step, n - first)
            in_batch = slice(first, first + count)
            _launch_tiles(call, long, thin, bounds, in_batch, keys, scratch, partial, first_row, last_row, atomic=False)
            _gather_kernel[(count * blocks,)](
                scratch,
                order,
                starts[first_row // group * blocks :],
                keys,
                out[in_batch],
                partial,
                partial if sqnorm is None else sqnorm[in_batch],
                blocks,
                first_row * per_row,
                tiles_l * tiles_r,
                scratch.stride(0),
                out.stride(0),
                HAS_NORM=sqnorm is not None,
                BLOCK_J=GATHER.block_j,
                BLOCK_P=GATHER.block_p,
                num_warps=GATHER.num_warps,
                enable_fp_fusion=True,
            )


def _launch_atomic(call: _Call, long: Tensor, thin: Tensor, bounds: Tensor, out: Tensor, sqnorm: Tensor | None) -> None:
    keys = _keys(call.spec.seed, call.name, out.device)
    _launch_tiles(call, long, thin, bounds, slice(0, out.shape[0]), keys, out, sqnorm, 0, call.rows, atomic=True)


def _launch_tiles(
    call: _Call,
    long: Tensor,
    thin: Tensor,
    bounds: Tensor,
    in_batch: slice,
    keys: Tensor,
    target: Tensor,
    norms: Tensor | None,
    first_row: int,
    last_row: int,
    *,
    atomic: bool,
) -> None:
    tile = call.tile
    tiles_l = triton.cdiv(call.long, tile.block_l)
    tiles_r = triton.cdiv(last_row - first_row, tile.block_r)
    if long.ndim == 3:
        long, thin = long[in_batch], thin[in_batch]
    adam = call.adam
    _tile_kernel[((in_batch.stop - in_batch.start) * tiles_l * tiles_r,)](
        long,
        thin,
        bounds[in_batch],
        keys,
        target,
        target if norms is None else norms,
        target if adam is None else adam.first,
        target if adam is None else adam.second,
        0.0 if adam is None else adam.a,
        0.0 if adam is None else adam.b,
        0.0 if adam is None else adam.eps,
        call.long,
        first_row,
        last_row,
        tiles_l,
        tiles_r,
        call.spec.dim // SEGMENT,
        *_strides(long),
        *_strides(thin),
        target.stride(0),
        ATOMIC=atomic,
        HAS_NORM=norms is not None,
        HAS_ADAM=adam is not None,
        BLOCK_T=tile.block_t,
        BLOCK_L=tile.block_l,
        BLOCK_R=tile.block_r,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )
