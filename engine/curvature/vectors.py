"""Model-sized vectors as one flat row of float64 numbers, so that solvers need no names."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError, SpecError

__all__ = ["Flat"]


class Flat:
    """Where each captured parameter lies in a flat vector.

    Args:
        shapes: canonical parameter name -> shape, in the order of the model's table.

    Attributes:
        shapes: the same.
        size: numbers of all parameters together.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)
        self._sizes = [prod(shape) for shape in self.shapes.values()]
        self.size = sum(self._sizes)

    def flatten(self, v: Mapping[str, Tensor]) -> Tensor:
        """float64 (size,) on the CPU, new memory.

        Raises:
            SpecError: names or shapes are not those of the parameters.
            ShapeError: v is zero or not finite.
        """
        missing = [name for name in self.shapes if name not in v]
        unknown = [name for name in v if name not in self.shapes]
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the curvature does not"
            raise SpecError(
                f"the query {what}: expected the {len(self.shapes)} captured parameters, take its gradient with the "
                "model and modules of the curvature"
            )
        for name, shape in self.shapes.items():
            if tuple(v[name].shape) != shape:
                raise SpecError(f"the query's {name} has shape {tuple(v[name].shape)}, expected {shape}")
        flat = torch.cat([v[name].detach().to("cpu", torch.float64).reshape(-1) for name in self.shapes])
        length = float(torch.linalg.vector_norm(flat))
        if not 0 < length < float("inf"):
            raise ShapeError(f"the query's gradient has length {length}, expected a positive number: look at its loss")
        return flat

    def join(self, v: Mapping[str, Tensor]) -> Tensor:
        """As ``flatten``, of what this package computed itself: nothing is checked."""
        return torch.cat([v[name].detach().to("cpu", torch.float64).reshape(-1) for name in self.shapes])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """{name: view of the parameter's shape}."""
        parts = flat.split(self._sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
