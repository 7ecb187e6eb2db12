"""Diffusion: a row against a LoRA step of a UNet, K measurements, questions over many images, maps, bytes per image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_search import DIM, ROWS, K
from bench_search import Setup as Rows
from diffusers import DDPMScheduler, UNet2DConditionModel
from paired import FULL, paired
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.losses import Diffusion, NoiseSchedule

EXAMPLES, SIZE = (4, 32) if FULL else (2, 8)
WIDTHS = (64, 128) if FULL else (16, 32)
TEXT, TOKENS = (128, 32) if FULL else (8, 3)
ROUNDS, FEW = (7, 3) if FULL else (2, 2)
MEASUREMENTS = 4
LISTED, AT_ONCE = (100, 5) if FULL else (4, 2)
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
CONV = ["conv1", "conv2", "conv_shortcut"]
SMALL = SIZE // 2
"""Latents of the cases that run many passes."""
MAPS = {"linear maps": LINEAR, "linear maps and convolutions": [*LINEAR, *CONV]}


def on(maps: str, size: int = SIZE) -> str:
    return f"UNet {WIDTHS[0]}-{WIDTHS[1]}, {size} x {size} latents, r = 16 on {maps}"


def diffusion(**options: Any) -> Diffusion:
    return gs.losses.Diffusion(NoiseSchedule.of(DDPMScheduler()), **options)


class Setup:
    """A UNet that reads text by cross-attention, r = 16 on some maps; each provider is a method."""

    def __init__(self, maps: str, size: int = SIZE) -> None:
        torch.manual_seed(0)
        self.size = size
        unet = UNet2DConditionModel(
            sample_size=size,
            layers_per_block=1,
            block_out_channels=WIDTHS,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8,
            cross_attention_dim=TEXT,
        )
        self.model = get_peft_model(unet, LoraConfig(r=16, lora_alpha=16, target_modules=MAPS[maps])).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        block = self.model.down_blocks[0]
        self.before_first = block.attentions[0].norm if MAPS[maps] == LINEAR else block.resnets[0].norm1
        self.loss = diffusion(measurements=1)
        self.capture = gs.Capture(self.model, gs.SketchSpec(dim=4096))
        self.batch = self.images(EXAMPLES)

    def images(self, n: int) -> dict[str, Any]:
        return {
            "latents": torch.randn(n, 4, self.size, self.size),
            "encoder_hidden_states": torch.randn(n, TOKENS, TEXT),
        }

    def step(self) -> None:
        """Forward, backward with weight gradients; no optimizer."""
        for parameter in self.trainable.values():
            parameter.grad = None
        self.loss(self.model, self.batch).sum().backward()

    def extraction(self, loss: Diffusion | None = None) -> Tensor:
        return self.capture(self.batch, loss or self.loss).values

    def floor(self) -> None:
        """Forward, and backward to the first of the maps, without weight gradients: what any extraction must spend."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(False)
        handle = self.before_first.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        try:
            self.loss(self.model, self.batch).sum().backward()
        finally:
            handle.remove()
            for parameter in self.trainable.values():
                parameter.requires_grad_(True)

    def gradients(self, loss: Diffusion, batch: dict[str, Any]) -> Tensor:
        """Batch-1 autograd: the whole gradient of each example."""
        rows = []
        for i in range(len(batch["latents"])):
            one = {name: value[i : i + 1] for name, value in batch.items()}
            grads = torch.autograd.grad(loss(self.model, one).sum(), list(self.trainable.values()))
            rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
        return torch.stack(rows)

    def numbers(self) -> int:
        return sum(parameter.numel() for parameter in self.trainable.values())


def gram_error(rows: Tensor, exact: Tensor) -> float:
    """Relative error of the Gram matrix of the rows."""
    return float((rows @ rows.T - exact @ exact.T).norm() / (exact @ exact.T).norm())


@pytest.mark.parametrize("maps", MAPS)
def test_extraction(benchmark: Any, maps: str) -> None:
    setup = Setup(maps)
    identity = gs.Capture(setup.model, gs.SketchSpec(kind="identity"))(setup.batch, setup.loss).values
    assert gram_error(identity, setup.gradients(setup.loss, setup.batch)) <= 1e-5
    providers = {"LoRA step": setup.step, "extraction": setup.extraction, "floor": setup.floor}
    case = f"diffusion step: {on(maps)}, {EXAMPLES} images"
    paired(benchmark, case, providers, "LoRA step", ROUNDS)


def test_measurements(benchmark: Any) -> None:
    setup = Setup("linear maps", SMALL)
    together, apart = diffusion(measurements=MEASUREMENTS), diffusion(measurements=MEASUREMENTS, parts=True)
    single = [together.part(k) for k in range(MEASUREMENTS)]

    def one_by_one() -> Tensor:
        return torch.stack([setup.extraction(loss) for loss in single], dim=1)

    expected = one_by_one()
    assert (setup.extraction(together) - expected.sum(dim=1)).norm() <= 1e-5 * expected.norm()
    assert (setup.extraction(apart).view_as(expected) - expected).norm() <= 1e-5 * expected.norm()
    providers = {
        f"{MEASUREMENTS} passes of one measurement": one_by_one,
        f"one pass of {MEASUREMENTS}, summed": lambda: setup.extraction(together),
        f"one pass of {MEASUREMENTS}, kept apart": lambda: setup.extraction(apart),
    }
    case = f"diffusion, {MEASUREMENTS} measurements: {on('linear maps', SMALL)}, {EXAMPLES} images"
    paired(benchmark, case, providers, next(iter(providers)), ROUNDS)


class PartedRows(Rows):
    """The rows of ``bench_search`` as four parts each."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.parted = self.rows.view(ROWS, MEASUREMENTS, -1)
        self.grad_norm = torch.linalg.vector_norm(self.parted, dim=2).numpy()

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start, rows in super().blocks():
            yield start, rows.view(len(rows), MEASUREMENTS, -1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> PartedRows:
    return PartedRows(tmp_path_factory.mktemp("diffusion"))


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
@pytest.mark.parametrize("queries", [1, 8])
def test_query(benchmark: Any, stored: PartedRows, queries: int, scorer: Any) -> None:
    asked = torch.randn(queries, MEASUREMENTS, DIM // MEASUREMENTS, generator=torch.Generator().manual_seed(1))
    unit = asked / asked.norm(dim=2, keepdim=True)
    weights = 1 / torch.from_numpy(stored.grad_norm).T[:, None]

    def plain() -> Tensor:
        if scorer == "dot":
            return torch.topk(asked.sum(1) @ stored.parted.sum(1).T, K).indices
        cosines = torch.matmul(unit.transpose(0, 1), stored.parted.permute(1, 2, 0)) * weights
        return torch.topk(cosines.mean(0), K).indices

    def streamed() -> np.ndarray:
        return gs.topk(stored, asked, K, scorer).rows

    assert (streamed() == plain().numpy()).mean() >= 0.99  # float32 may exchange neighbours
    case = (
        f"diffusion query by {scorer}: top-{K} of {ROWS:,} images x {MEASUREMENTS} parts x {DIM // MEASUREMENTS}, "
        f"{queries} queries"
    )
    paired(benchmark, case, {"matmul + topk": plain, "gradsift": streamed}, "matmul + topk", ROUNDS)


def test_rescore(benchmark: Any) -> None:
    setup = Setup("linear maps", SMALL)
    setup.model.eval()
    loss = diffusion(measurements=MEASUREMENTS)
    whole = setup.images(LISTED)
    parts = {name: value.split(AT_ONCE) for name, value in whole.items()}
    batches = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    v = gs.gradient(setup.model, setup.batch, loss)

    def forward_pass() -> None:
        with torch.no_grad():
            for batch in batches:
                loss.token_losses(setup.model, batch)

    def exact(method: Any) -> Tensor:
        return torch.cat([gs.rescore(setup.model, b, loss.token_losses, v, method).scores for b in batches])

    gradients = setup.gradients(loss, batches[0]).double()
    expected = gradients @ torch.cat([g.double().reshape(-1) for g in v.values()])
    case = f"diffusion, maps of {LISTED} images, {MEASUREMENTS} measurements: {on('linear maps', SMALL)}"
    errors = {}
    for method, tolerance in (("central", 1e-3), ("forward", 1e-5)):
        got = exact(method)[: len(expected)]
        errors[method] = float((got - expected).abs().max() / expected.abs().max())
        assert errors[method] <= tolerance
    benchmark.extra_info["facts"] = [
        f"{case}: largest error over the largest score: "
        + ", ".join(f"{method} {error:.1e}" for method, error in errors.items())
    ]
    providers = {
        "forward pass": forward_pass,
        "central (auto)": lambda: exact("auto"),
        "forward mode": lambda: exact("forward"),
    }
    paired(benchmark, case, providers, "forward pass", FEW)


def test_bytes_per_image(benchmark: Any, tmp_path: Path) -> None:
    setup = Setup("linear maps", 8)  # rows do not know how large the latents were
    n = 256 if FULL else 8
    batches = [setup.images(8) for _ in range(n // 8)]
    sizes = {}

    def write() -> None:
        for dtype in ("float32", "float16"):
            path = tmp_path / f"{dtype} {len(list(tmp_path.iterdir()))}"
            loss = diffusion(measurements=MEASUREMENTS, parts=True)
            spec = gs.SketchSpec(dim=1024)
            store = gs.extract(
                setup.model, batches, loss, path, spec=spec, dtype=dtype, curvature=0, block=n, progress=False
            )
            assert store.features.shape == (n, MEASUREMENTS, 1024)
            sizes[dtype] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / n

    benchmark.pedantic(write, rounds=1)
    raw = 4 * MEASUREMENTS * setup.numbers()
    assert sizes["float16"] < sizes["float32"] < raw
    benchmark.extra_info["facts"] = [
        f"bytes per image, {MEASUREMENTS} parts x 1024: {sizes['float32']:,.0f} in float32, {sizes['float16']:,.0f} in "
        f"float16; raw LoRA gradients ({on('linear maps', 8)}, {setup.numbers():,} numbers) {raw:,}, "
        f"{raw / sizes['float32']:.0f} and {raw / sizes['float16']:.0f} times as much"
    ]
