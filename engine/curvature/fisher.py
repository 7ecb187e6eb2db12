"""The damped true Fisher inside the sketch: fitted to a sample of curvature rows, applied to queries only."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError

__all__ = ["Fisher"]


class Fisher:
    """``F + lambda I`` with ``F = R'R / N``, R the curvature rows: sketched gradients of labels drawn from the model.

    ``lambda = damping * trace(F) / m``, where ``trace(F)`` is the mean squared norm of the rows (a sketch keeps
    squared norms unbiased, and here many are averaged) and ``m`` is how many examples stand behind F: the rows, or
    the examples of the store where these are fewer (several labels drawn per example). For a Fisher made of all n
    examples this is ``R'R + damping * mean|r|^2 * I`` over n. Dividing by the size of a store from which only a
    sample was drawn would let lambda shrink below what the sample resolves: directions that no row saw would rule.

    Args:
        rows: R, shape (N, dim); or (N, parts, dim), whose parts are summed: the Fisher of the loss's sum. Read once
            here in float64, kept in float32, on the CPU.
        damping: k of the law above. 1 is right for the true Fisher, and results are flat from .1 to 10.
        examples: examples in the store, where known.

    Attributes:
        damping: lambda itself, in units of squared gradient.

    The matrix is solved by Cholesky in float64, once: in the space of the rows or of the sketch, whichever is smaller.

    Raises:
        ShapeError: rows are not a matrix with at least one row, or all of them are zero.
    """

    def __init__(self, rows: Tensor, damping: float = 1.0, examples: int | None = None):
        if rows.ndim not in (2, 3) or not len(rows):
            raise ShapeError(
                f"curvature rows have shape {tuple(rows.shape)}, expected (N, dim) with N >= 1: extract them again"
            )
        if not damping > 0:
            raise ShapeError(f"damping is {damping}, expected a positive multiple of the mean squared norm such as 1")
        rows = rows.detach().cpu()
        self.rows = rows = rows if rows.ndim == 2 else rows.sum(dim=1)
        count = len(rows) if examples is None else min(len(rows), examples)
        trace = float(torch.linalg.vector_norm(rows, dtype=torch.float64) ** 2) / len(rows)
        if not 0 < trace < float("inf"):
            raise ShapeError(
                f"the mean squared norm of the curvature rows is {trace}, expected a positive one: extract them again"
            )
        self.damping = damping * trace / max(count, 1)

    @property
    def dim(self) -> int:
        """Numbers per row."""
        return self.rows.shape[1]

    @cached_property
    def _dual(self) -> bool:
        return len(self.rows) < self.dim

    @cached_property
    def _factor(self) -> Tensor:
        """Cholesky factor of ``RR' + N lambda I`` (dual) or ``R'R + N lambda I``."""
        rows = self.rows.to(torch.float64)
        gram = rows @ rows.T if self._dual else rows.T @ rows
        gram.diagonal().add_(len(rows) * self.damping)
        factor: Tensor = torch.linalg.cholesky(gram)
        return factor

    def solve(self, queries: Tensor) -> Tensor:
        """``(F + lambda I)^-1 q`` for each query.

        Args:
            queries: shape (q, dim).

        Returns:
            float64, shape (q, dim), on the CPU.
        """
        q = queries.detach().to("cpu", torch.float64)
        if not self._dual:
            return len(self.rows) * torch.cholesky_solve(q.T, self._factor).T
        rows = self.rows.to(torch.float64)
        inner = torch.cholesky_solve(rows @ q.T, self._factor)
        return (q - inner.T @ rows) / self.damping

    def solve_dual(self, b: Tensor) -> Tensor:
        """``(RR'/N + lambda I)^-1 b``: what preconditions an exact solve over the same examples.

        Args:
            b: float64, shape (N,).

        Returns:
            float64, shape (N,).
        """
        n = len(self.rows)
        if self._dual:
            return n * torch.cholesky_solve(b[:, None], self._factor)[:, 0]
        rows = self.rows.to(torch.float64)
        inner = torch.cholesky_solve((rows.T @ b)[:, None], self._factor)[:, 0]
        return (b - rows @ inner) / self.damping
