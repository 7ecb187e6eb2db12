"""Factors: what a pass reads of one use of one parameter, and how its uses become a kernel's operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import frexp
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.capture.layout import Layout
from gradsift.kernels.errors import CaptureError
from gradsift.kernels.images import Images, Window
from gradsift.kernels.operands import Operands, Tokens

__all__ = ["ConvFactor", "Factor", "factor_of"]


@dataclass(slots=True)
class Factor:
    """One parameter's share of a use of a linear map: its gradient is ``scale * sum_t g_t x_t^T``."""

    parameter: str
    x: Tensor
    g: Tensor
    scale: float = 1.0

    def weights(self) -> Tensor:
        """|x_t| |g_t| of every token, in the shape of the tokens."""
        return _norm(self.x, -1) * _norm(self.g, -1)

    def gather(self, uses: Sequence[Any], layout: Layout, name: str, shape: tuple[int, ...]) -> Operands:
        """The operands of all uses of the parameter in one pass, this one among them.

        Args:
            name: of the map, for errors.
            shape: of the parameter.
        """
        x = layout.join([layout.rows(_scaled(use.x, use.scale), name) for use in uses])
        g = layout.join([layout.rows(use.g, name) for use in uses])
        return Tokens(x.values, g.values, x.segments, self.parameter, shape)


@dataclass(slots=True)
class ConvFactor(Factor):
    """One parameter's share of a use of a convolution: x (images, c, h, w) and g (images, o, h', w')."""

    window: Window = field(kw_only=True)

    def weights(self) -> Tensor:
        """|x| |g| of every image, (images,)."""
        return _norm(self.x, (1, 2, 3)) * _norm(self.g, (1, 2, 3))

    def gather(self, uses: Sequence[Any], layout: Layout, name: str, shape: tuple[int, ...]) -> Operands:
        """As of a linear map; patches are read later."""
        x = [layout.images(_scaled(use.x, use.scale), name) for use in uses]
        g = [layout.images(use.g, name) for use in uses]
        found = [(a.values, b.values, use.window) for a, b, use in zip(x, g, uses, strict=True)]
        return Images(found, x[0].segments, self.parameter, shape)


def factor_of(module: nn.Module, name: str) -> Callable[..., Factor]:
    """What makes factors of calls of this module: ``make(parameter, x, g, scale)``.

    Args:
        name: of the map, for errors.
    """
    return partial(_conv_factor, Window.of(module), name) if isinstance(module, nn.Conv2d) else Factor


def _conv_factor(window: Window, name: str, parameter: str, x: Tensor, g: Tensor, scale: float = 1.0) -> ConvFactor:
    if x.ndim != 4:
        raise CaptureError(
            f"{name}: the convolution was called on a tensor of shape {tuple(x.shape)}, expected (n, c, h, w): "
            "give it a batch axis"
        )
    return ConvFactor(parameter, x, g, scale, window=window)


def _norm(t: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(t.detach().float(), dim=dim)
    return norm


def _scaled(x: Tensor, scale: float) -> Tensor:
    """scale * x without another rounding: a power of two is exact in any dtype."""
    if scale == 1.0:
        return x
    exact = frexp(scale)[0] == 0.5
    return x * scale if exact else x.float() * scale
