"""Rows of another store, coded along the axes that a compacted store already has."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from gradsift.engine.compaction.axes import Axes
from gradsift.engine.compaction.measure import Coding
from gradsift.engine.compaction.units import units_of
from gradsift.engine.compaction.write import write_more
from gradsift.engine.store.format import difference
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import StoreError

__all__ = ["append_rows"]

logger = logging.getLogger(__name__)

_SHORT = 0.9
"""A share of what the axes hold of held-out rows, below which they hold too little of new ones."""

_FREE = ("block", "dtype", "curvature", "compacted")
"""What a store may have of its own."""


def append_rows(path: Path, description: dict[str, Any], axes: Axes, ids: Any, store: FeatureStore) -> float:
    """Code the rows of ``store`` and write them behind those at ``path``; arguments as of ``CompactStore``.

    Returns:
        the share of the new rows' squared length that lies outside the axes.

    Raises:
        StoreError: the stores do not fit, or an id is there already.
    """
    about = description["compacted"]
    if store.metadata.get("compacted") or not store.complete:
        state = "compacted" if store.metadata.get("compacted") else "unfinished"
        raise StoreError(f"'{store.path}' is {state}, expected a finished store of whole rows: give one")
    what = difference(description, {**store.metadata, **{key: description.get(key) for key in _FREE}})
    if what is not None:
        raise StoreError(f"rows of '{store.path}' do not fit '{path}': {what}; extract them as the others were")
    known = set(ids)
    twice = next((example for example in store.ids if example in known), None)
    if twice is not None:
        raise StoreError(f"id {twice!r} of '{store.path}' is in '{path}' already: append examples that are new")
    if not len(store):
        return 0.0
    outside = _outside(store, axes)
    held = float(about["outside"])
    if 1 - outside < _SHORT * (1 - held):
        logger.warning(
            "%.0f %% of the length of the rows of %s lies outside the axes of %s, of its own held-out rows %.0f %%: "
            "they will be found less often than its recall says; compact all rows anew",
            100 * outside,
            store.path,
            path,
            100 * held,
        )
    added = {"source": str(Path(store.path).resolve()), "rows": len(store), "outside": outside}
    fresh = {**description, "compacted": {**about, "appended": [*about.get("appended", []), added]}}
    write_more(path, store, units_of(store), Coding(axes, about["bits"], about["bytes"]), fresh)
    return outside


def _outside(store: FeatureStore, axes: Axes) -> float:
    """The share of all rows' squared length that the axes do not hold."""
    units = units_of(store)
    rest = whole = 0.0
    for _, block in store.blocks():
        rows = units.fold(block).flatten(1)
        length = float(torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2)
        rest, whole = rest + axes.outside(rows) * length, whole + length
    return rest / whole if whole > 0 else 0.0
