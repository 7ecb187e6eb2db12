"""What can be told of a loader and of a batch without running the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from gradsift.kernels.errors import DataError

__all__ = ["Batch", "as_batch", "expected_rows", "shuffles", "tokens_in"]

Batch = Mapping[str, Any]


def as_batch(batch: Any) -> Batch:
    """The batch itself.

    Raises:
        DataError: it is no mapping.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"the loader gave a {type(batch).__name__}, expected batches that are mappings such as dicts")
    return batch


def shuffles(loader: object) -> bool:
    """Whether a loader is known to give its examples in another order each time."""
    sampler = getattr(loader, "sampler", None)
    nested = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    return isinstance(sampler, random) or isinstance(nested, random)


def expected_rows(loader: Iterable[Any]) -> int | None:
    """How many examples a loader will give; None when only reading it tells."""
    rows = getattr(loader, "rows", None)
    if isinstance(rows, int):
        return rows
    if isinstance(loader, DataLoader):
        try:
            sampled, size = len(loader.sampler), loader.batch_size  # type: ignore[arg-type]
        except TypeError:
            return None
        return sampled // size * size if size and loader.drop_last else sampled
    if isinstance(loader, list | tuple):
        counts = [_rows(batch) for batch in loader]
        return None if None in counts else sum(count for count in counts if count is not None)
    return None


def _rows(batch: Any) -> int | None:
    """Examples in a batch that says so itself."""
    if not isinstance(batch, Mapping):
        return None
    if batch.get("ids") is not None:
        return len(batch["ids"])
    if batch.get("segments") is not None:
        return len(batch["segments"]) - 1
    rows = batch.get("input_ids", batch.get("latents"))
    return len(rows) if isinstance(rows, Tensor) else None


def tokens_in(batch: Batch) -> int:
    """Tokens that the model reads; 0 for data without tokens."""
    mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor):
        return int(mask.count_nonzero()) if mask.ndim == 2 else mask.shape[0] * mask.shape[-1]
    return tokens.numel() if isinstance(tokens, Tensor) else 0
