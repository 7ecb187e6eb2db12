"""The exact, curvature-corrected vector of a query: the store's curvature sample, drawn once more from its seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradsift.bindings.space import Space
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.curvature.precondition import precondition
from gradsift.engine.store.ids import seed_of
from gradsift.kernels.errors import DataError

__all__ = ["CurvatureSample"]

_AT_ONCE = 8
"""Examples in a batch."""

_STEPS = 3
"""Of conjugate gradients; after three of them, scores rank as in the limit (.999)."""


class CurvatureSample:
    """Examples of a store's curvature rows with the labels that were drawn for them, in the rows' order.

    Args:
        space: the store with its model and data.
        rows: how many rows to use at most, spread evenly over the sample; all unless given.

    Raises:
        DataError: the store holds none.
    """

    def __init__(self, space: Space, rows: int | None = None) -> None:
        sample, draws = space.store.curvature, space.store.curvature_draws
        if sample is None:
            raise DataError(f"'{space.store.path}' holds no curvature sample: extract with --curvature 2000")
        chosen = np.linspace(0, len(sample) - 1, min(rows or len(sample), len(sample))).round().astype(int)
        self._space = space
        self._fisher = Fisher(sample[chosen], examples=len(space.store))
        self._batches = [
            self._drawn([draws[row] for row in chosen[start : start + _AT_ONCE].tolist()])
            for start in range(0, len(chosen), _AT_ONCE)
        ]

    def __len__(self) -> int:
        return len(self._fisher.rows)

    @property
    def passes(self) -> int:
        """Batches that one query goes through, at most."""
        return (1 + 2 * _STEPS) * len(self._batches)

    @property
    def batches(self) -> list[Mapping[str, Any]]:
        """Padded batches whose labels are the drawn ones."""
        return list(self._batches)

    def _drawn(self, draws: Sequence[tuple[str | int, int]]) -> Mapping[str, Any]:
        space = self._space
        batch = space.data.fetch(space.data.find([name for name, _ in draws]))
        seeds = [seed_of(space.store.spec.seed, name, draw) for name, draw in draws]
        return space.summed.sampled_batch(space.model, batch, seeds)

    def correct(self, v: Mapping[str, Tensor], advance: Callable[[], None]) -> dict[str, Tensor]:
        """``(F + lambda I)^-1 v`` with the unsketched Fisher of this sample; ``advance`` is called after each batch."""
        return precondition(
            self._space.model,
            v,
            _Counted(self._batches, advance),
            self._space.summed,
            self._fisher,
            steps=_STEPS,
            modules=self._space.modules,
        )


class _Counted:
    """Batches that tell when they have been used."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], advance: Callable[[], None]) -> None:
        self._batches, self._advance = batches, advance

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._batches:
            yield batch
            self._advance()
