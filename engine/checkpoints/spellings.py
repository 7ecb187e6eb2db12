"""Spellings: the names under which files and dictionaries know the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradsift.engine.capture.names import only_adapter, walk
from gradsift.kernels.errors import DataError

__all__ = ["matched", "spellings"]

_SAVED_BY_PEFT = "base_model.model."
"""What PEFT writes before a canonical name."""


def spellings(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names: canonical, as PEFT saves it, and as the module itself says."""
    found: dict[str, Tensor] = {}
    adapter = only_adapter(model)
    for name, _, module in walk(model):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                canonical = f"{name}.{key}" if name else key
                # An embedding's LoRA matrices lie in a ParameterDict by adapter, whose name PEFT does not save.
                saved = name if isinstance(module, nn.ParameterDict) and key == adapter else canonical
                found.setdefault(canonical, tensor)
                found.setdefault(_SAVED_BY_PEFT + saved, tensor)
    for key, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        found.setdefault(key, tensor)
    return found


def matched(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model, tensor that belongs there) for each of ``tensors``, which may have any spelling.

    Raises:
        DataError: the model has no such tensor, or one of another shape.
    """
    known = spellings(model)
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, value in tensors.items():
        target = known.get(name)
        if target is None:
            raise DataError(f"{where} holds {name!r}, which this model does not have: give a checkpoint of this model")
        if target.shape != value.shape:
            raise DataError(
                f"{where} holds {name!r} of shape {tuple(value.shape)}, expected {tuple(target.shape)}: "
                "give a checkpoint of this model"
            )
        pairs.append((target, value))
    return pairs
