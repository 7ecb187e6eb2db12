"""The curvature of one parameter in an eigenbasis of each of its sides, with corrected eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Eigenvalues", "KroneckerFactor"]


class Eigenvalues:
    """Collects the mean square of gradients in a rotated basis, and of what lies outside of it.

    Args:
        left, right: orthonormal columns (p, a) and (q, b) of the sides of a (p, q) parameter.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left, self.right = left, right
        (p, a), (q, b) = left.shape, right.shape
        self._inside = torch.zeros(a, b, dtype=torch.float64)
        self._rows = torch.zeros(a, dtype=torch.float64)
        self._columns = torch.zeros(b, dtype=torch.float64)
        self._all = 0.0
        self._outside = q - b, p - a

    def add(self, gradients: Tensor) -> None:
        """Gradients (n, p, q) of n examples."""
        left, right = self.left.to(gradients), self.right.to(gradients)
        rows = left.mT @ gradients
        self._inside += (rows @ right).square().sum(0).to("cpu", torch.float64)
        if any(self._outside):
            self._rows += rows.square().sum((0, 2)).to("cpu", torch.float64)
            self._columns += (gradients @ right).square().sum((0, 1)).to("cpu", torch.float64)
            self._all += float(gradients.square().sum(dtype=torch.float64))

    def factor(self, count: int) -> KroneckerFactor:
        """The factor, given how many examples there were."""
        q, p = self._outside
        inside, rest = self._inside, torch.zeros((), dtype=torch.float64)
        rows = (self._rows - inside.sum(1)).clamp_min(0) / max(1, q)
        columns = (self._columns - inside.sum(0)).clamp_min(0) / max(1, p)
        if p and q:
            left_over = self._all - self._rows.sum() - self._columns.sum() + inside.sum()
            rest = left_over.clamp_min(0) / (p * q)
        values = (inside, rows if q else torch.zeros_like(rows), columns if p else torch.zeros_like(columns), rest)
        return KroneckerFactor(self.left, self.right, *(v / count for v in values))


@dataclass(frozen=True, slots=True)
class KroneckerFactor:
    """``F`` of one (p, q) parameter, diagonal in the basis that the axes of its two sides span.

    A wide side keeps only some axes; outside of them F is isotropic: one number for each axis of the other side, and
    one for what is outside of both. They are chosen so that F has the trace that was measured.

    Attributes:
        left, right: orthonormal columns, float64 (p, a) and (q, b).
        values: mean squares along each pair of axes, float64 (a, b).
        rows: along each left axis and any direction outside of the right ones, (a,); 0 when b = q.
        columns: along each right axis and any direction outside of the left ones, (b,); 0 when a = p.
        rest: outside of both, ().
    """

    left: Tensor
    right: Tensor
    values: Tensor
    rows: Tensor
    columns: Tensor
    rest: Tensor

    @property
    def trace(self) -> float:
        """Mean squared norm of the gradients that it was fitted to."""
        (p, a), (q, b) = self.left.shape, self.right.shape
        outside = (q - b) * self.rows.sum() + (p - a) * self.columns.sum() + (p - a) * (q - b) * self.rest
        return float(self.values.sum() + outside)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """``(F + damping I)^-1 v`` for v (p, q), float64."""
        left, right = self.left, self.right
        (p, a), (q, b) = left.shape, right.shape
        rows = left.mT @ v
        inside = rows @ right
        divided = inside / (self.values + damping)
        if q > b:
            beside = (rows - inside @ right.mT) / (self.rows + damping)[:, None]
            out = left @ (divided @ right.mT + beside)
        else:
            out = left @ (divided @ right.mT)
        if p > a:
            below = v - left @ rows
            columns = below @ right
            out = out + (columns / (self.columns + damping)) @ right.mT
            if q > b:
                out = out + (below - columns @ right.mT) / (self.rest + damping)
        return out
