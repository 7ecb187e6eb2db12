"""Optional dependencies: imported when needed, and named with the pip command when missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gradsift.kernels.errors import MissingExtraError

__all__ = ["require"]

_EXTRA = {
    "PIL": "diffusion",
    "bm25s": "eval",
    "datasets": "hf",
    "diffusers": "diffusion",
    "faiss": "compact",
    "gguf": "hf",
    "huggingface_hub": "diffusion",
    "matplotlib": "plot",
    "ot": "select",
    "peft": "hf",
    "safetensors": "diffusion",
    "scipy": "eval",
    "sklearn": "diffusion",
    "transformers": "hf",
}


def require(module: str) -> Any:
    """Import a module of an extra.

    Args:
        module: dotted name, such as ``"transformers"`` or ``"matplotlib.pyplot"``.

    Raises:
        MissingExtraError: it is not installed; the text gives the command that installs it.
    """
    package = module.split(".", maxsplit=1)[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        extra = _EXTRA[package]
        raise MissingExtraError(f"{package} is not installed: pip install 'gradsift[{extra}]'") from None
