"""The fused kernels against fp64, and against themselves: in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradsift.kernels.outer import sketch_outer, sketch_outer_reference
from gradsift.kernels.spec import SketchSpec

triton = pytest.importorskip("triton")
from gradsift.kernels import outer_triton  # noqa: E402

SPEC = SketchSpec(dim=128, seed=5)
RAGGED = (0, 3, 3, 40, 41)
TOKENS = RAGGED[-1]
MODES = ("triton", "triton-atomic")
# fp32 sums of at most a few hundred products: rounding against the norm of the gradient without cancellation
TOLERANCE = 1e-6
SHAPES = [
    (1, 1),
    (1, 65),
    (2, 64),
    (3, 127),
    (8, 63),
    (16, 128),
    (17, 33),
    (31, 129),
    (32, 32),
    (33, 65),
    (64, 64),
    (66, 70),
]


def run(
    x: Tensor,
    g: Tensor,
    segments: tuple[int, ...] | None,
    mode: str,
    shape: tuple[int, ...] | None = None,
    spec: SketchSpec = SPEC,
) -> tuple[Tensor, Tensor]:
    n = x.shape[0] if segments is None else len(segments) - 1
    sqnorm = torch.zeros(n, device=x.device)
    shape = shape or (g.shape[-1], x.shape[-1])
    return sketch_outer(x, g, segments, spec, name="m", shape=shape, sqnorm=sqnorm, backend=mode), sqnorm


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected.cpu()).norm() / expected.norm().clamp_min(1e-30))


def check(
    x: Tensor,
    g: Tensor,
    mode: str,
    segments: tuple[int, ...] = RAGGED,
    shape: tuple[int, ...] | None = None,
    spec: SketchSpec = SPEC,
) -> None:
    got, sqnorm = run(x, g, segments, mode, shape, spec)
    x, g, shape = x.cpu(), g.cpu(), shape or (g.shape[-1], x.shape[-1])
    expected, norm = sketch_outer_reference(x, g, segments, spec, "m", shape)
    _, scale = sketch_outer_reference(x.abs(), g.abs(), segments, spec, "m", shape)
    assert float((got.cpu() - expected).norm()) <= TOLERANCE * float(scale.sum().sqrt())
    assert float((sqnorm.cpu() - norm).norm()) <= TOLERANCE * float(scale.norm())


@pytest.fixture
def randn(device: torch.device) -> Callable[..., Tensor]:
    return lambda *size: torch.randn(*size).to(device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("thin", "long"), SHAPES)
def test_shapes_both_ways(randn: Callable[..., Tensor], thin: int, long: int, mode: str) -> None:
    a, b = randn(TOKENS, thin), randn(TOKENS, long)
    check(a, b, mode)
    check(b, a, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("segments", [(0, 41), (0, 0, 41), (0, 41, 41), (*range(12), 41)])
def test_segments(randn: Callable[..., Tensor], segments: tuple[int, ...], mode: str) -> None:
    check(randn(TOKENS, 70), randn(TOKENS, 4), mode, segments)


@pytest.mark.parametrize("mode", MODES)
def test_more_examples_than_tokens_and_other_shapes(randn: Callable[..., Tensor], mode: str) -> None:
    check(randn(2, 36), randn(2, 5), mode, (0, 0, 1, 1, 2, 2), shape=(5, 4, 3, 3))
    check(torch.ones_like(randn(2, 1)), randn(2, 5), mode, (0, 1, 2), shape=(5,))


def test_padded_strided_and_expanded_operands(randn: Callable[..., Tensor]) -> None:
    x, g = randn(5, 3, 140)[:, :, ::2], randn(5, 3, 6)
    contiguous, norm = run(x.contiguous(), g, None, "triton")
    for left, right in (
        (x, g),
        (x.transpose(0, 1).contiguous().transpose(0, 1), g.transpose(1, 2).contiguous().transpose(1, 2)),
        (x.expand(5, 3, 70), g),
    ):
        got, got_norm = run(left, right, None, "triton")
        assert error(got, contiguous.double()) <= TOLERANCE
        assert error(got_norm, norm.double()) <= TOLERANCE
    ones = torch.ones(1, 1, device=x.device).expand(TOKENS, 1)
    check(ones, randn(TOKENS, 9), "triton", shape=(9,))


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_low_precision_is_accumulated_in_fp32(randn: Callable[..., Tensor], dtypes: tuple[str, str]) -> None:
    x, g = (t.to(getattr(torch, d)) for t, d in zip((randn(TOKENS, 70), randn(TOKENS, 4)), dtypes, strict=True))
    check(x, g, "triton")


def test_every_block_of_a_wide_sketch(randn: Callable[..., Tensor]) -> None:
    check(randn(TOKENS, 200), randn(TOKENS, 9), "triton", (0, 20, 41), spec=SketchSpec(dim=1024, seed=1))


@pytest.mark.usefixtures("poisoned")
def test_chunks_of_examples_and_rows_change_no_bit(
    randn: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, g = randn(TOKENS, 70), randn(TOKENS, 66)
    check(x, g, "triton")
    whole = run(x, g, RAGGED, "triton")
    monkeypatch.setattr(outer_triton, "SCRATCH_BYTES", 3 * 66 * 128 * 4)  # 3 examples
    for got, expected in zip(run(x, g, RAGGED, "triton"), whole, strict=True):
        assert torch.equal(got, expected)
    monkeypatch.setattr(outer_triton, "SCRATCH_BYTES", 1)  # 64 rows of one example: other sums, none of them wrong
    check(x, g, "triton")


def test_bits_do_not_depend_on_the_batch(randn: Callable[..., Tensor]) -> None:
    x, g = randn(TOKENS, 70), randn(TOKENS, 6)
    rows, norms = run(x, g, RAGGED, "triton")
    again, _ = run(x, g, RAGGED, "triton")
    assert torch.equal(again, rows)
    for i in range(len(RAGGED) - 1):
        own = slice(RAGGED[i], RAGGED[i + 1])
        alone, norm = run(x[own], g[own], (0, own.stop - own.start), "triton")
        assert torch.equal(alone[0], rows[i]) and torch.equal(norm[0], norms[i])
    third = slice(3, 40)
    padded, _ = run(x[third][None].repeat(2, 1, 1), g[third][None].repeat(2, 1, 1), None, "triton")
    assert torch.equal(padded[1], rows[2])


def test_adds_to_what_is_there(randn: Callable[..., Tensor], device: torch.device) -> None:
    x, g = randn(TOKENS, 70), randn(TOKENS, 6)
    for mode in MODES:
        rows, norms = run(x, g, RAGGED, mode)
        out, sqnorm = torch.ones_like(rows), torch.ones(len(norms), dtype=torch.float64, device=device)
        sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(6, 70), out=out, sqnorm=sqnorm, backend=mode)
        torch.testing.assert_close(out, 1 + rows, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(sqnorm, 1 + norms.double(), atol=1e-5, rtol=1e-6)
        rest = torch.zeros(len(norms), 256, device=device)
        sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(6, 70), out=rest[:, 64:192], backend=mode)
        torch.testing.assert_close(rest[:, 64:192], rows, atol=1e-4, rtol=1e-6)
        assert not rest[:, :64].any() and not rest[:, 192:].any()


def test_addresses_past_2_31(device: torch.device) -> None:
    """Three tokens 2**30 elements apart, in memory of which only the pages touched exist."""
    far = 1 << 30
    buffer = torch.empty(2 * far + 64, dtype=torch.float16, device=device)
    x, g = buffer.as_strided((3, 33), (far, 1)), torch.randn(3, 3).to(device)
    x.copy_(torch.randn(3, 33))
    check(x, g, "triton", (0, 1, 3))
    packed, _ = run(x, g, (0, 1, 2, 3), "triton")
    padded, _ = run(x[:, None, :], g[:, None, :], None, "triton")
    assert torch.equal(padded, packed)


def in_fresh_process(code: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)


def test_explicit_triton_never_falls_back() -> None:
    in_fresh_process(
        "import torch\n"
        "from gradsift.kernels.errors import BackendError\n"
        "from gradsift.kernels.outer import sketch_outer\n"
        "from gradsift.kernels.spec import SketchSpec\n"
        "x = torch.ones(2, 3)\n"
        "try:\n"
        "    sketch_outer(x, x, (0, 2), SketchSpec(), name='m', shape=(3, 3), backend='triton')\n"
        "except BackendError as error:\n"
        "    assert 'move the tensors to a GPU' in str(error)\n"
        "else:\n"
        "    raise SystemExit('ran')\n"
    )


def test_compiles_without_a_gpu() -> None:
    """One variant per kernel; benchmarks/aot.py does them all."""
    in_fresh_process(
        "from gradsift.kernels.aot import compile_variant, variants\n"
        "rows = list(variants())\n"
        "for v in rows[-1], next(v for v in rows if v.dtypes == 'bf16'):\n"
        "    row = compile_variant(v, 'sm_90')\n"
        "    assert not row.problem and row.registers, row\n"
        "assert 'wgmma' in row.matrix\n"
    )
