"""K-means clusters of a store's rows by direction."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.extras import require
from gradsift.engine.selectors.rows import allowed_rows, fetch, stream
from gradsift.kernels.errors import SpecError

__all__ = ["clusters_of"]

_SAMPLE, _LEAST, _MOST = 32, 2, 16384
"""Rows per cluster that the centres are fitted to, at most and at least; and rows in all, where at least allows it."""


def clusters_of(store: RowStore, count: int, seed: int) -> tuple[tuple[int, ...], np.ndarray]:
    """Clusters of unit rows: k-means++ and Lloyd on a sample by scikit-learn, then one pass that assigns all rows.

    Args:
        count: clusters, at most as many as rows with a gradient; empty ones are left out.
        seed: of the sample and of the first centres.

    Returns:
        the clusters' numbers, and int64 (n,) each row's place among them; rows without gradient go to the first.
    """
    allowed = allowed_rows(store)
    if not 2 <= count <= len(allowed):
        raise SpecError(f"groups is {count} clusters, expected 2 to {len(allowed)}, the rows that have a gradient")
    draw = np.random.default_rng(seed)
    sample = np.sort(draw.permutation(allowed)[: max(_LEAST * count, min(_SAMPLE * count, _MOST))])
    units = [_unit(fetch(store, part)).astype(np.float32) for part in np.array_split(sample, -(-len(sample) // 1024))]
    fitted = require("sklearn.cluster").KMeans(count, n_init=1, random_state=seed).fit(np.concatenate(units))
    centres = torch.from_numpy(fitted.cluster_centers_).to(torch.float64)
    halves = centres.square().sum(dim=1) / 2
    index = np.zeros(len(store), dtype=np.int64)
    for start, rows in stream(store, "groups"):
        nearest = (torch.from_numpy(_unit(rows)) @ centres.T - halves).argmax(dim=1)
        index[start : start + len(rows)] = nearest.numpy()
    numbers, places = np.unique(index, return_inverse=True)
    return tuple(numbers.tolist()), places.astype(np.int64)


def _unit(rows: Tensor) -> np.ndarray:
    """Directions of rows (m, checkpoints, dim), float64 (m, checkpoints * dim)."""
    return np.asarray(torch.nn.functional.normalize(rows.flatten(1), dim=1).numpy())
