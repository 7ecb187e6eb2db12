"""sketch_outer in torch against its definition in fp64: shapes, layouts, dtypes, precision, refusals."""

import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gradsift.kernels import outer
from gradsift.kernels.errors import BackendError, ShapeError
from gradsift.kernels.outer import sketch_outer, sketch_outer_reference
from gradsift.kernels.spec import SketchSpec

SPEC = SketchSpec(dim=128, seed=5)
RAGGED = (0, 3, 3, 8, 9, 20)
# fp32 sums of at most a few hundred products: rounding against the norm of the gradient without cancellation
TOLERANCE = 1e-6


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def check(
    x: Tensor,
    g: Tensor,
    segments: Sequence[int],
    shape: tuple[int, ...] | None = None,
    spec: SketchSpec = SPEC,
    tolerance: float = TOLERANCE,
) -> None:
    shape = shape or (g.shape[-1], x.shape[-1])
    sqnorm = torch.zeros(len(segments) - 1)
    got = sketch_outer(x, g, segments, spec, name="m", shape=shape, sqnorm=sqnorm, backend="torch")
    expected, expected_norm = sketch_outer_reference(x, g, segments, spec, "m", shape)
    assert got.dtype == torch.float32
    _, scale = sketch_outer_reference(x.abs(), g.abs(), segments, spec, "m", shape)
    assert float((got - expected).norm()) <= tolerance * float(scale.sum().sqrt())
    assert float((sqnorm - expected_norm).norm()) <= tolerance * float(scale.norm())


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("q", [1, 17, 63, 64, 65, 127, 129])
def test_ranks_and_widths(p: int, q: int) -> None:
    x, g = torch.randn(20, q), torch.randn(20, p)
    check(x, g, RAGGED)
    check(g, x, RAGGED)


@pytest.mark.parametrize("segments", [(0, 20), (0, 5, 10, 15, 20), (0, 0, 20), (0, 20, 20), RAGGED])
def test_segments(segments: tuple[int, ...]) -> None:
    check(torch.randn(20, 30), torch.randn(20, 4), segments)


def test_norm_of_a_full_weights_gradient_is_exact() -> None:
    """Millions of squares, summed one after another in float32, would be 1e-4 off."""
    x, g = torch.randn(1, 2, 4096), torch.randn(1, 2, 1024)
    sqnorm = torch.zeros(1)
    sketch_outer(x, g, None, SPEC, name="m", shape=(1024, 4096), sqnorm=sqnorm)
    assert error(sqnorm, (g.double().mT @ x.double()).square().sum((1, 2))) <= TOLERANCE


def test_no_tokens_and_no_examples() -> None:
    x, g = torch.randn(0, 30), torch.randn(0, 4)
    sqnorm = torch.ones(2)
    out = torch.ones(2, 128)
    sketch_outer(x, g, (0, 0, 0), SPEC, name="m", shape=(4, 30), out=out, sqnorm=sqnorm)
    assert torch.equal(out, torch.ones(2, 128)) and torch.equal(sqnorm, torch.ones(2))
    assert sketch_outer(x, g, (0,), SPEC, name="m", shape=(4, 30)).shape == (0, 128)
    assert sketch_outer(torch.randn(3, 0, 30), torch.randn(3, 0, 4), None, SPEC, name="m", shape=(4, 30)).any() == 0


def test_offsets_may_be_tensors() -> None:
    x, g = torch.randn(20, 30), torch.randn(20, 4)
    lists = sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30))
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(sketch_outer(x, g, torch.tensor(RAGGED, dtype=dtype), SPEC, name="m", shape=(4, 30)), lists)


def test_padded_operands_are_the_ragged_ones() -> None:
    x, g = torch.randn(4, 5, 30), torch.randn(4, 5, 6)
    padded = sketch_outer(x, g, None, SPEC, name="m", shape=(6, 30))
    packed = sketch_outer(x.flatten(0, 1), g.flatten(0, 1), (0, 5, 10, 15, 20), SPEC, name="m", shape=(6, 30))
    one_row = sketch_outer(x.reshape(1, 20, 30), g.reshape(1, 20, 6), (0, 5, 10, 15, 20), SPEC, name="m", shape=(6, 30))
    assert torch.equal(padded, packed) and torch.equal(padded, one_row)


def test_strided_operands() -> None:
    x, g = torch.randn(40, 60)[::2, ::2], torch.randn(6, 20).t()
    check(x, g, RAGGED)
    check(x, g, (0, 10, 20))
    seq_first = torch.randn(5, 4, 30).transpose(0, 1), torch.randn(5, 4, 6).transpose(0, 1)
    got = sketch_outer(*seq_first, None, SPEC, name="m", shape=(6, 30))
    expected, _ = sketch_outer_reference(*(t.flatten(0, 1) for t in seq_first), (0, 5, 10, 15, 20), SPEC, "m", (6, 30))
    assert error(got, expected) <= TOLERANCE


def test_expanded_operands() -> None:
    check(torch.ones(1, 1).expand(20, 1), torch.randn(20, 9), RAGGED, shape=(9,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_fp32(dtype: torch.dtype) -> None:
    x, g = torch.randn(500, 30).to(dtype), torch.randn(500, 4).to(dtype)
    check(x, g, (0, 250, 500))
    check(x, g, (0, 100, 500))
    check(x.float(), g, (0, 100, 500))


def test_fp64_operands() -> None:
    x, g = torch.randn(20, 30, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    out = torch.zeros(5, 128, dtype=torch.float64)
    sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30), out=out)
    assert error(out, sketch_outer_reference(x, g, RAGGED, SPEC, "m", (4, 30))[0]) <= 1e-14


def test_parameters_of_other_shapes() -> None:
    check(torch.randn(20, 36), torch.randn(20, 5), RAGGED, shape=(5, 4, 3, 3))
    check(torch.ones(20, 1), torch.randn(20, 5), RAGGED, shape=(5,))


def test_adds_to_out_and_sqnorm() -> None:
    x, g = torch.randn(20, 30), torch.randn(20, 4)
    once, norm = torch.zeros(5, 128), torch.zeros(5)
    sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30), out=once, sqnorm=norm)
    twice, norm_twice = once.clone(), norm.clone()
    assert sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30), out=twice, sqnorm=norm_twice) is twice
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(norm_twice, 2 * norm)


def test_is_bilinear() -> None:
    x, y, g = torch.randn(20, 30), torch.randn(20, 30), torch.randn(20, 4)
    sketches = [sketch_outer(t, g, RAGGED, SPEC, name="m", shape=(4, 30)) for t in (x, y, 2 * x - y)]
    torch.testing.assert_close(sketches[2], 2 * sketches[0] - sketches[1], atol=1e-4, rtol=1e-5)


def test_identity_is_the_gradient() -> None:
    spec = SketchSpec(kind="identity").bind((("other", (3,)), ("m", (4, 30))))
    x, g = torch.randn(20, 30), torch.randn(20, 4)
    got = sketch_outer(x, g, (0, 20), spec, name="m", shape=(4, 30))
    torch.testing.assert_close(got[0, 3:].view(4, 30), g.t() @ x)
    assert not got[0, :3].any()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(20, 30), torch.randn(20, 4)
    whole = sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30))
    monkeypatch.setattr(outer, "_CHUNK", 250)
    torch.testing.assert_close(sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(4, 30)), whole)
    check(x, g, (0, 5, 10, 15, 20))


def test_autocast_tf32_and_grad_mode_change_nothing() -> None:
    x, g = torch.randn(200, 30, requires_grad=True), torch.randn(200, 4)
    plain = sketch_outer(x, g, (0, 100, 200), SPEC, name="m", shape=(4, 30))
    assert not plain.requires_grad
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = sketch_outer(x, g, (0, 100, 200), SPEC, name="m", shape=(4, 30))
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(again, plain)


def test_triton_is_not_imported_before_it_runs() -> None:
    code = (
        "import sys, torch; from gradsift.kernels.outer import sketch_outer;"
        "from gradsift.kernels.spec import SketchSpec;"
        "known = 'triton' in sys.modules;"
        "sketch_outer(torch.ones(2, 3), torch.ones(2, 3), (0, 2), SketchSpec(), name='m', shape=(3, 3));"
        "assert known or 'triton' not in sys.modules;"
        "assert 'gradsift.kernels.outer_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


X, G = torch.ones(6, 30), torch.ones(6, 4)


@pytest.mark.parametrize(
    ("x", "g", "segments", "words"),
    [
        (X, G[:5], (0, 6), r"x is float32 \(6, 30\) on cpu and g is float32 \(5, 4\) on cpu, expected"),
        (X[0], G[0], (0, 6), r"expected \(tokens, d\) or"),
        (X, G, (0, 5), r"segments cover from 0 to 5 but there are 6 tokens"),
        (X, G, (1, 6), "cover from 1 to 6"),
        (X, G, (), "cover nothing"),
        (X, G, (0, 4, 3, 6), "segments decrease from 4 to 3 at example 1"),
        (X, G, None, "does not say which token is whose: give segments"),
        (G, X, (0, 6), r"make a \(30, 4\) gradient but the parameter has shape \(4, 30\): swap x and g"),
    ],
)
def test_refuses_operands(x: Tensor, g: Tensor, segments: tuple[int, ...] | None, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        sketch_outer(x, g, segments, SPEC, name="m", shape=(4, 30))


@pytest.mark.parametrize(
    ("out", "sqnorm", "words"),
    [
        (torch.zeros(2, 128), None, r"out is float32 \(2, 128\) on cpu, expected float32 of shape \(1, 128\)"),
        (torch.zeros(1, 64), None, r"expected float32 of shape \(1, 128\)"),
        (torch.zeros(1, 128, dtype=torch.float16), None, "out is float16"),
        (None, torch.zeros(2), r"sqnorm is float32 \(2,\) on cpu, expected float32 of shape \(1,\)"),
    ],
)
def test_refuses_outputs(out: Tensor | None, sqnorm: Tensor | None, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        sketch_outer(X, G, (0, 6), SPEC, name="m", shape=(4, 30), out=out, sqnorm=sqnorm)


def test_refuses_backends() -> None:
    with pytest.raises(BackendError, match="backend is 'cuda', expected one of 'auto', 'torch', 'triton'"):
        sketch_outer(X, G, (0, 6), SPEC, name="m", shape=(4, 30), backend="cuda")
    with pytest.raises(BackendError, match=r"no kernel from torch\.float64"):
        sketch_outer(X.double(), G, (0, 6), SPEC, name="m", shape=(4, 30), backend="triton")
    identity = SketchSpec(kind="identity").bind((("m", (4, 30)),))
    with pytest.raises(BackendError, match="an identity sketch has no kernel"):
        sketch_outer(X, G, (0, 6), identity, name="m", shape=(4, 30), backend="triton")
