"""Sampling without replacement with probabilities that follow scores: Gumbel-top-k.

The top k of ``score / temperature + noise``, noise of the Gumbel law, are k draws without replacement from
``softmax(score / temperature)``. MATES' code adds the noise and takes the *smallest*, which is another law: the
Gumbel law is skewed.

Source: Kool et al. 2019, arXiv 1903.06059.
"""

from __future__ import annotations

import numpy as np

from gradsift.kernels.errors import SpecError

__all__ = ["gumbel_top"]


def gumbel_top(scores: np.ndarray, k: int, temperature: float, seed: int) -> np.ndarray:
    """k places drawn without replacement, in the order of the draws.

    Args:
        scores: float64 (n,).
        temperature: in units of the scores; 0 takes the top k.
        seed: of the noise.
    """
    if not temperature >= 0:
        raise SpecError(f"temperature is {temperature}, expected 0 or more, in units of the scores")
    if temperature > 0:
        scores = scores / temperature + np.random.default_rng(seed).gumbel(size=len(scores))
    return np.lexsort((np.arange(len(scores)), -scores))[:k]
