"""The sketch of gradients that exist already: dense matrix, and S applied to (n, p, q) tensors in torch."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError, SpecError
from gradsift.kernels.hashing import buckets_and_signs
from gradsift.kernels.project import projections
from gradsift.kernels.spec import SketchSpec

__all__ = ["identity_offset", "sketch_dense", "sketch_matrix"]


def identity_offset(spec: SketchSpec, name: str, shape: tuple[int, ...]) -> int:
    """Where a parameter begins in the rows of an identity sketch.

    Raises:
        SpecError: the spec is not bound to this parameter.
    """
    size = prod(shape)
    if not spec.layout and spec.dim in (-1, size):
        return 0
    offset = 0
    for known, known_shape in spec.layout:
        if known == name:
            if prod(known_shape) != size:
                raise SpecError(f"{name} has shape {shape} but the identity was bound with {known_shape}")
            return offset
        offset += prod(known_shape)
    raise SpecError(f"the identity sketch does not know {name}: use the bound spec (capture.spec)")


def sketch_dense(grad: Tensor, spec: SketchSpec, name: str, shape: tuple[int, ...], out: Tensor) -> None:
    """Add the sketch of per-example gradients of one parameter.

    Args:
        grad: shape (n, p * q), row-major in the parameter's own layout; any float dtype.
        shape: the parameter's shape.
        out: float32 or float64, shape (n, dim); receives ``out += grad @ S.T``.
    """
    if grad.ndim != 2 or grad.shape[1] != prod(shape) or out.shape != (grad.shape[0], spec.dim):
        raise ShapeError(
            f"{name}: gradients {tuple(grad.shape)} and out {tuple(out.shape)} do not fit "
            f"parameter {shape} and dim {spec.dim}"
        )
    if spec.kind == "identity":
        offset = identity_offset(spec, name, shape)
        out[:, offset : offset + grad.shape[1]] += grad
        return
    if (sides := projections(spec, name, shape, out.dtype, out.device)) is not None:
        outward, inward = sides
        grad = outward @ grad.to(out.dtype).unflatten(1, (outward.shape[1], -1)) @ inward.mT
        sketch_dense(grad.flatten(1), spec, name, (len(outward), len(inward)), out)
        return
    bucket, sign = buckets_and_signs(spec, name, shape)
    bucket, sign = bucket.to(out.device), sign.to(out.device)
    out.index_add_(1, bucket, grad.to(out.dtype) * sign)


def sketch_matrix(spec: SketchSpec, name: str, shape: tuple[int, ...]) -> Tensor:
    """The projection of one parameter as a dense matrix: for tests, and for reading.

    Args:
        name: the parameter's canonical name, as in ``capture.table``.
        shape: the parameter's full shape.

    Returns:
        float32 S_m of shape (dim, p * q): the feature of a gradient G is ``S_m @ G.reshape(-1)``, row-major. With
        ``spec.project`` this is the sketch and both projections in one.
    """
    size = prod(shape)
    if spec.kind == "identity":
        dim = size if spec.dim == -1 else spec.dim
        matrix = torch.zeros(dim, size)
        offset = identity_offset(spec, name, shape)
        matrix[offset : offset + size].fill_diagonal_(1.0)
        return matrix
    if (sides := projections(spec, name, shape, torch.float64, torch.device("cpu"))) is not None:
        outward, inward = sides
        small = len(outward), len(inward)
        sketch = sketch_matrix(spec, name, small).double().view(spec.dim, *small)
        return (outward.mT @ sketch @ inward).float().reshape(spec.dim, size)
    bucket, sign = buckets_and_signs(spec, name, tuple(shape))
    matrix = torch.zeros(spec.dim, size)
    matrix[bucket, torch.arange(size)] = sign
    return matrix
