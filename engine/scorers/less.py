"""LESS: Adam's updates of training examples against gradients of targets, as unit vectors at several checkpoints."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.protocol import LinearScorer, Queries
from gradsift.engine.scorers.stores import blocks_of, inverse, name
from gradsift.kernels.errors import StoreError

__all__ = ["Less"]

logger = logging.getLogger(__name__)


class Less(LinearScorer):
    """``sum_c w_c <phi_i^c / |phi_i^c|, v_j^c / |v_j^c|>``, w_c the learning rates divided by their sum.

    Both vectors are normalised after the projection, as the authors do: by the length of the sketch, not of the
    gradient. A row that is zero at a checkpoint scores 0 there. Rows are to be Adam's updates and queries plain
    gradients, on purpose.
    """

    about = Method(
        name="less",
        formula="sum_c w_c <phi_i^c/|phi_i^c|, v_j^c/|v_j^c|>, w_c = eta_c / sum eta, phi Adam's update, v a gradient",
        needs="several checkpoints with learning rates and Adam moments; queries at the same checkpoints",
        cost="2 passes, O(n C)",
        source="LESS, arXiv 2402.04333 (princeton-nlp/LESS)",
        published="5 % selected often beats all data; 2 to 5 points over random (MMLU, TyDiQA, BBH)",
    )
    accepts_preconditioned = True

    _parts: Parts
    _rates: Tensor
    _inverse: np.ndarray

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``; one pass, for the lengths of the sketches.

        Raises:
            StoreError: it holds one checkpoint, or no learning rates.
        """
        self._parts = parts = parts_of(store)
        if parts.checkpoints < 2:
            raise StoreError(
                f"{name(store)} holds gradients at one checkpoint but 'less' sums over several of a warm-up: extract "
                "it with checkpoints=[Checkpoint(weights, learning_rate, adam), ...]"
            )
        if parts.rates is None or not float(parts.rates.sum()) > 0:
            raise StoreError(
                f"{name(store)} holds checkpoints without learning rates, by which 'less' weighs them: extract it with "
                "Checkpoint(..., learning_rate=...)"
            )
        self._rates = parts.rates / parts.rates.sum()
        if not getattr(store, "metadata", {}).get("preconditioner"):
            logger.warning(
                "%s holds plain gradients, so 'less' compares these instead of Adam's updates: extract it with "
                "Checkpoint(..., adam=adam_moments(...)) if the model is trained with Adam",
                name(store),
            )
        self._inverse = np.zeros((len(store), parts.checkpoints))
        for first, block in blocks_of(store, "less"):
            lengths = torch.linalg.vector_norm(parts.by_checkpoint(block.to(torch.float64)), dim=2)
            self._inverse[first : first + len(block)] = inverse(lengths.numpy())

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``."""
        at = self._parts.by_checkpoint(queries.values)
        lengths = torch.linalg.vector_norm(at, dim=2, keepdim=True)
        unit = torch.where(lengths > 0, at / lengths, 0.0)
        return self._parts.spread(unit * self._rates[:, None], self._parts.checkpoint)

    def weights(self) -> np.ndarray:
        """As of ``LinearScorer``."""
        return self._inverse[:, self._parts.checkpoint.numpy()]
