"""The diffusion demo's model: a small class-conditional UNet with attention, its LoRA, its training and its sampler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradsift.bindings.demo.digits import SIZE, Digits, DigitsCase
from gradsift.bindings.demo.steps import Ticks
from gradsift.bindings.diffusion.images import to_pixels
from gradsift.engine.extras import require

__all__ = ["draw", "trained_base", "tuned"]

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Linear maps of the attention layers: what a LoRA of a diffusion model usually trains."""

_BASE_RATE, _TUNE_RATE = 2e-3, 2e-3

_HALF_LIFE = 0.995
"""Decay of the running mean of the base model's weights, which draws better than the last ones."""

_SAMPLING_STEPS = 15
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class _Plan:
    """AdamW: a short warm-up, and down to 0 in a straight line over the last 70 %."""

    steps: int
    batch: int
    rate: float
    seed: int
    averaged: bool = False


def trained_base(case: DigitsCase, digits: Digits, folder: Path, ticks: Ticks) -> Any:
    """A DDIM pipeline trained on the digits that no tuning set holds; read from the folder when it is there.

    Args:
        folder: where the pipeline lies, or will lie, as ``save_pretrained`` writes it.
    """
    diffusers = require("diffusers")
    made_of = {
        "seed": case.seed,
        "steps": case.base_steps,
        "batch": case.base_batch,
        "channels": list(case.channels),
        "images": int(digits.base_pixels.astype(np.int64).sum()),
    }
    note = folder / "made_of.json"
    if note.is_file() and json.loads(note.read_text()) == made_of:
        pipe = diffusers.DDIMPipeline.from_pretrained(str(folder))
        pipe.unet.eval()
        return pipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        unet = _unet(diffusers, case)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    plan = _Plan(case.base_steps, case.base_batch, _BASE_RATE, case.seed, averaged=True)
    _train(unet, scheduler, digits.base_pixels, digits.base_labels, plan, ticks)
    pipe = diffusers.DDIMPipeline(unet=unet.eval(), scheduler=scheduler)
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(str(folder))
    note.write_text(json.dumps(made_of))
    return pipe


def tuned(case: DigitsCase, pipe: Any, digits: Digits, rows: np.ndarray, ticks: Ticks) -> Any:
    """The base's UNet with a LoRA tuned on these images; the base itself stays as it is.

    Returns:
        a PEFT model, in evaluation mode.
    """
    peft = require("peft")
    base = type(pipe.unet).from_config(pipe.unet.config)
    base.load_state_dict(pipe.unet.state_dict())
    config = peft.LoraConfig(r=case.rank, lora_alpha=2 * case.rank, target_modules=_TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = peft.get_peft_model(base.eval(), config).eval()
    plan = _Plan(case.tune_steps, case.tune_batch, _TUNE_RATE, case.seed)
    _train(model, pipe.scheduler, digits.pixels[rows], digits.labels[rows], plan, ticks)
    return model


def draw(model: nn.Module, scheduler: Any, label: int, count: int, seed: int, ticks: Ticks) -> np.ndarray:
    """Pictures of a class by DDIM, uint8 (count, 8, 8); equal seeds begin with equal noise, whatever the model."""
    noise = torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(_SAMPLING_STEPS)
    pictures = []
    for start in range(0, count, _AT_ONCE):
        x = noise[start : start + _AT_ONCE]
        labels = torch.full((len(x),), label)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t, class_labels=labels).sample, t, x).prev_sample
        pictures.append(x)
        ticks(min(start + _AT_ONCE, count), count)
    found = torch.cat(pictures)[:, 0].clamp(-1, 1)
    return ((found + 1) * 127.5).round().to(torch.uint8).numpy()


def _unet(diffusers: Any, case: DigitsCase) -> Any:
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=case.channels,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        num_class_embeds=10,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def _train(
    model: Callable[..., Any], scheduler: Any, pixels: np.ndarray, labels: np.ndarray, plan: _Plan, ticks: Ticks
) -> None:
    """Train what requires grad on the plain denoising loss."""
    images = to_pixels(pixels.transpose(1, 2, 0))[:, None]
    classes = torch.from_numpy(labels)
    rng = torch.Generator().manual_seed(plan.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=1e-4, fused=True)
    means: list[Tensor] = [p.detach().clone() for p in parameters]
    warm = max(1, plan.steps // 15)
    for step in range(plan.steps):
        share = min((step + 1) / warm, (plan.steps - step) / (0.7 * plan.steps), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * share
        rows = torch.randint(len(images), (plan.batch,), generator=rng)
        t = torch.randint(len(scheduler.alphas_cumprod), (plan.batch,), generator=rng)
        noise = torch.randn(plan.batch, *images.shape[1:], generator=rng)
        noisy = scheduler.add_noise(images[rows], noise, t)
        mse_loss(model(noisy, t, class_labels=classes[rows]).sample, noise).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if plan.averaged:
            decay = min(_HALF_LIFE, (step + 1) / (step + 10))
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - decay)
        ticks(step + 1, plan.steps)
    if plan.averaged:
        with torch.no_grad():
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.copy_(mean)
