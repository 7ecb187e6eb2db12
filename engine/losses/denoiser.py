"""How a denoiser is asked for its prediction, and what may come back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.losses.inside import forward_arguments
from gradsift.kernels.errors import DataError, ShapeError

__all__ = ["NOT_CONDITIONS", "Predict", "conditions_of", "denoise", "latents_of", "predict"]

Conditions = Mapping[str, Any]
Predict = Callable[[nn.Module, Tensor, Tensor, Conditions], Any]
"""``predict(model, noisy, timesteps, conditions)`` -> prediction (rows, C, H, W), or a model's output that holds it."""

NOT_CONDITIONS = frozenset({"ids", "latents", "seeds"})
"""Keys of a batch that the model does not see as they are."""


def predict(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Any:
    """Call a denoiser of diffusers, or one like it: noisy latents first, ``timestep``, and conditions by name.

    Raises:
        DataError: the forward has no argument of a condition's name.
    """
    known = forward_arguments(model)
    unknown = [name for name in conditions if known is not None and name not in known]
    if unknown:
        raise DataError(
            f"the batch has {unknown[0]!r}, which the forward of {type(model).__name__} does not take: name "
            f"conditions as it does ({', '.join(sorted(known or ()))})"
        )
    if known is not None and "timestep" not in known:
        return model(noisy, timesteps, **conditions)
    return model(noisy, timestep=timesteps, **conditions)


def denoise(
    model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Conditions, ask: Predict, wide: torch.dtype
) -> Tensor:
    """The prediction as numbers of dtype ``wide``, of the shape of ``noisy``.

    A model that predicts variances too (twice the channels) has its prediction in the first half, as in diffusers.

    Raises:
        ShapeError: the model returned no tensor, or one of another shape.
    """
    output = ask(model, noisy, timesteps, conditions)
    found = getattr(output, "sample", None) if not isinstance(output, Tensor) else output
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise ShapeError(
            f"the denoiser returned {type(output).__name__} without a prediction: expected a tensor, a tuple that "
            "begins with one, or .sample"
        )
    rows, channels, *rest = noisy.shape
    if found.shape == (rows, 2 * channels, *rest):
        found = found[:, :channels]
    if found.shape != noisy.shape:
        raise ShapeError(
            f"the denoiser predicted shape {tuple(found.shape)} for latents {tuple(noisy.shape)}: expected the same "
            "shape, or twice the channels when it predicts variances too"
        )
    return found.to(wide)


def latents_of(batch: Mapping[str, Any]) -> Tensor:
    """The clean latents, (n, C, H, W).

    Raises:
        DataError: there are none.
        ShapeError: they have another number of axes.
    """
    latents = batch.get("latents")
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        what = f"{latents.dtype}" if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        got = "no 'latents'" if latents is None else f"'latents' that are {what}"
        raise DataError(f"the batch has {got}: expected a float tensor of clean latents, (n, channels, height, width)")
    if latents.ndim != 4:
        raise ShapeError(f"latents have shape {tuple(latents.shape)}, expected (n, channels, height, width)")
    return latents


def conditions_of(
    batch: Mapping[str, Any], n: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything else in a batch, a row per measurement (``repeats`` of each example, one after another).

    Floating-point tensors take the model's dtype.

    Raises:
        DataError: a value is neither a tensor nor a mapping of tensors.
        ShapeError: a tensor's first axis is not n.
    """

    def rows(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            return {key: rows(item, f"{where}[{key!r}]") for key, item in value.items()}
        if not isinstance(value, Tensor):
            raise DataError(
                f"{where} is a {type(value).__name__}, expected a tensor or a mapping of tensors: keep what the model "
                "does not take out of the batch"
            )
        if value.ndim == 0 or len(value) != n:
            raise ShapeError(f"{where} has shape {tuple(value.shape)}, expected one entry for each of {n} examples")
        moved = value.to(device, dtype) if value.is_floating_point() else value.to(device)
        return moved.repeat_interleave(repeats, dim=0) if repeats > 1 else moved

    return {key: rows(value, f"batch[{key!r}]") for key, value in batch.items() if key not in NOT_CONDITIONS}
