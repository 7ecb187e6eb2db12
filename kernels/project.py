"""Projection of a large gradient from both sides, so that it is as small as a LoRA's before it is sketched.

A spec with ``project=r`` turns the gradient G (p, q) of a parameter with p > r and q > r into the (r, r) gradient

    P_out G P_in^T = sum over tokens t of (P_out g_t) (P_in x_t)^T

which is then sketched as a parameter of shape (r, r) under the same name. P_out (r, p) and P_in (r, q) hold
+-1 / sqrt(r). Their signs follow the law of ``hashing``, with rows 0..r-1, the long side p or q, and keys of their own:
of the person ``gradsift.p_out`` or ``gradsift.p_in``. Projecting tokens first takes T r (p + q + r) products per
example instead of T p q, and an example's gradient is r * r numbers instead of p * q.

Source: Choe et al. 2024 (LoGra). E P^T P is the identity on either side and both are independent, so inner products of
projected gradients are unbiased.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from gradsift.kernels.hashing import expand_signs, matrix_shape, parameter_key, sign_words
from gradsift.kernels.spec import SketchSpec

__all__ = ["projections"]


def projections(
    spec: SketchSpec, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """P_out (r, p) and P_in (r, q) of a parameter that is projected before it is sketched; None of any other.

    Drawn again at each call: what is kept is their sign words.
    """
    (p, q), r = matrix_shape(tuple(shape)), spec.project
    if r is None or min(p, q) <= r:
        return None
    words = _words(spec.seed, name, b"gradsift.p_out", r, p, device)
    outward = expand_signs(*words, p).to(dtype).mul_(r**-0.5)
    words = _words(spec.seed, name, b"gradsift.p_in", r, q, device)
    return outward, expand_signs(*words, q).to(dtype).mul_(r**-0.5)


@lru_cache(maxsize=8192)
def _words(seed: int, name: str, person: bytes, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sign words of one side, where they are used: a sixteenth of a projection's own memory."""
    low, high = sign_words(parameter_key(seed, name, person), rows, width)
    return low.to(device), high.to(device)
