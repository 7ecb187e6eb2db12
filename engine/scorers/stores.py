"""What scorers ask of any store: its name in a sentence, its rows, its exact norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.kernels.errors import StoreError

__all__ = ["blocks_of", "empty_blocks", "inverse", "known_norms", "losses", "name", "summed_tokens"]

_ROWS_AT_ONCE = 1 << 16


def name(store: RowStore) -> str:
    """What to call a store in a sentence."""
    path = getattr(store, "path", None)
    return "the store" if path is None else repr(str(path))


def blocks_of(store: RowStore, scorer: str) -> Iterator[tuple[int, Tensor]]:
    """The rows of a store, block by block.

    Args:
        scorer: the name of what reads them.

    Raises:
        StoreError: it is compacted and has none.
    """
    if not hasattr(store, "blocks"):
        raise StoreError(
            f"{name(store)} is compacted and holds no rows, which {scorer!r} reads: use the store it was made of"
        )
    return store.blocks()


def empty_blocks(store: RowStore) -> Iterator[tuple[int, Tensor]]:
    """First row and (rows, 0): blocks for what needs no features, of any store."""
    for first in range(0, len(store), _ROWS_AT_ONCE):
        yield first, torch.zeros(min(_ROWS_AT_ONCE, len(store) - first), 0)


def known_norms(store: RowStore, why: str) -> np.ndarray:
    """Exact norms, float64 (n,), or (n, parts).

    Args:
        why: what they are for and what to do without, the end of the sentence "... no exact norm, which".

    Raises:
        StoreError: one is not known.
    """
    norms = np.asarray(store.grad_norm, dtype=np.float64)
    unknown = np.isnan(norms).reshape(len(norms), -1).any(axis=1)
    if unknown.any():
        row = int(unknown.argmax())
        raise StoreError(f"row {row} (id {store.ids[row]!r}) has no exact norm, which {why}")
    return norms


def losses(store: RowStore) -> np.ndarray | None:
    """Losses at each checkpoint, float64 (n, checkpoints); None when a store has none."""
    for column in ("checkpoint_loss", "loss"):
        found = getattr(store, column, None)
        if found is not None:
            return np.asarray(found, dtype=np.float64).reshape(len(store), -1)
    return None


def summed_tokens(store: Any) -> np.ndarray | None:
    """Tokens that each loss is a sum over, float64 (n,); None where losses are no such sums and a row counts as one."""
    summed = getattr(store, "metadata", {}).get("loss", {}).get("sums_tokens", True)
    counted = getattr(store, "loss_tokens", None) if summed else None
    return None if counted is None else np.asarray(counted, dtype=np.float64)


def inverse(norms: np.ndarray) -> np.ndarray:
    """One over each norm; 0 for a norm of 0, so that an empty row scores 0."""
    norms = np.asarray(norms, dtype=np.float64)
    return np.asarray(np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0))
