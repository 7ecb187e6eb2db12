"""Rows of a store as selectors read them: summands of a gradient added up, checkpoints kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.parts import parts_of
from gradsift.engine.scorers.stores import blocks_of, name
from gradsift.kernels.errors import DataError, SpecError, StoreError

__all__ = [
    "allowed_rows",
    "best_first",
    "checkpoint_names",
    "empty_rows",
    "fetch",
    "norms_by_checkpoint",
    "plain_rows",
    "raw_rows",
    "settle",
    "stream",
    "unit_scores",
]

_DIGITS = 12
"""Decimal digits that float64 sums of a few thousand products keep; equal rows agree in them wherever they lie."""


def checkpoint_names(store: RowStore) -> tuple[Any, ...]:
    """Names of the checkpoints that the parts of a row were taken at, in order; (None,) for a store of one."""
    return tuple(dict.fromkeys(part.get("checkpoint") for part in parts_of(store).table))


def stream(store: RowStore, method: str) -> Iterator[tuple[int, Tensor]]:
    """All rows once: first row and float64 (m, checkpoints, dim), summed over groups and timesteps.

    Raises:
        StoreError: the store keeps codes only, or a row is not finite.
    """
    parts = parts_of(store)
    for start, block in blocks_of(store, method):
        rows = parts.by_checkpoint(block.to(torch.float64))
        broken = (~torch.isfinite(rows)).flatten(1).any(dim=1)
        if bool(broken.any()):
            row = start + int(broken.nonzero()[0])
            raise StoreError(f"row {row} (id {store.ids[row]!r}) is not finite, expected numbers: extract it again")
        yield start, rows


def raw_rows(store: RowStore, rows: np.ndarray) -> Tensor:
    """These rows in this order, as the store holds them; read by one pass where there is no other way."""
    features = getattr(store, "features", None)
    if features is not None:
        return torch.from_numpy(np.asarray(features[rows]))
    order = np.argsort(rows, kind="stable")
    found: list[Tensor] = []
    for start, block in blocks_of(store, "select"):
        first, last = np.searchsorted(rows[order], (start, start + len(block)))
        found.append(block[torch.from_numpy(rows[order[first:last]] - start)])
    return torch.cat(found)[torch.from_numpy(np.argsort(order, kind="stable"))]


def fetch(store: RowStore, rows: np.ndarray) -> Tensor:
    """These rows in this order, float64 (m, checkpoints, dim)."""
    return parts_of(store).by_checkpoint(raw_rows(store, rows).to(torch.float64))


def empty_rows(store: RowStore) -> np.ndarray:
    """Rows without any gradient, bool (n,): nothing of theirs carries loss, so no method may rank them."""
    return np.asarray((np.asarray(store.grad_norm).reshape(len(store), -1) == 0).all(axis=1))


def allowed_rows(store: RowStore) -> np.ndarray:
    """Numbers of the rows that have a gradient, int64; at least one."""
    allowed = np.flatnonzero(~empty_rows(store))
    if not len(allowed):
        raise DataError(f"no row of {name(store)} has a gradient: look at the loss it was extracted with")
    return allowed


def plain_rows(store: RowStore, method: str) -> None:
    """Refuse rows after Adam for a method that mixes them with plain gradients."""
    adam = getattr(store, "metadata", {}).get("preconditioner")
    if adam:
        raise SpecError(
            f"{name(store)} holds gradients after {str(adam.get('kind', adam)).capitalize()}, which {method!r} would "
            "mix with the targets' plain ones: extract without Adam moments"
        )


def norms_by_checkpoint(store: RowStore) -> np.ndarray | None:
    """Exact norms of the gradient at each checkpoint, float64 (n, checkpoints); None where they are not known."""
    parts = parts_of(store)
    if parts.units != parts.checkpoints:
        return None
    norms = parts.unit_norms(np.asarray(store.grad_norm))
    return None if np.isnan(norms).any() else norms


def settle(scores: Any) -> np.ndarray:
    """Float64 scores cut to the digits that are sure, so that equal rows tie whatever block they were read in."""
    values = np.asarray(scores, dtype=np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(values).max(initial=0.0) or 1.0))
    return np.asarray(np.round(values / scale, _DIGITS) * scale)


def unit_scores(cosines: Tensor) -> np.ndarray:
    """As ``settle``, for numbers in [-1, 1], whichever of them are in the block."""
    return np.asarray(np.round(cosines.numpy(), _DIGITS))


def best_first(scores: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Places by score descending, then row ascending."""
    rows = np.arange(len(scores)) if rows is None else rows
    return np.lexsort((rows, -scores))
