"""The default scorer: inner products after the damped true Fisher of the store's curvature sample."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.plain import Dot
from gradsift.engine.scorers.protocol import LinearScorer, Queries
from gradsift.engine.scorers.stores import name
from gradsift.kernels.errors import SpecError

__all__ = ["TrueFisher"]

logger = logging.getLogger(__name__)


class TrueFisher(LinearScorer):
    """``phi_j' (F + lambda I)^-1 phi_i``, F from gradients of labels sampled from the model.

    Without a curvature sample it scores plain inner products, says so and calls itself "dot". Over several checkpoints
    it is the mean of theirs, each with its own Fisher.

    Args:
        damping: k of ``Fisher``.
        fitted: a ``Fisher`` to use again, instead of fitting one to the store's sample.
    """

    about = Method(
        name="fisher",
        formula="phi_j' (F + lambda I)^-1 phi_i, F = R'R/N of sampled labels, lambda = k trace(F)/m, k = 1",
        needs="a curvature sample (extract with curvature=2000)",
        cost="1 pass, O(N dim + min(N, dim)^2)",
        source="our own reading of damped Fisher influence with a sampled Fisher; EK-FAC (arXiv 2308.03296) is its kin",
        published="none found for sketches; EK-FAC with GPT-2 on WikiText: LDS .454 (bergson's leaderboard)",
    )

    _parts: Parts

    def __init__(self, damping: float = 1.0, fitted: Fisher | None = None) -> None:
        self._damping, self._fitted = damping, fitted
        self._fishers: list[Fisher] = []
        self._plain: Dot | None = None

    @property
    def name(self) -> str:
        """ "fisher"; "dot" when the prepared store holds no curvature sample."""
        return "fisher" if self._plain is None else "dot"

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``.

        Raises:
            SpecError: a fitted Fisher is given for a store of several checkpoints.
            ShapeError: as of ``Fisher``.
        """
        self._parts = parts = parts_of(store)
        self._plain = None
        if self._fitted is not None:
            if parts.checkpoints > 1:
                raise SpecError(
                    f"{name(store)} holds {parts.checkpoints} checkpoints but one fitted Fisher was given: "
                    "use scorer='fisher', which fits one to each"
                )
            self._fishers = [self._fitted]
            return
        rows = getattr(store, "curvature", None)
        if rows is None or not len(rows):
            logger.warning(
                "%s holds no curvature sample, so scores are plain inner products (scorer 'dot'): "
                "extract with curvature=2000 for 'fisher'",
                name(store),
            )
            self._plain = Dot()
            self._plain.prepare(store)
            return
        each = parts.by_checkpoint(rows)
        self._fishers = [Fisher(each[:, c], self._damping, len(store)) for c in range(parts.checkpoints)]

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``."""
        if self._plain is not None:
            return self._plain.directions(queries)
        parts = self._parts
        total = parts.by_checkpoint(queries.values)
        if self._fishers[0].dim != total.shape[2]:
            raise SpecError(
                f"the Fisher has dim {self._fishers[0].dim} but the queries have dim {total.shape[2]}: "
                "fit it to this store"
            )
        total = torch.stack([fisher.solve(total[:, c]) for c, fisher in enumerate(self._fishers)], dim=1)
        return parts.spread(total / parts.checkpoints, parts.checkpoint)

    @property
    def decidable(self) -> bool:
        """With one checkpoint, along vectors that were corrected."""
        return self._parts.checkpoints == 1
