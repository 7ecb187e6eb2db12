"""Queries after their curvature, as the command line does it: what it costs, how far it is, and what was found."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gradsift.bindings.render import bar
from gradsift.bindings.space import Examples, Space
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.curvature.corrected import Corrected
from gradsift.engine.curvature.curvature import Curvature
from gradsift.engine.curvature.evidence import Evidence
from gradsift.kernels.errors import DataError

__all__ = ["choose_damping", "correct", "curvature_of", "how_exact", "summary"]

_AT_ONCE = 8
"""Examples in a batch."""


def curvature_of(space: Space, rows: int | None = None) -> Curvature:
    """The curvature sample of a store, its labels drawn once more.

    Args:
        space: the store with its model and data.
        rows: how many rows to use at most, spread evenly over the sample; all unless given.

    Raises:
        DataError: the store holds none.
    """
    if space.store.curvature is None:
        raise DataError(f"'{space.store.path}' holds no curvature sample: extract with --curvature 2000")
    return Curvature.of(
        space.store,
        space.model,
        space.summed,
        lambda ids: space.data.fetch(space.data.find(ids)),
        rows=rows,
        batch=_AT_ONCE,
        modules=space.modules,
    )


def choose_damping(curvature: Curvature, space: Space, unseen: Examples) -> Evidence:
    """Let examples that were not trained on choose the damping: one forward pass over them."""
    starts = range(0, len(unseen), _AT_ONCE)
    losses, tokens = [], []
    with bar("damping", len(starts)) as advance, evaluating(space.model), torch.no_grad():
        for start in starts:
            batch = unseen.fetch(range(start, min(start + _AT_ONCE, len(unseen))))
            losses.append(space.summed(space.model, batch).cpu())
            if hasattr(space.summed, "loss_tokens"):
                tokens.append(space.summed.loss_tokens(batch))
            advance()
    return curvature.choose_k(space.store, torch.cat(losses), torch.cat(tokens) if tokens else None)


def correct(
    curvature: Curvature, space: Space, vectors: Sequence[Mapping[str, Tensor]], method: str, k: float | None = None
) -> list[Corrected]:
    """Each query's vector after its curvature; says first what that costs. Stopped, the same call goes on where it was.

    Args:
        method, k: as of ``precondition``.
    """
    cost = curvature.cost(method, queries=len(vectors))
    if cost.passes:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"curvature  {method}: at most {cost}")
    states = Path(f"{space.store.path}.solving")
    done = []
    with bar("exact curvature", cost.batches) as advance:
        for v in vectors:
            state = states / f"{_digest(v, method)}.npz"
            done.append(curvature.correct(v, method, k=k, checkpoint=state, progress=advance))
    shutil.rmtree(states, ignore_errors=True)
    return done


def summary(v: Corrected) -> dict[str, Any]:
    """What was done to one query, as plain values."""
    return {"method": v.method, "k": v.k, "lambda": v.damping, "steps": v.steps, "residuals": list(v.residuals)}


def how_exact(method: str | None, vectors: Sequence[Corrected]) -> str | None:
    """How a short list was ordered, in words; None when it was not."""
    if method is None:
        return None
    if not vectors:
        return "exact gradients of a short list, no curvature"
    first, most = vectors[0], max(v.steps for v in vectors)
    solved = f", {most} steps to residual {max(v.residuals[-1] for v in vectors):.1e}" if most else ""
    return f"exact gradients of a short list along {method} (k = {first.k:.3g}{solved})"


def _digest(v: Mapping[str, Tensor], method: str) -> str:
    """A name for a query's file."""
    digest = hashlib.blake2b(method.encode(), digest_size=8)
    for t in v.values():
        digest.update(t.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
