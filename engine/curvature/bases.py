"""The eigenbasis of one side of a Kronecker factor, from a stream of tokens: whole, or its largest axes only."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["Side"]

_OVERSAMPLED = 32
"""Columns that a low-rank sketch of a covariance has beyond the axes that are kept."""


class Side:
    """Collects ``sum_t a_t a_t'`` of tokens a (d) and gives its eigenvectors.

    Up to 4 * rank the covariance itself is held, and all d axes are kept. Beyond, only its product with rank + 32
    random columns is: a Nystrom approximation in one pass, of whose axes the ``rank`` largest are kept. What lies
    outside of them is treated as isotropic by the factor.

    Args:
        d: width of the tokens.
        rank: axes to keep of a wide side.
        name: of the side, from which the random columns are drawn.

    Source: Tropp et al. 2017 (arXiv 1706.05736), algorithm 3.
    """

    def __init__(self, d: int, rank: int, name: str) -> None:
        self._rank = rank
        self._test: Tensor | None = None
        if d > 4 * rank:
            seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
            generator = torch.Generator().manual_seed(seed)
            columns = torch.randn(d, min(d, rank + _OVERSAMPLED), generator=generator, dtype=torch.float64)
            self._test = torch.linalg.qr(columns).Q
        self._total = torch.zeros(d, d if self._test is None else self._test.shape[1], dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Tokens (t, d)."""
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        image = wide if self._test is None else wide @ self._test.to(wide)
        self._total += (wide.mT @ image).to("cpu", torch.float64)

    def axes(self) -> Tensor:
        """Orthonormal columns, largest first: float64 (d, d), or (d, rank)."""
        if self._test is None:
            axes: Tensor = torch.linalg.eigh(self._total).eigenvectors.flip(1)
            return axes
        shift = torch.finfo(torch.float64).eps * float(torch.linalg.matrix_norm(self._total)) + 1e-300
        image = self._total + shift * self._test
        inner = self._test.mT @ image
        half = torch.linalg.cholesky((inner + inner.mT) / 2).mT
        root = torch.linalg.solve_triangular(half, image, upper=True, left=False)
        left: Tensor = torch.linalg.svd(root, full_matrices=False).U
        return left[:, : self._rank].contiguous()
