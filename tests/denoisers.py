"""Tiny denoisers and batches for tests of the diffusion loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.losses import Diffusion, NoiseSchedule

CHANNELS, SIZE, CLASSES = 2, 8, 5
MAPS = ["*.to_q", "*.to_v", "time_embedding.*"]


def tiny_unet(seed: int = 0) -> UNet2DModel:
    """A class-conditional UNet with attention, 45,000 parameters."""
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        num_class_embeds=CLASSES,
    ).eval()


class Mixer(nn.Module):
    """A denoiser of two linear maps that mixes all numbers of an image and adds the timestep."""

    def __init__(self, numbers: int, hidden: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(numbers, hidden)
        self.outer = nn.Linear(hidden, numbers)

    def forward(self, noisy: Tensor, timestep: Tensor) -> tuple[Tensor]:
        hidden = self.inner(noisy.flatten(1)) + timestep.to(noisy.dtype)[:, None] / 1000
        return (self.outer(hidden.tanh()).view_as(noisy),)


def images(n: int, ids: Sequence[Any] | None = None, seed: int = 3) -> dict[str, Any]:
    """A batch of n examples with classes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": list(range(n)) if ids is None else list(ids),
        "latents": torch.randn(n, CHANNELS, SIZE, SIZE, generator=generator),
        "class_labels": torch.arange(n) % CLASSES,
    }


def take(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The batch of these rows."""
    return {k: v[list(rows)] if isinstance(v, Tensor) else [v[i] for i in rows] for k, v in batch.items()}


def ddpm_loss(**options: Any) -> Diffusion:
    return gs.losses.Diffusion(NoiseSchedule.of(DDPMScheduler()), **options)  # type: ignore[no-any-return]


SPEC = gs.SketchSpec(dim=64, seed=5)


def batches(sizes: Sequence[int] = (3, 4, 2, 3)) -> list[dict[str, Any]]:
    """Batches of one data set, ids ``image 0`` and on."""
    n = sum(sizes)
    data = images(n, ids=[f"image {i}" for i in range(n)])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [take(data, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def diffusion_extract(path: Path, **settings: Any) -> gs.FeatureStore:
    """A small store of a tiny UNet; three parts unless another ``loss_fn`` is given."""
    arguments: dict[str, Any] = {
        "model": tiny_unet(),
        "loader": batches(),
        "loss_fn": ddpm_loss(measurements=3, parts=True),
        "path": path,
        "spec": SPEC,
        "modules": MAPS,
        "block": 5,
        "curvature": 9,
        "progress": False,
        **settings,
    }
    return gs.extract(**arguments)
