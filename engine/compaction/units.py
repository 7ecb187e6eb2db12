"""What a compacted row is made of: the parts of a row that are one gradient are summed, checkpoints stay apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.stores import name
from gradsift.kernels.errors import StoreError

__all__ = ["Units", "units_of"]

_ALIKE = 1e-9
"""Relative difference below which numbers are taken for equal: they were computed in another order."""


@dataclass(frozen=True, slots=True)
class Units:
    """The checkpoints of a store's rows.

    Attributes:
        parts: the axis of parts.
        name: of the store, for what is said of it.
    """

    parts: Parts
    name: str

    @property
    def count(self) -> int:
        """How many checkpoints."""
        return self.parts.checkpoints

    def fold(self, rows: Tensor) -> Tensor:
        """(m, checkpoints, dim) from (m, dim), or (m, parts, dim)."""
        return self.parts.by_checkpoint(rows)

    def queries(self, directions: Tensor, weights: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        """The same question of rows whose parts were summed.

        Args:
            directions: float64 (q, dim), or (q, parts, dim).
            weights: as of ``scan``.

        Returns:
            float64 (q, checkpoints * dim), and weights (n,) or None.

        Raises:
            StoreError: it asks for parts that are no longer apart.
        """
        whole = weights
        if weights is not None and weights.ndim == 2:
            whole, shares = self._one_weight(weights)
            directions = directions * torch.from_numpy(shares)[:, None]
        if directions.ndim == 2:
            return directions, whole
        owner = self.parts.checkpoint
        first = torch.stack([(owner == c).nonzero()[0, 0] for c in range(self.count)])
        kept = directions[:, first]
        apart = (kept[:, owner] - directions).abs().amax(dim=(1, 2))
        if bool((apart > _ALIKE * directions.abs().amax(dim=(1, 2))).any()):
            raise StoreError(self._refusal("has a direction for each timestep or group"))
        return kept.flatten(1), whole

    def _one_weight(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) and (parts,) whose products are the weights: learning rates are such, norms of checkpoints are not."""
        row = int(np.abs(weights).sum(axis=1).argmax())
        pivot = int(np.abs(weights[row]).argmax())
        if weights[row, pivot] == 0:
            return weights[:, 0], np.ones(weights.shape[1])
        shares = weights[row] / weights[row, pivot]
        whole = weights[:, pivot]
        apart = np.abs(whole[:, None] * shares - weights).max(axis=1)
        if (apart > _ALIKE * np.abs(weights).max(axis=1)).any():
            raise StoreError(self._refusal("weighs the parts of each row by its own norms"))
        return whole, shares

    def _refusal(self, what: str) -> str:
        return (
            f"{self.name} is compacted, or to be so, with the parts of a row summed, and this scorer {what}: "
            "use scorer='fisher' or 'dot', or ask the store of whole rows"
        )


def units_of(store: RowStore) -> Units:
    """The checkpoints of a store, from its table of parts."""
    return Units(parts_of(store), name(store))
