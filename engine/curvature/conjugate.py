"""Preconditioned conjugate gradients that can be stopped at any step and go on to the same bits."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.kernels.errors import StoreError

__all__ = ["Checkpoint", "Solution", "conjugate_gradients"]

_CONVERGED = 1e-16
"""Squared preconditioned residual, relative to the first, below which nothing but rounding is left."""

logger = logging.getLogger(__name__)

Product = Callable[[Tensor], tuple[Tensor, Tensor]]


class Solution(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        answer: sum of the steps; empty when there was none.
        residuals: length of the residual over that of the right-hand side, before the first step (1) and after each.
    """

    answer: Tensor
    residuals: tuple[float, ...]


@dataclass(slots=True)
class _State:
    """Everything that the next step reads."""

    answer: Tensor
    residual: Tensor
    move: Tensor
    product: float
    first: float
    lengths: list[float]


class Checkpoint:
    """One file with the state after the last finished step; written beside and renamed, so that it is always whole.

    Args:
        path: of the file, made when the first step ends.
        key: of the problem: a state of another one is refused.
    """

    def __init__(self, path: str | os.PathLike[str], key: str) -> None:
        self.path, self._key = Path(path), key

    def load(self) -> _State | None:
        """The state, if there is one.

        Raises:
            StoreError: it is damaged, or that of another problem.
        """
        if not self.path.exists():
            return None
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                found = {name: kept[name] for name in kept.files}
            answer, residual, move = (torch.from_numpy(found[name]) for name in ("answer", "residual", "move"))
            key, (product, first), lengths = str(found["key"]), found["numbers"].tolist(), found["lengths"].tolist()
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StoreError(f"{self.path} cannot be read as a solver's state ({error}): delete it") from None
        if key != self._key:
            raise StoreError(
                f"{self.path} is the state of another query, model, sample or damping: give another checkpoint, or "
                "delete it"
            )
        return _State(answer, residual, move, product, first, lengths)

    def save(self, state: _State) -> None:
        """Keep the state in place of the one before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        with fresh.open("wb") as file:
            np.savez(
                file,
                answer=state.answer.numpy(),
                residual=state.residual.numpy(),
                move=state.move.numpy(),
                numbers=np.array([state.product, state.first]),
                lengths=np.array(state.lengths),
                key=np.array(self._key),
            )
        fresh.replace(self.path)


def conjugate_gradients(
    product: Product,
    right: Callable[[], Tensor],
    better: Callable[[Tensor], Tensor],
    *,
    steps: int,
    checkpoint: Checkpoint | None = None,
) -> Solution:
    """Solve ``M x = b`` for a symmetric positive definite M.

    Args:
        product: ``product(u) -> (M u, what u adds to the answer)``: u itself, or a linear image of it, if that is what
            is wanted of x.
        right: gives b, float64 (n,); not called when a checkpoint already knows the residual.
        better: the preconditioner: an approximation of ``M^-1 r``, symmetric and positive definite too.
        steps: in all, those of a checkpoint included; fewer when the residual is gone.

    Returns:
        the solution, the same bits whether it was interrupted or not.

    Source: Hestenes & Stiefel 1952.
    """
    state = None if checkpoint is None else checkpoint.load()
    if state is not None:
        logger.info("conjugate gradients: going on after step %d", len(state.lengths) - 1)
    while state is None or len(state.lengths) <= steps:
        if state is None:
            residual = right()
            move = better(residual)
            dot = float(residual @ move)
            state = _State(torch.zeros(0, dtype=torch.float64), residual, move, dot, dot, [_length(residual)])
            if steps == 0:
                break
        if state.product <= _CONVERGED * state.first:
            break
        image, added = product(state.move)
        curved = float(state.move @ image)
        if not 0 < curved < float("inf"):
            logger.warning(
                "conjugate gradients stopped after %d steps: the matrix is not positive along the next one (%.1e), as "
                "when derivatives are too rough; the answer so far is kept",
                len(state.lengths) - 1,
                curved,
            )
            break
        length = state.product / curved
        state.answer = length * added if not len(state.answer) else state.answer + length * added
        state.residual = state.residual - length * image
        nearer = better(state.residual)
        before, state.product = state.product, float(state.residual @ nearer)
        state.move = nearer + state.product / before * state.move
        state.lengths.append(_length(state.residual))
        logger.info("conjugate gradients: step %d, residual %.2e", len(state.lengths) - 1, _relative(state)[-1])
        if checkpoint is not None:
            checkpoint.save(state)
    return Solution(state.answer, _relative(state))


def _length(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def _relative(state: _State) -> tuple[float, ...]:
    first = state.lengths[0]
    return tuple(length / first if first else 0.0 for length in state.lengths)
