"""Scores by whole gradients along curvature-corrected queries: what `query --method` decides by, for every example."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gradsift.kernels.errors import DataError
from gradsift.kernels.spec import Layout

if TYPE_CHECKING:
    from gradsift.engine.fidelity.bench import Bench

__all__ = ["corrected_scores"]

_PASSES = 5e6
"""Examples times parameters up to which every query is solved for by conjugate gradients over the data."""


def corrected_scores(bench: Bench, method: str, k: float, labels: int) -> np.ndarray:
    """``g_j' (C + lambda I)^-1 g_i`` with C as a correction of `gradsift methods` has it, float64 (q, n).

    Args:
        labels: drawn for each example of the sample; "ggn" needs none and takes one.

    Raises:
        DataError: the loss cannot draw labels, or the data is too much for a solve of each query over it.
    """
    case = bench.case
    if method == "ggn" and case.examples * bench.parameters > _PASSES:
        raise DataError(
            f"{case.examples} examples of {bench.parameters:,} parameters: a solve for each query would take too long"
        )
    examples, queries = bench.whole()
    shapes = examples.spec.layout
    curvature = bench.curvature(1 if method == "ggn" else labels)
    directions = []
    for row in torch.from_numpy(queries.features[:]):
        parts = row.split([math.prod(shape) for _, shape in shapes])
        v = {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        directions.append(_flat(curvature.correct(v, method, k=k), shapes))
    rows = torch.from_numpy(examples.features[:])
    return np.asarray(torch.stack(directions) @ rows.to(torch.float64).T)


def _flat(v: Mapping[str, Tensor], shapes: Layout) -> Tensor:
    return torch.cat([v[name].reshape(-1).to(torch.float64) for name, _ in shapes])
