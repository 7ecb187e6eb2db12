"""Examples taken out of a batch: some of them, or one of them without its padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.kernels.errors import DataError

__all__ = ["Batch", "cast", "segments_of", "take", "without_padding"]

Batch = Any
"""A mapping as ``extract`` takes it; or a tensor, or a list or tuple of tensors."""

_MASK_NDIM = 4


def segments_of(batch: Batch) -> Any:
    """Offsets of packed examples, if the batch says that it is packed."""
    return batch.get("segments") if isinstance(batch, Mapping) else None


def take(batch: Batch, rows: Sequence[int], n: int) -> Batch:
    """A batch of these examples only, in this order.

    Args:
        batch: examples lie along the first axis of its tensors; or, with ``batch["segments"]``, one after another
            along the second axis of its (1, tokens, ...) tensors. What has another length is passed on as it is.
        n: examples in the batch.

    Raises:
        DataError: nothing in the batch has n examples.
    """
    if segments_of(batch) is not None:
        return _take_packed(batch, list(rows), n)
    index = list(rows)
    found = False

    def part(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor) and value.ndim and len(value) == n:
            found = True
            return value[torch.tensor(index, device=value.device)]
        if isinstance(value, np.ndarray) and value.ndim and len(value) == n:
            return value[index]
        if isinstance(value, list | tuple) and len(value) == n and not any(isinstance(v, Tensor) for v in value):
            return type(value)(value[i] for i in index)
        return value

    taken = _over(batch, part)
    if not found:
        raise DataError(
            f"one example cannot be taken out of the batch: none of its tensors has the {n} examples of the loss "
            "along its first axis"
        )
    return taken


def without_padding(batch: Batch) -> Batch:
    """The batch without the columns that no example attends to and that carry no label."""
    if not isinstance(batch, Mapping) or segments_of(batch) is not None:
        return batch
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return batch
    encoder_decoder = any(key.startswith("decoder_") for key in batch) or (
        isinstance(labels, Tensor) and labels.shape != mask.shape
    )
    used = (mask != 0).any(0)
    if isinstance(labels, Tensor) and not encoder_decoder:
        used |= (labels != -100).any(0).to(used.device)
    trimmed = dict(batch)
    for key, value in batch.items():
        target_side = encoder_decoder and (key == "labels" or key.startswith("decoder_"))
        columns = (labels != -100).any(0) if target_side and isinstance(labels, Tensor) else used
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == len(columns) and bool(columns.any()):
            kept = columns.nonzero().flatten()
            trimmed[key] = value[:, int(kept[0]) : int(kept[-1]) + 1]
    return trimmed


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in another dtype."""
    return _over(batch, lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v)


def _over(batch: Batch, part: Any) -> Batch:
    if isinstance(batch, Mapping):
        return {key: _over(value, part) if isinstance(value, Mapping) else part(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(part(value) for value in batch)
    return part(batch)


def _take_packed(batch: Mapping[str, Any], rows: list[int], n: int) -> Batch:
    offsets = torch.as_tensor(batch["segments"]).cpu()
    tokens = int(offsets[-1])
    columns = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in rows])
    lengths = offsets.diff()[rows]
    segments = torch.cat([torch.zeros(1, dtype=lengths.dtype), lengths.cumsum(0)])

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            index = columns.to(value.device)
            if value.ndim == _MASK_NDIM and value.shape[-2:] == (tokens, tokens):
                return value[..., index, :][..., index]
            if value.ndim > 1 and value.shape[:2] == (1, tokens):
                return value[:, index]
            return value
        return [value[i] for i in rows] if isinstance(value, list | tuple) and len(value) == n else value

    taken = {key: part(value) for key, value in batch.items()}
    taken["segments"] = segments.to(batch["segments"].device) if isinstance(batch["segments"], Tensor) else segments
    return taken
