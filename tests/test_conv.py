"""Convolutions: rows of nn.Conv2d and of LoRA on it are S times autograd's gradient, one example at a time."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from models import SPEC, error, fill, one, oracle
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradsift as gs
from gradsift.engine.capture.layout import make_layout
from gradsift.kernels import images
from gradsift.kernels.images import Images, Window
from gradsift.kernels.outer import sketch_operands

TOLERANCE = 1e-5
IDENTITY = gs.SketchSpec(kind="identity")
CHANNELS, OUT = 4, 8


class Picture(nn.Module):
    """One convolution between a linear map on channels and a nonlinear end."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(CHANNELS, CHANNELS)
        self.conv = nn.Conv2d(CHANNELS, OUT, *arguments, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.before(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).tanh()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y = model(batch["x"]).float()
    weight = torch.linspace(-1, 2, y[0].numel()).sin().view(y.shape[1:])
    return (y * weight).flatten(1).sum(1) + y.square().flatten(1).mean(1)


def batch(n: int = 3, size: tuple[int, int] = (9, 7), channels_last: bool = False) -> dict[str, Tensor]:
    x = torch.randn(n, CHANNELS, *size, generator=torch.Generator().manual_seed(3))
    return {"x": x.contiguous(memory_format=torch.channels_last) if channels_last else x}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [one(batch, i) for i in range(len(batch["x"]))]


def assert_identity(
    model: nn.Module, data: dict[str, Tensor], modules: Any = "*", loss_fn: Any = loss, plain: nn.Module | None = None
) -> gs.Features:
    """The gradients themselves, and their sketch."""
    exact = gs.Capture(model, IDENTITY, modules=modules)
    features = exact(data, loss_fn)
    rows, norms = oracle(plain or model, alone(data), loss_fn, exact.spec, modules)
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE
    sketched = gs.Capture(model, SPEC, modules=modules)(data, loss_fn)
    matrices = [gs.sketch_matrix(SPEC, row.name, row.shape).double() for row in exact.table]
    assert error(sketched.values, rows @ torch.cat(matrices, dim=1).t()) <= TOLERANCE
    return features


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "no padding": {"kernel_size": 3},
    "1x1": {"kernel_size": 1},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "stride 2": {"kernel_size": 3, "stride": 2, "padding": 1},
    "stride past the kernel": {"kernel_size": 2, "stride": 3},
    "odd everything": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 3)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "dilated and strided": {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "same, uneven": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": (2, 3), "padding": "valid"},
    "two groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2},
    "whole image": {"kernel_size": (9, 7)},
    "no bias": {"kernel_size": 3, "bias": False},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_full_convolution(geometry: str, channels_last: bool) -> None:
    model = Picture(**GEOMETRIES[geometry])
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    features = assert_identity(model, batch(channels_last=channels_last))
    assert [row.name for row in features.table] == ["before.weight", "conv.weight"]
    assert features.table[1].shape == tuple(model.conv.weight.shape)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels last"])
@pytest.mark.parametrize(
    "geometry",
    [
        name
        for name, g in GEOMETRIES.items()
        if g.get("padding_mode") is None and ("dilation" not in g or name == "same")
    ],
)
def test_lora_on_a_convolution(geometry: str, channels_last: bool) -> None:
    """PEFT gives A the base's kernel, stride and padding, and B its groups."""
    model = fill(
        get_peft_model(
            Picture(**GEOMETRIES[geometry]), LoraConfig(r=4, lora_alpha=6, target_modules=["conv", "before"])
        )
    )
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    features = assert_identity(model, batch(channels_last=channels_last), modules="lora")
    assert [row.name for row in features.table if "conv" in row.name] == ["conv.lora_A.weight", "conv.lora_B.weight"]


def test_lora_behind_an_active_dropout() -> None:
    """A sees what the dropout left, so x is read there."""
    config = LoraConfig(r=3, target_modules=["conv"], lora_dropout=0.5)
    model = fill(get_peft_model(Picture(3, padding=1), config)).train()

    def repeatable(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(11)
        return loss(model, data)

    assert_identity(model, batch(1), modules="lora", loss_fn=repeatable)


def test_reflected_border_of_a_lora_base_is_not_its_adapters() -> None:
    """PEFT builds A with zero padding whatever the base has; what counts is what A does."""
    base = Picture(**GEOMETRIES["reflect"])
    assert_identity(fill(get_peft_model(base, LoraConfig(r=3, target_modules=["conv"]))), batch(), modules="lora")


@pytest.mark.parametrize("budget", [2000, 300, 1])
@pytest.mark.parametrize("geometry", ["stride 2", "odd everything", "two groups", "circular"])
def test_small_budget_gives_the_same_rows(geometry: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Picture(**GEOMETRIES[geometry])
    capture = gs.Capture(model, SPEC, modules="*")
    whole = capture(batch(), loss)
    monkeypatch.setattr(images, "UNFOLDED", budget)
    parts = capture(batch(), loss)
    assert error(parts.values, whole.values.double()) <= 1e-6
    assert error(parts.grad_norm, whole.grad_norm.double()) <= 1e-6


class Largest(TorchDispatchMode):
    """The most numbers that any operation inside put into new memory."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in known:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("geometry", ["3x3", "stride 2", "odd everything", "two groups", "same"])
def test_nothing_is_unfolded_in_torch(geometry: str) -> None:
    conv = nn.Conv2d(CHANNELS, 2, **GEOMETRIES[geometry])
    window, (height, width) = Window.of(conv), (40, 44)
    x = torch.randn(2, CHANNELS, height, width)
    g = torch.randn(2, 2, *window.output(height, width))
    padded = window.pad(x).numel()
    with Largest() as largest:
        Images([(x, g, window)], None, "m", tuple(conv.weight.shape)).gradients(0, 2)
    assert 0 < largest.numbers <= 1.1 * padded


@pytest.mark.parametrize("limit", [4000, 600])
def test_bounds_are_kept(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products cover, and the fused kernel is given, no more patches than stated."""
    monkeypatch.setattr(images, "UNFOLDED", limit)
    seen: list[int] = []
    original = images._add_taps

    def counted(taps: Tensor, x: Tensor, g: Tensor, window: Window, block: Any, transposed: bool) -> None:
        rows = block.rows.stop - block.rows.start
        seen.append(len(x) * rows * g.shape[3] * x.shape[1] * window.kernel[0] * window.kernel[1])
        original(taps, x, g, window, block, transposed)

    monkeypatch.setattr(images, "_add_taps", counted)
    conv, x = nn.Conv2d(CHANNELS, OUT, 3, padding=1), batch()["x"]
    operands = Images([(x, torch.randn(3, OUT, 9, 7), Window.of(conv))], None, "m", tuple(conv.weight.shape))
    operands.gradients(0, 3)
    assert 0 < max(seen) <= limit
    assert sum(seen) == 3 * CHANNELS * 9 * 9 * 7
    pieces = list(operands.pieces())
    assert [piece.last - piece.first for piece in pieces] == [1, 1, 1]
    assert max(piece.x.numel() for piece in pieces) <= limit


@pytest.mark.parametrize("geometry", ["3x3", "1x1", "1x1, stride 2", "two groups", "depthwise", "odd everything"])
@pytest.mark.parametrize("budget", [1 << 24, 3000, 1])
def test_fused_kernel_agrees(geometry: str, budget: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches in memory, and where they are too large or in groups the sum of outer products with unit vectors."""
    conv = nn.Conv2d(CHANNELS, OUT, **GEOMETRIES[geometry])
    window, shape = Window.of(conv), tuple(conv.weight.shape)
    x = batch(4)["x"]
    g = torch.randn(4, OUT, *window.output(9, 7), generator=torch.Generator().manual_seed(5))
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setattr(images, "UNFOLDED", budget if backend == "triton" else 1 << 24)
        operands = Images([(x.to(device), g.to(device), window)] * 2, (0, 2, 4), "m", shape)
        squares = torch.zeros(2, device=device)
        out = sketch_operands(operands, SPEC, name="m", shape=shape, sqnorm=squares, backend=backend)
        found.append((out.cpu(), squares.cpu()))
    (out, squares), (fused, fused_squares) = found
    assert error(fused, out.double()) <= 1e-5
    torch.testing.assert_close(fused_squares, squares, rtol=1e-5, atol=0)


class Twice(Picture):
    """The same convolution on two sizes, with another use of its channels between."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.mean((2, 3)) + self.conv(
            functional.avg_pool2d(x, 2) + y[:, :CHANNELS, :3, :2].mean((2, 3), True)
        ).mean((2, 3))


def test_convolution_that_is_called_twice() -> None:
    """Both uses reach one sum, so that the norm is exact."""
    assert_identity(Twice(3, padding=1), batch(), modules="conv")
    assert_identity(fill(get_peft_model(Twice(3), LoraConfig(r=2, target_modules=["conv"]))), batch(), modules="lora")


def test_two_modules_that_share_a_kernel_but_not_their_stride() -> None:
    class Shared(Picture):
        def __init__(self) -> None:
            super().__init__(3, padding=1)
            self.other = nn.Conv2d(CHANNELS, OUT, 3, stride=2, dilation=2)
            self.other.weight = self.conv.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3)) * self.other(x).mean((2, 3)).exp()

    model = Shared()
    capture = gs.Capture(model, IDENTITY, modules=["conv", "other"])
    assert len(capture.maps) == 1
    assert_identity(model, batch(), modules=["conv", "other"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_block(reentrant: bool) -> None:
    class Block(Picture):
        recompute = True

        def forward(self, x: Tensor) -> Tensor:
            start = self.before(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            inner = lambda t: self.conv(t).tanh()  # noqa: E731
            return checkpoint(inner, start, use_reentrant=reentrant) if self.recompute else inner(start)

    model = Block(3, padding=1)
    plain = copy.deepcopy(model)
    plain.recompute = False
    assert_identity(model, batch(), plain=plain)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_autocast(lora: bool) -> None:
    """The oracle is the fp64 product of what was recorded; torch's own gradient bounds how far off is fair."""
    model: Any = Picture(3, padding=1, stride=2)
    modules = "lora" if lora else "*"
    if lora:
        model = fill(get_peft_model(model, LoraConfig(r=3, target_modules=["conv", "before"])))
    capture = gs.Capture(model, IDENTITY, modules=modules)
    recorded: dict[str, Tensor] = {}

    def receive(_: Any, uses: Any) -> None:
        for use in uses:
            for factor in use:
                x, g = factor.x.double() * factor.scale, factor.g.double()
                window = getattr(factor, "window", None)
                if window is None:
                    x, g = x.flatten(1, -2), g.flatten(1, -2)
                else:
                    x, g = window.patches(window.pad(x)), g.flatten(2).mT
                recorded[factor.parameter] = torch.einsum("ntp,ntq->npq", g, x).flatten(1)

    with torch.autocast("cpu", torch.bfloat16):
        features = capture(batch(), loss)
        model.requires_grad_(False)
        with capture.recorded(receive, make_layout(None, 0)):
            loss(model, batch()).sum().backward()
        rows, _ = oracle(model, alone(batch()), loss, capture.spec, modules)
    assert error(features.values, torch.cat([recorded[row.name] for row in capture.table], dim=1)) <= TOLERANCE
    assert error(features.values, rows) <= 2e-2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_tap_conserves(lora: bool) -> None:
    model: Any = Picture(3, padding=1, stride=2, groups=2)
    modules = ["before", "conv"]
    if lora:
        with pytest.warns(UserWarning, match="groups > 1"):
            model = fill(get_peft_model(model, LoraConfig(r=2, target_modules=modules)))
    capture = gs.Capture(model, SPEC, modules="lora" if lora else modules)
    with capture.tap() as tap:
        loss(model, batch()).sum().backward()
    assert tap.conservation is not None
    assert tap.conservation <= TOLERANCE
    assert capture.probed


def test_batch_composition_does_not_matter() -> None:
    capture = gs.Capture(Picture(3, padding=1, stride=2), SPEC, modules="*")
    together = capture(batch(), loss).values
    for i, example in enumerate(alone(batch())):
        assert error(capture(example, loss).values, together[i : i + 1].double()) <= 1e-6


def test_leak_between_images_is_found() -> None:
    class Normed(Picture):
        def __init__(self) -> None:
            super().__init__(3, padding=1)
            self.norm = nn.BatchNorm2d(OUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).tanh()

    with pytest.raises(gs.CaptureError, match=r"conv: the loss of example 2 reaches rows of example.*normalisation"):
        gs.Capture(Normed().train(), SPEC, modules="conv")(batch(), loss)


def test_linear_map_on_channels_last_images() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(CHANNELS, 6)
            self.down = nn.Linear(6, CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x.permute(0, 2, 3, 1)).tanh())

    assert_identity(Last(), batch())
    assert_identity(Last(), batch(channels_last=True))
    with_lora = fill(get_peft_model(Last(), LoraConfig(r=2, target_modules=["up", "down"])))
    assert_identity(with_lora, batch(), modules="lora")


REFUSED = {
    "Conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 8)),
    "Conv3d": (lambda: nn.Conv3d(4, 4, 3), (2, 4, 8, 8, 8)),
    "Embedding": (lambda: nn.Embedding(9, 4), (2,)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_lora_on_other_layers_is_refused_by_name(kind: str) -> None:
    model = get_peft_model(nn.Sequential(REFUSED[kind][0]()), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(gs.CaptureError, match=rf"0 \({kind}\).*{kind} is not LoRA on a linear map or nn\.Conv2d"):
        gs.Capture(model, SPEC)


def test_dora_on_a_convolution_is_refused() -> None:
    model = get_peft_model(Picture(3), LoraConfig(r=2, target_modules=["conv"], use_dora=True))
    with pytest.raises(gs.CaptureError, match=r"conv \(Conv2d\) cannot be captured.*DoRA"):
        gs.Capture(model, SPEC)


def test_parametrised_kernel_is_refused() -> None:
    model = Picture(3)
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(gs.CaptureError, match=r"conv \(ParametrizedConv2d\) holds a packed weight"):
        gs.Capture(model, SPEC, modules="conv")


def test_subclass_that_computes_something_else_is_found() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, 2 * self.weight, self.bias, padding=self.padding)

    class Shrunk(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.avg_pool2d(super().forward(x), 2)

    model = Picture(3, padding=1)
    model.conv = Scaled(CHANNELS, OUT, 3, padding=1)
    with pytest.raises(gs.CaptureError, match="rows do not add up"), gs.Capture(model, SPEC, modules="conv").tap():
        loss(model, batch()).sum().backward()
    model.conv = Shrunk(CHANNELS, OUT, 3, padding=1)
    with pytest.raises(
        gs.ShapeError, match=r"conv\.weight: its output is \(4, 3\).*something else than its convolution"
    ):
        gs.Capture(model, SPEC, modules="conv")(batch(), loss)


def test_images_that_no_layout_describes_are_refused() -> None:
    model = Picture(3)

    def frames(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
        return loss(model, data).view(2, 2).sum(1)

    with pytest.raises(gs.CaptureError, match=re.escape("conv: the convolution sees 4 images but the batch has 2")):
        gs.Capture(model, SPEC, modules="conv")(batch(4), frames)
    with pytest.raises(gs.CaptureError, match=r"conv: a convolution sees 3 images.*give owners"):
        gs.Capture(model, SPEC, modules="conv")(batch(), loss, segments=[0, 1, 2, 3])
    with pytest.raises(gs.CaptureError, match=r"conv: a convolution holds its images along axis 0"):
        gs.Capture(model, SPEC, modules="conv")(batch(), loss, batch_axis=1)
    with pytest.raises(gs.CaptureError, match=r"conv: the convolution was called on a tensor of shape \(4, 9, 7\)"):
        gs.Capture(model, SPEC, modules="conv")({"x": batch()["x"][0]}, lambda m, b: m.conv(b["x"]).sum().view(1))


def test_what_is_left_out_is_named_with_its_share() -> None:
    model = Picture(3)
    numbers = sum(p.numel() for p in model.parameters())
    left = gs.Capture(model, SPEC, modules="conv").uncovered
    assert left == {
        "before.weight": 16 / numbers,
        "before.bias": 4 / numbers,
        "conv.bias": OUT / numbers,
    }
