"""Adam's update in place of a gradient: elementwise, so it is applied to the exact gradient, before any sketch.

    Gamma = (first + a G) / (sqrt(second + b G^2) + eps)

``first`` and ``second`` are an optimizer's moments times what the step's coefficients make of them, so that both forms
of Adam are this one formula. G is an example's whole gradient of a parameter: the update is not additive over tokens.
Source: Kingma & Ba 2015; used on single examples by LESS (Xia et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError

__all__ = ["AdamStep"]


@dataclass(frozen=True, slots=True, eq=False)
class AdamStep:
    """The update that one parameter would get from one example.

    Attributes:
        first, second: float32, the parameter's shape. Where ``eps`` is 0, ``second`` is positive.
        a, b: not negative.
        eps: added to the root.
    """

    first: Tensor
    second: Tensor
    a: float
    b: float
    eps: float

    def __call__(self, grad: Tensor) -> Tensor:
        """The update of gradients (n, ...), whose other axes are the parameter's; new memory, grad's dtype."""
        first, second = (t.to(grad.device, grad.dtype) for t in (self.first, self.second))
        return grad.mul(self.a).add_(first).div_(grad.square().mul_(self.b).add_(second).sqrt_().add_(self.eps))

    def oriented(self, p: int, q: int, transposed: bool, device: torch.device) -> AdamStep:
        """The same for gradients (p, q), or (q, p) where they are computed transposed; moments in that order.

        Raises:
            ShapeError: the moments are not of that size.
        """
        if prod(self.first.shape) != p * q or self.first.shape != self.second.shape:
            raise ShapeError(
                f"Adam's moments have shapes {tuple(self.first.shape)} and {tuple(self.second.shape)}, expected those "
                f"of a ({p}, {q}) gradient: read them for this model (gradsift.adam_moments)"
            )
        first, second = (t.to(device).reshape(p, q) for t in (self.first, self.second))
        if transposed:
            first, second = first.t(), second.t()
        return AdamStep(first.contiguous(), second.contiguous(), self.a, self.b, self.eps)
