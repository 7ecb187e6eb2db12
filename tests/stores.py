"""A store in memory, cut into blocks of any size, for tests of retrieval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradsift as gs
from gradsift.engine.capture.features import Features, TableRow

TABLE = (TableRow("layer.weight", (4, 16)),)


class MemoryStore:
    """What ``topk`` needs of a ``FeatureStore``."""

    def __init__(
        self,
        rows: Tensor,
        block: int = 7,
        norms: Tensor | None = None,
        curvature: Tensor | None = None,
        **attributes: Any,
    ) -> None:
        self.rows, self.block, self.curvature = rows, block, curvature
        self.ids = [f"example {i}" for i in range(len(rows))]
        self.grad_norm = (rows.norm(dim=-1) if norms is None else norms).numpy()
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.rows), self.block):
            yield start, self.rows[start : start + self.block]


def random_rows(n: int, dim: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def features(values: Tensor, spec: gs.SketchSpec, table: Any = TABLE, loss_kind: str | None = None) -> Features:
    return Features(values, torch.zeros(len(values)), values.norm(dim=-1), spec, table, loss_kind)


def dense_order(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows by score descending, then row ascending: (q, n) -> (q, k)."""
    return np.stack([np.lexsort((np.arange(len(row)), -row))[:k] for row in scores])
