"""A query after its curvature: still one tensor per parameter, and what was done to it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["Corrected"]


class Corrected(dict[str, Tensor]):
    """``{canonical parameter name: tensor}``, float64 on the CPU, as ``rescore`` and ``Rescorer`` take it.

    Attributes:
        method: the correction.
        k: of the damping, ``lambda = k * trace(F) / n``.
        damping: lambda itself, in units of squared gradient.
        residuals: of conjugate gradients, relative, before the first step and after each; empty when there were none.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], method: str, k: float, damping: float, residuals: tuple[float, ...] = ()
    ) -> None:
        super().__init__(tensors)
        self.method, self.k, self.damping, self.residuals = method, k, damping, residuals

    @property
    def steps(self) -> int:
        """Steps of conjugate gradients."""
        return max(0, len(self.residuals) - 1)

    def __repr__(self) -> str:
        left = f", {self.steps} steps to residual {self.residuals[-1]:.1e}" if self.residuals else ""
        return f"Corrected({self.method!r}, k={self.k:g}, lambda={self.damping:.3g}{left}, {len(self)} parameters)"
