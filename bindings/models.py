"""Load a language model with its adapter and tokenizer, and see that every adapter weight arrived."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["DTYPES", "Loaded", "attempt", "check_adapter", "first", "is_merged", "load"]

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MERGED_MAPS = 16
"""Maps that are looked at to tell whether an adapter is in the weights already."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready for extraction: in evaluation mode, on its device.

    Attributes:
        model: the model, wrapped by PEFT when there is an adapter.
        tokenizer: the adapter's own if it was saved with one, else the model's.
        encoder_decoder: whether prompts go to an encoder.
    """

    model: nn.Module
    tokenizer: Any
    encoder_decoder: bool


def load(
    model: str,
    adapter: str | None = None,
    *,
    tokenizer: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Loaded:
    """Load what `transformers` and PEFT saved.

    Args:
        model: folder, hub id, or .gguf file.
        adapter: folder or hub id of a PEFT adapter.
        tokenizer: folder or hub id, where it lies elsewhere.
        dtype: a key of ``DTYPES``; float32 on a CPU and the checkpoint's own on a GPU, unless given.
        device: such as ``"cpu"`` or ``"cuda:0"``; a GPU when there is one, unless given.

    Raises:
        DataError: something does not load, or the adapter does not fit the model.
        MissingExtraError: transformers or peft is not installed.
    """
    transformers = require("transformers")
    if dtype is not None and dtype not in DTYPES:
        raise DataError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        wanted: Any = torch.float32 if device == "cpu" else "auto"
    else:
        wanted = DTYPES[dtype]
    source, options = _source(model)
    config = attempt(f"model '{model}'", transformers.AutoConfig.from_pretrained, source, **options)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    kind = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    loaded = attempt(f"model '{model}'", kind.from_pretrained, source, config=config, dtype=wanted, **options)
    loaded.to(device)
    tokens = _tokenizer(model, adapter, tokenizer)
    rows = loaded.get_input_embeddings().num_embeddings
    if len(tokens) > rows:
        raise DataError(
            f"the tokenizer knows {len(tokens)} tokens but the model embeds {rows}: give the tokenizer of this model"
        )
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    return Loaded(loaded.eval(), tokens, encoder_decoder)


def check_adapter(model: nn.Module, weights: dict[str, Tensor], name: str = "adapter") -> None:
    """Compare an adapter's file with the model that it was loaded into.

    Args:
        model: a PEFT model whose adapter was created without storage (``low_cpu_mem_usage=True``), so that a weight
            that nothing was loaded into is still on the meta device.
        weights: the adapter's file, by PEFT's names.

    Raises:
        DataError: a weight of the file has no place in the model, or a weight of the model is not in the file.
    """
    peft = require("peft")
    left = [key for key, value in model.named_parameters() if value.is_meta]
    result = peft.set_peft_model_state_dict(model, weights)
    unexpected = list(result.unexpected_keys)
    if unexpected:
        raise DataError(
            f"{name} does not fit the model: {len(unexpected)} of its {len(weights)} weights have no place there "
            f"({first(unexpected)}): give the model that it was trained on"
        )
    if left:
        raise DataError(
            f"{name} does not fill the model: {len(left)} adapter weights are not in its file and would be random "
            f"({first(left)}): give the adapter that belongs to this model"
        )


def _source(model: str) -> tuple[str, dict[str, Any]]:
    """Where to load from, with the options of a GGUF file."""
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise DataError(f"model file '{model}' does not exist")
        require("gguf")
        return str(path.parent), {"gguf_file": path.name}
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or len(path.parts) > 2):
        raise DataError(f"model folder '{model}' does not exist")
    if path.is_dir() and not (path / "config.json").exists():
        if (path / "model_index.json").exists():
            raise DataError(f"'{model}' holds a diffusion pipeline: add --kind diffusion")
        if (path / "adapter_config.json").exists():
            raise DataError(f"'{model}' holds an adapter: pass it as --adapter, and its base model as --model")
        raise DataError(f"model folder '{model}' has no config.json: give a folder that save_pretrained wrote")
    return model, {}


def _tokenizer(model: str, adapter: str | None, tokenizer: str | None) -> Any:
    transformers = require("transformers")
    if tokenizer is None and adapter is not None and (Path(adapter) / "tokenizer_config.json").exists():
        tokenizer = adapter
    source, options = _source(model) if tokenizer is None else (tokenizer, {})
    return attempt(f"tokenizer '{tokenizer or model}'", transformers.AutoTokenizer.from_pretrained, source, **options)


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    peft = require("peft")
    path = Path(adapter)
    if path.is_dir() and not (path / "adapter_config.json").exists():
        raise DataError(f"adapter folder '{adapter}' has no adapter_config.json: give a folder that PEFT saved")
    what = f"adapter '{adapter}'"
    with warnings.catch_warnings():
        # Its warning about missing keys becomes an error with names in check_adapter.
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        wrapped = attempt(what, peft.PeftModel.from_pretrained, model, adapter, low_cpu_mem_usage=True)
    weights = attempt(what, peft.load_peft_weights, adapter, device="cpu")
    check_adapter(wrapped, weights, what)
    outputs = [value for key, value in weights.items() if ".lora_B." in key or "lora_embedding_B" in key]
    if outputs and not any(bool(value.any()) for value in outputs):
        logger.warning("%s has not been trained: every lora_B in it is zero", what)
    if is_merged(wrapped):
        raise DataError(
            f"{what} is in the weights of the model already, so it would count twice: "
            "give the base model that it was trained on, not the merged one"
        )
    return wrapped  # type: ignore[no-any-return]


def is_merged(model: nn.Module) -> bool:
    """Whether the base weights contain the adapter's change D.

    <W, D> / <D, D> is 1 + noise for a merged map and 0 + noise for any other; the verdict needs three of
    four maps within a quarter of 1, so that noisy maps (small change, small matrix) say nothing.
    """
    shares: list[float] = []
    for layer in model.modules():
        pair = getattr(layer, "lora_A", None), getattr(layer, "lora_B", None)
        if not all(isinstance(side, nn.ModuleDict) and len(side) for side in pair):
            continue
        share = _merged_share(layer)
        if share is not None:
            shares.append(share)
        if len(shares) == _MERGED_MAPS:
            break
    near = sum(abs(share - 1) < 0.25 for share in shares)
    return len(shares) >= 2 and near >= 0.75 * len(shares)


def _merged_share(layer: Any) -> float | None:
    """<W, D> / <D, D> without forming D = scale B A; None where it has no meaning."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    name = next(iter(layer.lora_A))
    a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float()
    if weight is None or a.ndim != 2 or not weight.is_floating_point():
        return None
    if getattr(layer, "fan_in_fan_out", False):
        weight = weight.T
    if weight.shape != (b.shape[0], a.shape[1]):
        return None
    with torch.no_grad():
        scale = float(layer.scaling[name])
        size = scale * scale * float(((b.T @ b) * (a @ a.T)).sum())
        return scale * float(((weight.float() @ a.T) * b).sum()) / size if size else None


def attempt(what: str, call: Any, *args: Any, **options: Any) -> Any:
    """Call a loader; its complaints become one sentence."""
    try:
        return call(*args, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DataError(f"{what} cannot be loaded: {' '.join(lines[:2]) or type(error).__name__}") from error


def first(names: list[str]) -> str:
    """The first three names, for a sentence."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
