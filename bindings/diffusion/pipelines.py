"""Load a diffusion pipeline with its LoRA: the denoiser that is attributed, and what turns images into its inputs."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsift.bindings.diffusion.families import Family, family_of
from gradsift.bindings.diffusion.lora import load_lora
from gradsift.bindings.models import DTYPES, attempt
from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["Pipeline", "load"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline ready for extraction: in evaluation mode, on its device.

    Attributes:
        pipe: diffusers' pipeline.
        family: what its denoiser takes.
        lora: what was loaded of the LoRA, in words; "" without one.
    """

    pipe: Any
    family: Family
    lora: str

    @property
    def denoiser(self) -> nn.Module:
        """The model whose gradients are attributed."""
        return getattr(self.pipe, self.family.denoiser)  # type: ignore[no-any-return]

    @property
    def vae(self) -> Any:
        """The autoencoder; None for a model of pixels."""
        return getattr(self.pipe, "vae", None)

    @property
    def classes(self) -> int | None:
        """How many class labels the model knows; None when it reads none."""
        return getattr(self._config, "num_class_embeds", None)

    @property
    def channels(self) -> int:
        """Of the images."""
        return int(self._config.in_channels if self.vae is None else self.vae.config.in_channels)

    @property
    def resolution(self) -> int:
        """Height and width of the images that the model was made for."""
        size = getattr(self.pipe, "default_sample_size", None) or self._config.sample_size
        if not isinstance(size, int):
            raise DataError(f"the model's sample size is {size}, expected one number: give --resolution")
        return size if self.vae is None else size * int(self.pipe.vae_scale_factor)

    @property
    def _config(self) -> Any:
        return self.denoiser.config


def load(model: str, lora: str | None = None, *, dtype: str | None = None, device: str | None = None) -> Pipeline:
    """Load what `diffusers` saved.

    Args:
        model: folder or hub id of a pipeline.
        lora: see ``load_lora``.
        dtype: a key of ``DTYPES``; float32 unless given.
        device: such as ``"cpu"`` or ``"cuda:0"``; a GPU when there is one, unless given.

    Raises:
        DataError: something does not load, the pipeline is of no known family, or the LoRA does not fit.
        MissingExtraError: diffusers is not installed.
    """
    diffusers = require("diffusers")
    require("transformers"), require("peft")
    if dtype is not None and dtype not in DTYPES:
        raise DataError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
    what = f"model '{model}'"
    _refuse_other_folders(model)
    index = attempt(what, diffusers.DiffusionPipeline.load_config, model)
    family = family_of(str(index.get("_class_name")), what)
    if family.encode is not None and (index.get("vae") or [None])[0] is None:
        raise DataError(f"{what} has no VAE, which turns images into what its {family.denoiser} reads: add one to it")
    # A safety checker only looks at finished pictures.
    unused = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
    numbers = DTYPES[dtype or "float32"]
    with warnings.catch_warnings():
        # Later releases call it dtype, which earlier ones do not know.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        pipe = attempt(what, diffusers.DiffusionPipeline.from_pretrained, model, torch_dtype=numbers, **unused)
    said = load_lora(pipe, family.denoiser, lora) if lora is not None else ""
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    return Pipeline(pipe, family, said)


def _refuse_other_folders(model: str) -> None:
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2):
        raise DataError(f"model folder '{model}' does not exist")
    if path.is_file():
        raise DataError(
            f"model '{model}' is a file: give the folder that pipeline.save_pretrained wrote; "
            "StableDiffusionPipeline.from_single_file reads such a file, and can save it as a folder"
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        what = "holds one model, not a pipeline" if (path / "config.json").exists() else "has no model_index.json"
        raise DataError(f"model folder '{model}' {what}: give the folder that pipeline.save_pretrained wrote")
