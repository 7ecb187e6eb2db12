"""Adam's update of every example's gradient, sketched: both backends against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradsift.kernels import outer, outer_triton
from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import ShapeError, SpecError
from gradsift.kernels.images import Images, Window
from gradsift.kernels.outer import Held, sketch_operands, sketch_outer, sketch_outer_reference
from gradsift.kernels.sketch import sketch_dense
from gradsift.kernels.spec import SketchSpec

SPEC = SketchSpec(dim=128, seed=5)
RAGGED = (0, 3, 3, 40, 41)
TOKENS = RAGGED[-1]
MODES = ("torch", "triton", "triton-atomic")
# a root and a quotient per entry on top of fp32 sums: rounding of each entry against the row
TOLERANCE = 3e-6


def moments(shape: tuple[int, ...], form: str) -> AdamStep:
    """As of gradients of size one: LESS's constant inside the root, or torch's outside of it."""
    first, second = 0.9 * torch.randn(shape) * 0.3, 0.999 * torch.rand(shape)
    if form == "less":
        return AdamStep(first, second + 1e-8, 0.1, 0.001, 0.0)
    return AdamStep(first / 0.7, second / 0.2, 0.1 / 0.7, 0.001 / 0.2, 1e-8)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected.cpu()).norm() / expected.norm())


def moved(step: AdamStep, device: torch.device) -> AdamStep:
    return AdamStep(step.first.to(device), step.second.to(device), step.a, step.b, step.eps)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["less", "torch"])
@pytest.mark.parametrize(("p", "q"), [(4, 70), (70, 4), (33, 65), (1, 9), (64, 64)])
def test_update_of_the_whole_gradient(device: torch.device, p: int, q: int, form: str, mode: str) -> None:
    """RAGGED has an example without tokens: it gets the update of a zero gradient."""
    x, g = torch.randn(TOKENS, q), torch.randn(TOKENS, p)
    step = moments((p, q), form)
    expected, norm = sketch_outer_reference(x, g, RAGGED, SPEC, "m", (p, q), step)
    plain, _ = sketch_outer_reference(x, g, RAGGED, SPEC, "m", (p, q))
    assert expected[1].any() and error(plain, expected) > 0.1
    square = torch.zeros(4, device=device)
    got = sketch_outer(
        x.to(device), g.to(device), RAGGED, SPEC, name="m", shape=(p, q), sqnorm=square, backend=mode, adam=step
    )
    assert error(got, expected) <= TOLERANCE
    assert error(square, norm) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_padded_convolved_and_one_dimensional(device: torch.device, mode: str) -> None:
    x, g = torch.randn(3, 20, 30).to(device), torch.randn(3, 20, 5).to(device)
    step = moments((5, 30), "less")
    expected, _ = sketch_outer_reference(
        x.cpu().flatten(0, 1), g.cpu().flatten(0, 1), (0, 20, 40, 60), SPEC, "m", (5, 30), step
    )
    got = sketch_outer(x, g, None, SPEC, name="m", shape=(5, 30), backend=mode, adam=moved(step, device))
    assert error(got, expected) <= TOLERANCE

    conv = torch.nn.Conv2d(3, 7, 2)
    images = torch.randn(4, 3, 5, 6)
    out = torch.randn(4, 7, 4, 5)
    shape = tuple(conv.weight.shape)
    step = moments(shape, "torch")
    grads = torch.stack(
        [torch.nn.grad.conv2d_weight(images[i : i + 1].double(), shape, out[i : i + 1].double()) for i in range(4)]
    )
    expected = torch.zeros(4, SPEC.dim, dtype=torch.float64)
    sketch_dense(step(grads).flatten(1), SPEC, "m", shape, expected)
    operands = Images([(images.to(device), out.to(device), Window.of(conv))], None, "m", shape)
    got = sketch_operands(operands, SPEC, name="m", shape=shape, backend=mode, adam=step)
    assert error(got, expected) <= TOLERANCE

    ones = torch.ones(TOKENS, 1, device=device)
    g = torch.randn(TOKENS, 9).to(device)
    step = moments((9,), "less")
    expected, _ = sketch_outer_reference(ones.cpu(), g.cpu(), RAGGED, SPEC, "m", (9,), step)
    got = sketch_outer(ones, g, RAGGED, SPEC, name="m", shape=(9,), backend=mode, adam=step)
    assert error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("module", [outer, outer_triton])
def test_bounded_memory_changes_no_value(device: torch.device, monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """A few examples at a time, and in Triton a few rows of the gradient at a time."""
    mode = "torch" if module is outer else "triton"
    x, g = torch.randn(TOKENS, 130).to(device), torch.randn(TOKENS, 70).to(device)
    step = moments((70, 130), "less")
    expected, norm = sketch_outer_reference(x.cpu(), g.cpu(), RAGGED, SPEC, "m", (70, 130), step)
    monkeypatch.setattr(module, "_CHUNK" if module is outer else "SCRATCH_BYTES", 1)
    held, square = Held(), torch.zeros(4, device=device)
    got = sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(70, 130), sqnorm=square, backend=mode, held=held, adam=step)
    held.release()
    assert error(got, expected) <= TOLERANCE and error(square, norm) <= TOLERANCE


def test_small_gradients_show_where_the_constant_stands() -> None:
    """With LoRA gradients near 1e-5 the constant inside the root rules: .019 against 1.80 for one entry."""
    gradient = torch.tensor([[[1e-5]]], dtype=torch.float64)
    m, v = torch.tensor([[1e-6 * 2]], dtype=torch.float64), torch.tensor([[1e-12]], dtype=torch.float64)
    inside = AdamStep(0.9 * m, 0.999 * v + 1e-8, 0.1, 0.001, 0.0)(gradient)
    outside = AdamStep(0.9 * m, 0.999 * v, 0.1, 0.001, 1e-8)(gradient)
    assert float(inside) == pytest.approx(2.8e-6 / (0.999e-12 + 1e-13 + 1e-8) ** 0.5)
    assert float(outside) > 50 * float(inside)


def test_refusals() -> None:
    x, g = torch.randn(TOKENS, 70), torch.randn(TOKENS, 40)
    with pytest.raises(SpecError, match="use a spec without project, or leave Adam out"):
        sketch_outer(
            x, g, RAGGED, SketchSpec(dim=64, project=8), name="m", shape=(40, 70), adam=moments((40, 70), "less")
        )
    small = sketch_outer(
        x, g[:, :8], RAGGED, SketchSpec(dim=64, project=8), name="m", shape=(8, 70), adam=moments((8, 70), "less")
    )
    assert small.any()
    with pytest.raises(ShapeError, match="expected those of a \\(40, 70\\) gradient"):
        sketch_outer(x, g, RAGGED, SPEC, name="m", shape=(40, 70), adam=moments((40, 71), "less"))
