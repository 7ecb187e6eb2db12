"""What a scorer is: a class of two methods, prepared once on a store, then asked for scores of queries and rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method

__all__ = ["LinearScorer", "Queries", "Rows", "Scorer", "name_of", "product"]


class Queries(NamedTuple):
    """Queries that were compared with the store and fit it.

    Attributes:
        values: float64 (q, dim), or (q, parts, dim) for a store of several parts.
        norms: float64 (q,), or (q, parts): exact norms of the gradients; where not known, those of the values.
        loss: float64 (q,), or (q, checkpoints); None when not known.
    """

    values: Tensor
    norms: Tensor
    loss: Tensor | None = None

    def mean(self) -> Queries:
        """One query instead of q: the mean of their gradients, with the norm of its sketch."""
        values = self.values.mean(dim=0, keepdim=True)
        return Queries(values, torch.linalg.vector_norm(values, dim=-1))


class Rows(NamedTuple):
    """Neighbouring rows of a store.

    Attributes:
        first: number of the first of them.
        values: float32 (m, dim), or (m, parts, dim).
        norms: float32 (m,), or (m, parts): exact gradient norms, NaN where not known.
        loss: float32 (m,); None when the store holds none.
    """

    first: int
    values: Tensor
    norms: Tensor
    loss: Tensor | None = None


class Scorer(Protocol):
    """A way to compare rows with queries; ``topk`` and ``select`` take an instance.

    Attributes that are read where they are there:
        about: a ``Method`` in words; its name stands in results, else the class's name.
        accepts_preconditioned: True when rows after Adam are what it wants; without it such a store is refused.
        needs_queries: False for scores of rows alone: ``topk(store, None, scorer=...)``.
        reads_features: False for a scorer of norms and losses alone: ``rows.values`` is then empty.
    """

    def prepare(self, store: RowStore) -> None:
        """Read what is needed of the store; refuse a store that does not fit, saying what to run.

        An instance that is used again on the same store is not prepared again.
        """

    def score(self, queries: Queries, rows: Rows) -> Tensor:
        """Scores of rows for queries, float64 (q, m): positive = training on the row lowers the query's loss."""


class LinearScorer(ABC):
    """A scorer whose scores are products: ``score = sum over parts p of weight[i, p] * <direction[j, p], row[i, p]>``.

    The exact streamed search serves it: its answers do not depend on how the store is cut into blocks.
    """

    about: ClassVar[Method]
    accepts_preconditioned: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What results call it."""
        return self.about.name

    @abstractmethod
    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``."""

    @abstractmethod
    def directions(self, queries: Queries) -> Tensor:
        """What rows are multiplied by, float64, shaped as ``queries.values``."""

    def weights(self) -> np.ndarray | None:
        """Multipliers of all rows, float64 (n,), or (n, parts), finite; None where all are 1."""
        return None

    @property
    def decidable(self) -> bool:
        """Whether exact inner products of gradients of one model, each times ``exact_weights``, are its scores."""
        return False

    def exact_weights(self, queries: Queries, query: int, rows: np.ndarray, length: np.ndarray | None) -> np.ndarray:
        """What exact inner products of these rows with one query's vector are multiplied by, if it is decidable.

        Args:
            length: of the vector: one number, or one per timestep; None when it was not told.

        Returns:
            float64 (m,), or (m, timesteps) for inner products of each timestep with its own vector.
        """
        return np.ones(len(rows))

    def score(self, queries: Queries, rows: Rows) -> Tensor:
        """As of ``Scorer``; works the directions out anew at each call, which ``stream_scores`` does once."""
        return product(self.directions(queries), self.weights(), rows)


def product(directions: Tensor, weights: np.ndarray | None, rows: Rows) -> Tensor:
    """Scores of a block, float64 (q, m), from the directions and the weights of all rows."""
    values = rows.values.to(torch.float64)
    if weights is not None:
        weight = torch.from_numpy(weights[rows.first : rows.first + len(values)])
        values = values * weight.reshape(*weight.shape, *[1] * (values.ndim - weight.ndim))
    return directions.flatten(1) @ values.flatten(1).T


def name_of(scorer: object) -> str:
    """What results call a scorer, or anything like it: its own name, else that of its class."""
    about = getattr(scorer, "about", None)
    return str(getattr(scorer, "name", None) or getattr(about, "name", None) or type(scorer).__name__)
