"""The true Fisher by exact gradients: scores for any damping and any number of drawn labels from one Gram matrix."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import ShapeError

__all__ = ["By", "ExactFisher"]

By = Literal["all", "layer", "number"]

_COLUMNS = 4096
"""Columns that are multiplied at a time; their float32 products are summed in float64."""

_LEAST = 1e-3
"""Mean squares below this share of their mean count as so much: a number without any gradient has no scale."""


class ExactFisher:
    """Scores ``g_j' (F + lambda I)^-1 g_i`` with ``F = R'R/N`` and ``lambda = k trace(F)/m``, as of ``Fisher``.

    By ``(F + lambda I)^-1 = (I - R'(RR' + N lambda I)^-1 R)/lambda`` only inner products are needed, so a sweep of k
    costs one factorisation each.

    Args:
        store: of kind "identity", with a curvature sample. queries: of the same gradients.
        by: what lambda is the same for: "all"; or it goes with the root mean square of the drawn gradients of each
            parameter ("layer") or of each number ("number"). That is the metric in which Adam moves: what it has not
            yet learned, it has not learned in that metric (our own reading of layer-wise damping).
    """

    def __init__(self, store: FeatureStore, queries: FeatureStore, by: By = "all") -> None:
        sample = store.curvature
        if sample is None:
            raise ShapeError(f"{store.path} holds no curvature sample: extract with curvature=2000")
        examples, asked = (torch.from_numpy(_matrix(s.features[:])) for s in (store, queries))
        rows = torch.from_numpy(_matrix(sample.numpy()))
        if by != "all":
            scale = _scale(store, rows, by)
            examples, asked, rows = examples * scale, asked * scale, rows * scale
        self._dot = _products(asked, examples)
        self._asked, self._known, self._gram = _products(asked, rows), _products(rows, examples), _products(rows, rows)
        self._examples = len(examples)
        self._draw = np.array([draw for _, draw in store.curvature_draws])
        self._self = torch.linalg.vector_norm(examples, dim=1, dtype=torch.float64) ** 2
        self._last: tuple[tuple[float, int], tuple[Tensor, float, Tensor]] | None = None

    @property
    def labels(self) -> int:
        """Labels drawn for each example, at most."""
        return int(self._draw.max()) + 1

    @property
    def dot(self) -> np.ndarray:
        """Plain inner products, (q, n)."""
        return np.asarray(self._dot)

    def scores(self, damping: float = 1.0, labels: int | None = None) -> np.ndarray:
        """Scores, float64 (q, n).

        Args:
            damping: k. labels: of the drawn ones, as many of each example.
        """
        solved, lam, keep = self._solved(damping, labels)
        return np.asarray((self._dot - self._asked[:, keep] @ solved) / lam)

    def own(self, damping: float = 1.0, labels: int | None = None) -> np.ndarray:
        """Each example's score for itself, float64 (n,); arguments as of ``scores``."""
        solved, lam, keep = self._solved(damping, labels)
        return np.asarray((self._self - (self._known[keep] * solved).sum(dim=0)) / lam)

    def _solved(self, damping: float, labels: int | None) -> tuple[Tensor, float, Tensor]:
        """``(RR' + N lambda I)^-1 R T'``, lambda, and which rows; the last answer is kept for ``own``."""
        asked = damping, self.labels if labels is None else labels
        if self._last is None or self._last[0] != asked:
            keep = torch.from_numpy(np.flatnonzero(self._draw < asked[1]))
            gram = self._gram[keep][:, keep]
            n = len(keep)
            lam = damping * float(gram.diagonal().mean()) / min(n, self._examples)
            gram.diagonal().add_(n * lam)
            solved = torch.cholesky_solve(self._known[keep], torch.linalg.cholesky(gram))
            self._last = asked, (solved, lam, keep)
        return self._last[1]


def _scale(store: FeatureStore, rows: Tensor, by: By) -> Tensor:
    """Multipliers of all numbers, (P,), after which an even damping is one that goes with root mean squares."""
    square = rows.square().mean(dim=0)
    if by == "layer":
        sizes = [math.prod(shape) for _, shape in store.spec.layout]
        square = torch.cat([part.mean().expand(size) for part, size in zip(square.split(sizes), sizes, strict=True)])
    scale: Tensor = (square / square.mean()).clamp_min(_LEAST) ** -0.25
    return scale


def _matrix(rows: np.ndarray) -> np.ndarray:
    """Parts are summands of one gradient."""
    return rows if rows.ndim == 2 else rows.sum(axis=1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of all rows of a with all of b, float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, a.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total += a[:, columns] @ b[:, columns].T
    return total
