"""LoRA files in diffusers', kohya's and PEFT's formats: loaded by diffusers and PEFT, then compared with the model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradsift.bindings.models import attempt, check_adapter, first, is_merged
from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["ENCODERS", "load_lora"]

logger = logging.getLogger(__name__)

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Where a pipeline keeps its text encoders, which a LoRA may change as well."""

_VARIANTS = {
    "dora_scale": "a DoRA, which divides by the norm of the merged weight",
    "lora_magnitude_vector": "a DoRA, which divides by the norm of the merged weight",
    "lokr_": "a LoKr, a product of Kronecker factors",
    "hada_": "a LoHa, a product of Hadamard factors",
}
"""Parts of names that only files of other methods have; diffusers drops some of them with a warning."""


_MISMATCH = re.compile(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]")


_ADAPTER = re.compile(r"(\.lora_[AB])\.[^.]+\.weight$")
"""What a LoRA parameter's name ends in: with the adapter's name, which a file does not have."""


def load_lora(pipe: Any, denoiser: str, source: str) -> str:
    """Load a LoRA into a pipeline, and see that every tensor arrived and every LoRA layer was filled.

    Args:
        pipe: a pipeline of diffusers.
        denoiser: its attribute that is attributed.
        source: a .safetensors file in diffusers' or kohya's format, a folder that holds one, a PEFT folder, or the hub
            id of one of these.

    Returns:
        what was loaded, in words.

    Raises:
        DataError: it does not fit the model, is of another method, or would count twice.
    """
    path, what = _local(source), f"LoRA '{source}'"
    if path.is_dir() and (path / "adapter_config.json").exists():
        said = _load_peft(pipe, denoiser, path, what)
    else:
        said = _load_file(pipe, denoiser, _weights(path, source), what)
    layers = _lora_tensors(getattr(pipe, denoiser))
    if not any(bool(value.any()) for name, value in layers.items() if ".lora_B." in name):
        logger.warning("%s has not been trained: every lora_B in it is zero", what)
    if is_merged(getattr(pipe, denoiser)):
        raise DataError(
            f"{what} is in the weights of the model already, so it would count twice: "
            "give the base model that it was trained on, not the merged one"
        )
    return said


def _local(source: str) -> Path:
    """The file or folder; of a hub id, its download."""
    path = Path(source)
    if path.exists():
        return path
    if path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2 or path.suffix:
        raise DataError(f"LoRA '{source}' does not exist")
    hub = require("huggingface_hub")
    wanted = ["*.safetensors", "adapter_config.json"]
    return Path(attempt(f"LoRA '{source}'", hub.snapshot_download, source, allow_patterns=wanted))


def _weights(path: Path, source: str) -> Path:
    """The one file of weights that is meant."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        usual = [file for file in files if file.name == "pytorch_lora_weights.safetensors"]
        if not files:
            raise DataError(
                f"LoRA folder '{source}' has no .safetensors file and no adapter_config.json: give what "
                "save_lora_weights, a kohya script or PEFT wrote"
            )
        if len(files) > 1 and not usual:
            names = first([file.name for file in files])
            raise DataError(f"LoRA folder '{source}' holds {len(files)} files ({names}): give the path of one")
        path = (usual or files)[0]
    if path.suffix != ".safetensors":
        raise DataError(f"LoRA file '{source}' ends in '{path.suffix}', expected .safetensors: convert it")
    return path


def _load_file(pipe: Any, denoiser: str, path: Path, what: str) -> str:
    safetensors = require("safetensors")
    try:
        raw = require("safetensors.torch").load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{what} cannot be read: {error}") from error
    for mark, method in _VARIANTS.items():
        if any(mark in key for key in raw):
            raise DataError(f"{what} is {method}, and only plain LoRA can be captured: train it as plain LoRA")
    if not hasattr(pipe, "load_lora_weights"):
        raise DataError(
            f"a {type(pipe).__name__} loads no LoRA file: save the adapter as a PEFT folder (save_pretrained) "
            "and give that"
        )
    before = _lora_tensors(getattr(pipe, denoiser))
    try:
        attempt(what, pipe.load_lora_weights, str(path))
    except DataError as error:
        raise _other_shape(error, what) from error
    options = {"unet_config": pipe.unet.config} if denoiser == "unet" else {}
    found = attempt(what, pipe.lora_state_dict, str(path), **options)
    weights: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    _compare(pipe, denoiser, {k: v for k, v in weights.items() if not k.endswith("alpha")}, what, len(before))
    loaded = len(_lora_tensors(getattr(pipe, denoiser)))
    beside = sum(len(_lora_tensors(getattr(pipe, name, None))) for name in ENCODERS)
    said = f"{loaded} tensors in the {denoiser}"
    if beside:
        logger.warning(
            "%s also changes the text encoder (%d of its %d tensors): prompts are encoded with it, but what it learned "
            "there is not attributed",
            what,
            beside,
            loaded + beside,
        )
        said += f", {beside} in the text encoder"
    return said


def _other_shape(error: DataError, what: str) -> DataError:
    """What torch says of tensors of another shape, in one sentence."""
    found = _MISMATCH.search(str(error.__cause__))
    if found is None:
        return error
    name, given, expected = found.groups()
    return DataError(
        f"{what} does not fit the model: {name} has shape ({given}) in the file and ({expected}) in the model: "
        "give the model that it was trained on"
    )


def _load_peft(pipe: Any, denoiser: str, folder: Path, what: str) -> str:
    peft = require("peft")
    base = getattr(pipe, denoiser)
    with warnings.catch_warnings():
        # Its warning about missing keys becomes an error with names in check_adapter.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        wrapped = attempt(what, peft.PeftModel.from_pretrained, base, str(folder), low_cpu_mem_usage=True)
    weights = attempt(what, peft.load_peft_weights, str(folder), device="cpu")
    check_adapter(wrapped, weights, what)
    wrapped.set_adapter(wrapped.active_adapter)  # trainable, as diffusers leaves the layers that it loads
    setattr(pipe, denoiser, wrapped)
    return f"{len(weights)} tensors in the {denoiser}"


def _compare(pipe: Any, denoiser: str, weights: dict[str, Tensor], what: str, before: int) -> None:
    """Hold the tensors of a file against those of the model, component by component.

    diffusers only warns of tensors without a place, and layers without tensors would keep random ones; both loaders
    leave what they do not fill on the meta device.
    """
    counts = {denoiser: 0}
    strangers = []
    for name in weights:
        component = name.split(".", maxsplit=1)[0]
        if component in (denoiser, *ENCODERS) and getattr(pipe, component, None) is not None:
            counts[component] = counts.get(component, 0) + 1
        else:
            strangers.append(name)
    if strangers:
        raise DataError(
            f"{what} does not fit a {type(pipe).__name__}: {len(strangers)} of its {len(weights)} tensors belong to no "
            f"part of it ({first(strangers)}): give the model that it was trained on"
        )
    if not counts[denoiser]:
        raise DataError(f"{what} holds nothing for the {denoiser}, only for the text encoder: there is no row to make")
    for component, count in counts.items():
        loaded = _lora_tensors(getattr(pipe, component))
        empty = [name for name, value in loaded.items() if value.is_meta]
        if empty:
            raise DataError(
                f"{what} does not fill the model: {len(empty)} LoRA tensors of the {component} are not in its file and "
                f"would be random ({first(empty)}): the file is not whole"
            )
        arrived = len(loaded) - (before if component == denoiser else 0)
        if arrived != count:
            lost = _not_arrived(weights, component, loaded)
            raise DataError(
                f"{what} does not fit the model: diffusers loads {arrived} of its {count} tensors for the {component}, "
                f"not {first(lost)}: give the model that it was trained on, and names that are all of one format"
            )


def _not_arrived(weights: dict[str, Tensor], component: str, loaded: Iterable[str]) -> list[str]:
    """Names of tensors that the model does not hold; of a file that mixes formats, diffusers reads only one."""
    convert = require("diffusers.utils").convert_unet_state_dict_to_peft
    prefix = f"{component}."
    mine = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    there = {_ADAPTER.sub(r"\1.weight", name) for name in loaded}
    return [name for name in convert(mine) if name not in there] or [prefix]


def _lora_tensors(model: nn.Module | None) -> dict[str, Tensor]:
    """The parameters that LoRA layers hold."""
    if model is None:
        return {}
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
