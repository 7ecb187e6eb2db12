"""Self-influence: what training on an example does to the example itself, without any query."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.protocol import Queries, Rows
from gradsift.engine.scorers.stores import known_norms, name
from gradsift.kernels.errors import StoreError

__all__ = ["FisherSelf", "SelfInfluence"]


class SelfInfluence:
    """``|g_i|^2`` from the exact norms; over several checkpoints the sum, each times its learning rate.

    High for mislabelled and unusual examples. Squares of groups and timesteps are added up: exact for groups; timesteps
    count each for itself, since the norm of their sum is not stored.
    """

    about = Method(
        name="self",
        formula="sum_c eta_c |g_i^c|^2, exact norms; one checkpoint: |g_i|^2",
        needs="exact norms; no queries",
        cost="no pass, O(n)",
        source="TracIn, arXiv 2002.08484",
        published="none found as a number; AUC .994 for 10 % flipped labels in our softmax regression",
    )
    needs_queries: ClassVar[bool] = False
    reads_features: ClassVar[bool] = False

    _weights: Tensor

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``.

        Raises:
            StoreError: a norm is not known, or one of several checkpoints has no learning rate.
        """
        known_norms(store, "a self-influence squares: extract the store with one backward pass per example")
        parts = parts_of(store)
        self._weights = torch.ones(len(parts), dtype=torch.float64)
        if parts.checkpoints > 1:
            if parts.rates is None:
                raise StoreError(
                    f"{name(store)} holds checkpoints without learning rates, by which 'self' weighs them: extract it "
                    "with Checkpoint(..., learning_rate=...)"
                )
            self._weights = parts.rates[parts.checkpoint]

    def score(self, queries: Queries | None, rows: Rows) -> Tensor:
        """Float64 (1, m)."""
        squares = rows.norms.to(torch.float64).reshape(len(rows.norms), -1) ** 2
        return (squares @ self._weights)[None]


class FisherSelf:
    """``phi_i' (F + lambda I)^-1 phi_i``, F the true Fisher of the store's curvature sample; the mean over checkpoints.

    Args:
        damping: k of ``Fisher``.
    """

    about = Method(
        name="self_fisher",
        formula="phi_i' (F + lambda I)^-1 phi_i, F and lambda as of fisher",
        needs="a curvature sample; no queries",
        cost="1 pass, O(n N dim)",
        source="self-influence of LogIX's kind (logix-project/logix) with our sampled Fisher",
        published="AUC .995 for 10 % flipped labels in our softmax regression",
    )
    needs_queries: ClassVar[bool] = False

    _parts: Parts
    _fishers: list[Fisher]

    def __init__(self, damping: float = 1.0) -> None:
        self._damping = damping

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``.

        Raises:
            StoreError: it holds no curvature sample.
        """
        rows = getattr(store, "curvature", None)
        if rows is None or not len(rows):
            raise StoreError(
                f"{name(store)} holds no curvature sample, which 'self_fisher' needs: extract it with curvature=2000, "
                "or use scorer='self'"
            )
        self._parts = parts_of(store)
        each = self._parts.by_checkpoint(rows)
        self._fishers = [Fisher(each[:, c], self._damping, len(store)) for c in range(each.shape[1])]

    def score(self, queries: Queries | None, rows: Rows) -> Tensor:
        """Float64 (1, m)."""
        at = self._parts.by_checkpoint(rows.values).to(torch.float64)
        each = [(at[:, c] * fisher.solve(at[:, c])).sum(dim=1) for c, fisher in enumerate(self._fishers)]
        return torch.stack(each).mean(dim=0, keepdim=True)
