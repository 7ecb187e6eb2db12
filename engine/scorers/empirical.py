"""TRAK and D-TRAK: features of a model's output, after the damped second moment of the training set's own features."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.moment import second_moment
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.protocol import LinearScorer, Queries
from gradsift.engine.scorers.stores import blocks_of, losses, name
from gradsift.kernels.errors import ShapeError, SpecError, StoreError

__all__ = ["DTrak", "Trak"]

logger = logging.getLogger(__name__)

_FLOOR = 1e-6
"""Of 1 - p: where the model is surer than that, a margin's gradient is the loss's over next to nothing."""

_ROWS_PER_DIM = 4
"""Rows that a moment without damping needs for each of its dimensions."""


class _Outputs(NamedTuple):
    """What makes features of an output from the store's rows: multipliers, None where they are 1.

    Attributes:
        scale: float64 (n, checkpoints), of the feature.
        importance: float64 (n,), Q: how much of the output's gradient training on the row would feel.
    """

    scale: np.ndarray | None = None
    importance: np.ndarray | None = None


class _Damped(LinearScorer):
    """``mean over checkpoints of phi_j' (Phi'Phi + lambda I)^-1 phi_i``, times what training feels of row i.

    ``lambda = damping * mean |phi|^2``, from exact norms where they are known.

    Args:
        damping: k of that law; 0 for the plain moment, which many more rows than dimensions must span.
    """

    _parts: Parts
    _outputs: _Outputs
    _factors: list[Tensor]

    def __init__(self, damping: float = 1.0) -> None:
        if not damping >= 0:
            raise SpecError(f"damping is {damping}, expected 0 or a multiple of the mean squared norm such as 1")
        self._relative = damping

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``; one pass for each checkpoint, for the moment of its features.

        Raises:
            StoreError: it does not hold what the output's features are made from, or all of them are zero.
            SpecError: the moment cannot be inverted without damping.
        """
        self._parts = parts_of(store)
        self._outputs = self._features(store)
        self._factors = [self._factor(store, c) for c in range(self._parts.checkpoints)]

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``."""
        at, count = self._parts.by_checkpoint(queries.values), self._parts.checkpoints
        scale = self._scale(queries)
        if scale is not None:
            at = at * scale[..., None]
        solved = [torch.cholesky_solve(at[:, c].T, factor).T for c, factor in enumerate(self._factors)]
        return self._parts.spread(torch.stack(solved, dim=1) / count, self._parts.checkpoint)

    def weights(self) -> np.ndarray | None:
        """As of ``LinearScorer``."""
        scale, importance = self._outputs
        if scale is None:
            return importance
        weights = scale if importance is None else scale * importance[:, None]
        return weights[:, 0] if len(self._parts) == 1 else weights[:, self._parts.checkpoint.numpy()]

    def _features(self, store: RowStore) -> _Outputs:
        """What makes features of the rows."""
        return _Outputs()

    def _scale(self, queries: Queries) -> Tensor | None:
        """What makes features of the queries' gradients, float64 (q, checkpoints)."""
        return None

    def _factor(self, store: RowStore, checkpoint: int) -> Tensor:
        """Cholesky factor of the damped moment of one checkpoint's features."""
        moment, count = second_moment(self._blocks(store, checkpoint))
        dim = len(moment)
        if self._relative == 0 and count < _ROWS_PER_DIM * dim:
            raise SpecError(
                f"damping is 0 with {count} rows of dim {dim}, expected {_ROWS_PER_DIM * dim} rows or more: leave "
                "damping out, or give such as 1"
            )
        trace = self._mean_square(store, checkpoint, float(moment.trace()) / count)
        if not trace > 0:
            raise StoreError(f"every row of {name(store)} is zero, so nothing can be ranked: extract it again")
        moment.diagonal().add_(self._relative * trace)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(moment)
        if int(failed):
            raise SpecError(
                f"the moment of {count} rows cannot be inverted with damping {self._relative}: give a larger one, such "
                "as 1"
            )
        return factor

    def _blocks(self, store: RowStore, checkpoint: int) -> Iterator[Tensor]:
        for first, block in blocks_of(store, self.name):
            values = self._parts.by_checkpoint(block)[:, checkpoint].to(torch.float64)
            if self._outputs.scale is not None:
                scale = self._outputs.scale[first : first + len(block), checkpoint]
                values = values * torch.from_numpy(scale)[:, None]
            yield values

    def _mean_square(self, store: RowStore, checkpoint: int, sketched: float) -> float:
        """Mean squared norm of a checkpoint's features: exact where the norm of a sum of parts can be known."""
        parts = self._parts
        if parts.units > parts.checkpoints:
            return sketched
        squares = parts.unit_norms(np.asarray(store.grad_norm))[:, checkpoint] ** 2
        if self._outputs.scale is not None:
            squares = squares * self._outputs.scale[:, checkpoint] ** 2
        mean = float(squares.mean())
        return sketched if np.isnan(mean) else mean


class Trak(_Damped):
    """TRAK without its projection: features of the margin ``log(p / (1 - p))``, ``Q_i = mean_c (1 - p_i)``.

    Rows of the loss "classification" become margin features by ``-row / (1 - p)``, ``p = exp(-loss)``; those of
    "margin" are margin features. For any other loss, such as a language model's, the output is the loss itself and Q
    is 1.
    """

    about = Method(
        name="trak",
        formula="mean_c phi_j^c' (Phi_c'Phi_c + lambda I)^-1 phi_i^c * mean_c (1 - p_i^c), phi of the margin, "
        "lambda = k mean |phi|^2, k = 1",
        needs="nothing more; better with several checkpoints, of models trained independently",
        cost="C + 1 passes, O(n dim^2), C dim^2 numbers",
        source="TRAK, arXiv 2303.14186 (MadryLab/trak); for language models our reading: output = loss, Q = 1",
        published="LDS .093 on CIFAR-10, one of its notebooks; .138 with 8 GPT-2 (bergson's leaderboard)",
    )

    _kind: Any

    def _features(self, store: RowStore) -> _Outputs:
        self._kind = getattr(store, "metadata", {}).get("loss", {}).get("kind")
        if self._kind not in ("classification", "margin"):
            return _Outputs()
        loss = losses(store)
        if loss is None or loss.shape[1] != self._parts.checkpoints:
            raise StoreError(
                f"{name(store)} holds {0 if loss is None else loss.shape[1]} losses per example but 'trak' needs that "
                f"of each of its {self._parts.checkpoints} checkpoints: extract it again"
            )
        if self._kind == "margin":
            return _Outputs(None, _doubt(loss, self._kind).mean(axis=1))
        doubt = _doubt(loss, self._kind)
        sure = int((doubt < _FLOOR).any(axis=1).sum())
        if sure:
            logger.warning(
                "%d of %d rows have 1 - p below %g, which is taken for it: their margin's gradient is rounding",
                sure,
                len(store),
                _FLOOR,
            )
        doubt = np.maximum(doubt, _FLOOR)
        return _Outputs(-1 / doubt, doubt.mean(axis=1))

    def _scale(self, queries: Queries) -> Tensor | None:
        if self._kind != "classification":
            return None
        if queries.loss is None:
            raise ShapeError(
                "the queries have no loss, from which 'trak' makes features of the margin: give features of a capture, "
                "not a tensor"
            )
        loss = queries.loss.numpy().reshape(len(queries.values), -1)
        return torch.from_numpy(-1 / np.maximum(_doubt(loss, self._kind), _FLOOR))


class DTrak(_Damped):
    """D-TRAK: TRAK for diffusion models with the mean squared prediction as the output, and no Q."""

    about = Method(
        name="dtrak",
        formula="phi_j' (Phi'Phi + lambda I)^-1 phi_i, phi of the mean squared prediction, lambda = k mean |phi|^2",
        needs="rows of Diffusion(..., measure='squared_prediction')",
        cost="2 passes, O(n dim^2), dim^2 numbers",
        source="D-TRAK, arXiv 2311.00500 (sail-sg/D-TRAK)",
        published="LDS .272 / .342 on CIFAR-2 validation, 10 / 100 timesteps, best of 27 lambdas by LDS itself",
    )

    def _features(self, store: RowStore) -> _Outputs:
        loss = getattr(store, "metadata", {}).get("loss", {})
        measure = (loss.get("settings") or {}).get("measure")
        if measure != "squared_prediction":
            raise StoreError(
                f"{name(store)} holds gradients of {measure or loss.get('kind') or 'another loss'!r} but 'dtrak' needs "
                "those of the squared prediction: extract it with losses.Diffusion(..., measure='squared_prediction')"
            )
        return _Outputs()


def _doubt(loss: np.ndarray, kind: str) -> np.ndarray:
    """1 - p, from -log p or from the negative margin."""
    return -np.expm1(-loss) if kind == "classification" else torch.from_numpy(loss).sigmoid().numpy()
