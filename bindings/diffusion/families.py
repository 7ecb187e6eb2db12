"""Families of diffusion pipelines: what each one's denoiser takes beside noisy latents, and how it is called.

Names of conditions are those of the denoiser's forward; a dot leads into a mapping (``added_cond_kwargs.time_ids``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.kernels.errors import DataError

__all__ = ["FAMILIES", "Family", "family_of", "nested", "predict_flux", "predict_sd3"]

Predict = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Any]], Tensor]
Conditions = dict[str, Tensor]

_SD3_TOKENS = 77
"""T5 tokens of a Stable Diffusion 3 prompt, as in diffusers' training scripts."""

_GUIDANCE = 1.0
"""Of a guidance-distilled Flux model, as in diffusers' training scripts."""


@dataclass(frozen=True, slots=True)
class Family:
    """What sets a kind of pipeline apart.

    Attributes:
        name: for people.
        denoiser: the pipeline's attribute that holds it.
        encode: ``encode(pipe, prompt)`` gives one prompt's conditions, without a batch axis; None where the model
            reads no prompt.
        predict: calls the denoiser; None for the loss's own way, by the names of its forward.
        sizes: conditions that depend on an image's size and crop.
        multiple: ``multiple(pipe)``: what height and width in pixels must be divisible by.
    """

    name: str
    denoiser: str
    encode: Callable[[Any, str], Conditions] | None
    predict: Predict | None
    multiple: Callable[[Any], int]
    sizes: Callable[[tuple[int, int], tuple[int, int], int], Conditions] | None = None


def family_of(pipeline: str, where: str) -> Family:
    """The family of a pipeline class.

    Raises:
        DataError: it is none of those that can be measured truthfully.
    """
    if pipeline not in FAMILIES:
        raise DataError(
            f"{where} is a {pipeline}, expected one of {', '.join(FAMILIES)}: other pipelines condition their denoiser "
            "in ways that are not known here; use gs.losses.Diffusion with a predict function of your own"
        )
    return FAMILIES[pipeline]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": x}`` as ``{"a": {"b": x}}``."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        outer, dot, inner = name.partition(".")
        if dot:
            out.setdefault(outer, {})[inner] = value
        else:
            out[outer] = value
    return out


def _device(pipe: Any) -> torch.device:
    return torch.device(next(pipe.text_encoder.parameters()).device)


def _encode_sd(pipe: Any, prompt: str) -> Conditions:
    text, _ = pipe.encode_prompt(prompt, _device(pipe), 1, False)
    return {"encoder_hidden_states": text[0]}


def _encode_sdxl(pipe: Any, prompt: str) -> Conditions:
    text, _, pooled, _ = pipe.encode_prompt(prompt, device=_device(pipe), do_classifier_free_guidance=False)
    return {"encoder_hidden_states": text[0], "added_cond_kwargs.text_embeds": pooled[0]}


def _encode_sd3(pipe: Any, prompt: str) -> Conditions:
    text, _, pooled, _ = pipe.encode_prompt(
        prompt,
        prompt,
        prompt,
        device=_device(pipe),
        do_classifier_free_guidance=False,
        max_sequence_length=_SD3_TOKENS,
    )
    return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}


def _encode_flux(pipe: Any, prompt: str) -> Conditions:
    text, pooled, _ = pipe.encode_prompt(prompt, prompt, device=_device(pipe))
    return {"encoder_hidden_states": text[0], "pooled_projections": pooled[0]}


def _sizes_sdxl(original: tuple[int, int], crop: tuple[int, int], resolution: int) -> Conditions:
    """SDXL is told an image's size before it was resized, and where it was cropped: (height, width), (top, left)."""
    return {"added_cond_kwargs.time_ids": torch.tensor([*original, *crop, resolution, resolution]).float()}


def predict_sd3(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """The transformer takes its timestep after the conditions."""
    out: Tensor = model(hidden_states=noisy, timestep=timesteps, return_dict=False, **conditions)[0]
    return out


def predict_flux(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Any]) -> Tensor:
    """Latents go in as 2 x 2 patches in a row, with their places beside them; time runs from 0 to 1."""
    rows, channels, height, width = noisy.shape
    h, w = height // 2, width // 2
    packed = noisy.view(rows, channels, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(rows, h * w, channels * 4)
    places = torch.zeros(h, w, 3, device=noisy.device, dtype=noisy.dtype)
    places[..., 1] += torch.arange(h, device=noisy.device)[:, None]
    places[..., 2] += torch.arange(w, device=noisy.device)
    text = conditions["encoder_hidden_states"]
    config: Any = model.config
    out: Tensor = model(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.full((rows,), _GUIDANCE, device=noisy.device) if config.guidance_embeds else None,
        img_ids=places.view(h * w, 3),
        txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        return_dict=False,
        **conditions,
    )[0]
    return out.view(rows, h, w, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def _vae_scale(pipe: Any) -> int:
    return int(pipe.vae_scale_factor)


def _halvings(pipe: Any) -> int:
    return int(2 ** (len(pipe.unet.config.block_out_channels) - 1))


_PIXELS = Family("class-conditional or unconditional UNet", "unet", None, None, _halvings)

FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("Stable Diffusion", "unet", _encode_sd, None, _vae_scale),
    "StableDiffusionXLPipeline": Family("Stable Diffusion XL", "unet", _encode_sdxl, None, _vae_scale, _sizes_sdxl),
    "StableDiffusion3Pipeline": Family(
        "Stable Diffusion 3",
        "transformer",
        _encode_sd3,
        predict_sd3,
        lambda pipe: int(pipe.vae_scale_factor * pipe.transformer.config.patch_size),
    ),
    "FluxPipeline": Family("Flux", "transformer", _encode_flux, predict_flux, lambda pipe: 2 * _vae_scale(pipe)),
    "DDPMPipeline": _PIXELS,
    "DDIMPipeline": _PIXELS,
}
"""By the class of the pipeline."""
