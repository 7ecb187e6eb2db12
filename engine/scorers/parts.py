"""What the parts of a store's rows are: shares of one gradient, or gradients at different checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.scorers.stores import name
from gradsift.kernels.errors import StoreError

__all__ = ["Parts", "parts_of"]

_NOT_OF_UNIT = ("dim", "group", "learning_rate", "norm")


@dataclass(frozen=True)
class Parts:
    """The axis of parts.

    Groups of parameters and timesteps of a loss are summands of one gradient; checkpoints are not. A unit is the
    gradient of one timestep at one checkpoint: its groups are parts of other parameters, so that their norms add up in
    squares. Norms of several timesteps do not tell the norm of their sum.

    Attributes:
        table: what each part is, as of ``FeatureStore.parts``; empty mappings where a store does not say.
        checkpoint: int64 (parts,), the number of each part's checkpoint.
        unit: int64 (parts,), the number of each part's unit.
    """

    table: tuple[Mapping[str, Any], ...]
    checkpoint: Tensor
    unit: Tensor

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def checkpoints(self) -> int:
        """How many checkpoints."""
        return int(self.checkpoint.max()) + 1

    @cached_property
    def units(self) -> int:
        """How many units."""
        return int(self.unit.max()) + 1

    @cached_property
    def groups(self) -> tuple[str | None, ...]:
        """The group of each part."""
        return tuple(part.get("group") for part in self.table)

    @cached_property
    def rates(self) -> Tensor | None:
        """Learning rate of each checkpoint, float64; None where one has none."""
        rates: dict[int, float | None] = {
            int(c): part.get("learning_rate") for c, part in zip(self.checkpoint, self.table, strict=True)
        }
        known = [float(rate) for rate in rates.values() if rate is not None]
        return torch.tensor(known, dtype=torch.float64) if len(known) == self.checkpoints else None

    def by_checkpoint(self, values: Tensor) -> Tensor:
        """Gradients (m, checkpoints, dim) from (m, dim), or (m, parts, dim), summed over groups and timesteps."""
        return _sum(values, self.checkpoint, self.checkpoints)

    def by_unit(self, values: Tensor) -> Tensor:
        """Gradients (m, units, dim) from (m, dim), or (m, parts, dim), summed over groups."""
        return _sum(values, self.unit, self.units)

    def unit_norms(self, norms: np.ndarray) -> np.ndarray:
        """Norms of the units, float64 (n, units), from exact ones (n,), or (n, parts)."""
        known = np.asarray(norms, dtype=np.float64).reshape(len(norms), -1)
        if self.units == len(self):
            return known
        squares = np.zeros((len(known), self.units))
        for part, unit in enumerate(self.unit.tolist()):
            squares[:, unit] += known[:, part] ** 2
        return np.asarray(np.sqrt(squares))

    def spread(self, values: Tensor, owner: Tensor) -> Tensor:
        """What belongs to each owner, given to all its parts: (m, owners, dim) -> (m, dim), or (m, parts, dim)."""
        return values[:, 0] if len(self) == 1 else values[:, owner]


def _sum(values: Tensor, owner: Tensor, owners: int) -> Tensor:
    if values.ndim == 2:
        return values[:, None]
    if owners == 1:
        return values.sum(dim=1, keepdim=True)
    if owners == values.shape[1]:
        return values
    out = torch.zeros(len(values), owners, values.shape[2], dtype=values.dtype)
    return out.index_add_(1, owner, values)


def parts_of(store: RowStore) -> Parts:
    """The parts of a store's rows; a store that does not say what they are holds timesteps at one checkpoint.

    Raises:
        StoreError: a store says so of another number of parts than it has.
    """
    norms = np.shape(store.grad_norm)
    count = norms[1] if len(norms) == 2 else 1
    table: Sequence[Mapping[str, Any]] = getattr(store, "parts", None) or [{}] * count
    if len(table) != count:
        raise StoreError(f"{name(store)} describes {len(table)} parts but has {count}: extract it again")
    checkpoints: dict[Any, int] = {}
    units: dict[Any, int] = {}
    checkpoint, unit = [], []
    for place, part in enumerate(table):
        checkpoint.append(checkpoints.setdefault(part.get("checkpoint"), len(checkpoints)))
        key = {key: str(value) for key, value in part.items() if key not in _NOT_OF_UNIT}
        own = place if part.get("group") is None else None  # nothing but groups make a unit of several parts
        unit.append(units.setdefault((own, *sorted(key.items())), len(units)))
    return Parts(tuple(table), torch.tensor(checkpoint), torch.tensor(unit))
