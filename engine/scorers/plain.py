"""Scorers without curvature: inner products, and cosines by exact norms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.protocol import LinearScorer, Queries
from gradsift.engine.scorers.stores import inverse, known_norms, name
from gradsift.kernels.errors import StoreError

__all__ = ["Cosine", "Dot"]


class Dot(LinearScorer):
    """Inner products of gradients, summed over groups and timesteps.

    Over several checkpoints: the sum of theirs, each times its learning rate (TracInCP).
    """

    about = Method(
        name="dot",
        formula="sum_c eta_c <phi_i^c, phi_j^c>; one checkpoint: <phi_i, phi_j>",
        needs="nothing more",
        cost="1 pass, O(q dim)",
        source="TracIn, arXiv 2002.08484",
        published="LDS .12 with GPT-2 on WikiText-2 (kronfluence's README, identity)",
    )

    _parts: Parts

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``.

        Raises:
            StoreError: one of several checkpoints has no learning rate.
        """
        self._parts = parts_of(store)
        if self._parts.checkpoints > 1 and self._parts.rates is None:
            raise StoreError(
                f"{name(store)} holds checkpoints without learning rates, by which 'dot' weighs them: extract it with "
                "Checkpoint(..., learning_rate=...)"
            )

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``."""
        total = self._parts.by_checkpoint(queries.values)
        rates = self._parts.rates
        if self._parts.checkpoints > 1 and rates is not None:
            total = total * rates[:, None]
        return self._parts.spread(total, self._parts.checkpoint)

    @property
    def decidable(self) -> bool:
        """With one checkpoint."""
        return self._parts.checkpoints == 1


class Cosine(LinearScorer):
    """Inner products divided by both exact norms.

    Where rows hold several timesteps or checkpoints, the mean over these of their cosines: none outweighs another.
    """

    about = Method(
        name="cosine",
        formula="<phi_i, phi_j> / (|g_i| |g_j|), |g| the exact norms; the mean over timesteps and checkpoints",
        needs="exact norms",
        cost="1 pass, O(q dim)",
        source="grad-cos of D-TRAK's notebooks, arXiv 2311.00500",
        published="LDS .156 with GPT-2 on WikiText (bergson's leaderboard)",
    )

    _parts: Parts
    _shares: int
    """What the sum of cosines is divided by."""
    _inverse: np.ndarray

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``.

        Raises:
            StoreError: a row's exact norm is not known.
        """
        self._parts = parts_of(store)
        self._shares = self._parts.units
        self._inverse = inverse(self._parts.unit_norms(known_norms(store, "a cosine divides by: use scorer='dot'")))

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``."""
        parts = self._parts
        lengths = parts.unit_norms(queries.norms.numpy()) * self._shares
        return parts.spread(parts.by_unit(queries.values) * torch.from_numpy(inverse(lengths))[..., None], parts.unit)

    def weights(self) -> np.ndarray:
        """As of ``LinearScorer``."""
        return self._inverse[:, 0] if self._parts.units == 1 else self._inverse[:, self._parts.unit.numpy()]

    @property
    def decidable(self) -> bool:
        """With one checkpoint."""
        return self._parts.checkpoints == 1

    def exact_weights(self, queries: Queries, query: int, rows: np.ndarray, length: np.ndarray | None) -> np.ndarray:
        """As of ``LinearScorer``; the vector's own length is preferred: the mean of a set only has it exactly."""
        own = self._parts.unit_norms(queries.norms[query : query + 1].numpy())[0] if length is None else length
        weight = self._inverse[rows] * inverse(own * self._shares)
        return np.asarray(weight[:, 0] if self._parts.units == 1 else weight)
