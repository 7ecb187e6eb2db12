"""What the denoiser reads of an image and its prompt: VAE latents and text encodings, made once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.bindings.diffusion.cache import Cache, content_key
from gradsift.bindings.diffusion.images import Picture, to_pixels
from gradsift.bindings.diffusion.lora import ENCODERS
from gradsift.bindings.diffusion.pipelines import Pipeline
from gradsift.engine.extraction.fingerprints import model_fingerprint
from gradsift.kernels.errors import DataError

__all__ = ["Encoder"]

Tensors = dict[str, Tensor]


class Encoder:
    """Makes latents and text encodings of one pipeline, one at a time, so that each depends on nothing but itself.

    Latents are the mean of the VAE's posterior (training draws from it), shifted and scaled as the denoiser sees them;
    the VAE runs in float32. A model without a VAE reads pixels in [-1, 1].

    Args:
        pipeline: see ``pipelines.load``.
        resolution: height and width in pixels; the model's own unless given.
        folder: where results are kept between runs; None to keep none.

    Attributes:
        resolution: of the images.
        fingerprint: changes with anything that latents or encodings depend on.

    Raises:
        DataError: the resolution or the VAE is unusable.
    """

    def __init__(self, pipeline: Pipeline, resolution: int | None = None, folder: Path | None = None) -> None:
        self.pipeline = pipeline
        self.resolution = pipeline.resolution if resolution is None else resolution
        multiple = pipeline.family.multiple(pipeline.pipe)
        if self.resolution < multiple or self.resolution % multiple:
            raise DataError(
                f"resolution is {self.resolution}, expected a multiple of {multiple} for a "
                f"{type(pipeline.pipe).__name__}"
            )
        if pipeline.channels not in (1, 3):
            raise DataError(f"the model reads images of {pipeline.channels} channels, expected 3 (colour) or 1 (grey)")
        self._vae_print = _vae_fingerprint(pipeline.vae) if pipeline.vae is not None else "pixels"
        self._text_print = _text_fingerprint(pipeline) if pipeline.family.encode is not None else "none"
        self.fingerprint = content_key("encoders", self._vae_print, self._text_print).hex()
        self._latents, self._texts = (Cache(folder and folder / part) for part in ("latents", "text"))

    def image_key(self, picture: Picture) -> bytes:
        """What identifies an image's latents: its pixels and the VAE."""
        pixels = np.ascontiguousarray(picture.pixels)
        return content_key("latents", self._vae_print, str(pixels.shape), pixels.tobytes())

    def text_key(self, prompt: str) -> bytes:
        """What identifies a prompt's encodings: its text, and text encoders with their LoRA."""
        return content_key("text", self._text_print, prompt)

    @torch.no_grad()
    def latents(self, key: bytes, picture: Callable[[], Picture]) -> Tensor:
        """Clean latents of the picture with this key, float32 (C, H, W)."""
        vae = self.pipeline.vae
        if vae is None:
            return to_pixels(picture().pixels)
        return self._latents.get(key, lambda: {"latents": _encode(vae, to_pixels(picture().pixels))})["latents"]

    @torch.no_grad()
    def text(self, prompt: str) -> Tensors:
        """A prompt's conditions, without a batch axis."""
        encode = self.pipeline.family.encode
        assert encode is not None

        def make() -> Tensors:
            return {name: value.cpu() for name, value in encode(self.pipeline.pipe, prompt).items()}

        return self._texts.get(self.text_key(prompt), make)

    def keep(self, keys: Iterable[bytes]) -> None:
        """Write what is not on disk yet, and remove what belongs to none of these keys."""
        wanted = set(keys)
        for cache in (self._latents, self._texts):
            cache.flush()
            cache.prune(wanted)

    def rest(self) -> None:
        """Leave the accelerator to the denoiser: everything was encoded."""
        for name in ("vae", *ENCODERS):
            module = getattr(self.pipeline.pipe, name, None)
            if isinstance(module, nn.Module):
                module.to("cpu")


def _encode(vae: Any, pixels: Tensor) -> Tensor:
    weight = next(vae.parameters())
    if weight.dtype != torch.float32:
        vae.to(torch.float32)  # several VAEs overflow in float16
    posterior = getattr(vae.encode(pixels[None].to(weight.device)), "latent_dist", None)
    if posterior is None:
        raise DataError(f"the VAE is a {type(vae).__name__} without a posterior: expected such as AutoencoderKL")
    latents = posterior.mode()[0]
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v, device=latents.device).view(-1, 1, 1) for v in (mean, std))
        latents = (latents - mean) / std
    latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
    return latents.float().cpu()  # type: ignore[no-any-return]


def _vae_fingerprint(vae: Any) -> str:
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    settings = json.dumps([getattr(vae.config, name, None) for name in names])
    return content_key(model_fingerprint(vae), settings).hex()


def _text_fingerprint(pipeline: Pipeline) -> str:
    parts = []
    for name in ENCODERS:
        encoder = getattr(pipeline.pipe, name, None)
        tokenizer = getattr(pipeline.pipe, name.replace("text_encoder", "tokenizer"), None)
        if encoder is not None and tokenizer is not None:
            words = sorted(tokenizer.get_vocab().items())
            parts += [model_fingerprint(encoder), json.dumps([words, tokenizer.model_max_length])]
    return content_key(*parts).hex()
