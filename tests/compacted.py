"""Stores on disk with rows of any numbers, for tests of compaction: nothing is extracted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gradsift as gs
from gradsift.engine.store.writer import StoreWriter


def write_store(
    path: Path,
    rows: Tensor,
    *,
    curvature: Tensor | None = None,
    norms: Tensor | None = None,
    parts: Sequence[dict[str, Any]] = ({},),
    ids: Sequence[str] | None = None,
    seed: int = 0,
    block: int = 100,
    **more: Any,
) -> gs.FeatureStore:
    """A store of these rows (n, dim), or (n, parts, dim), as ``extract`` would have written it."""
    whole = rows if rows.ndim == 3 else rows[:, None]
    spec = gs.SketchSpec(dim=whole.shape[2], seed=seed)
    part = {"checkpoint": None, "group": None, "timestep": None, "dim": spec.dim, "norm": "exact"}
    description = {
        "format": 1,
        "spec": json.loads(spec.to_json()),
        "table": [{"name": "layer.weight", "shape": [4, 16], "scale": 1.0}],
        "loss": {"kind": "toy", "tokens": False, "settings": None},
        "fingerprints": {"model": "m" * 32, "adapter": "a" * 32},
        "parts": [{**part, **own} for own in parts],
        "block": block,
        "dtype": "float32",
        "ids": "string",
        "curvature": None if curvature is None else {"requested": len(curvature), "rows": None},
        "notes": {"kind": "lm"},
        "versions": {},
        "rows": None,
        "complete": False,
        **more,
    }
    n = len(whole)
    sizes = whole.norm(dim=2) if norms is None else norms.reshape(n, -1)
    with StoreWriter(path, description) as writer:
        with writer.examples() as examples:
            columns: dict[str, Any] = {
                "features": whole.numpy(),
                "loss": np.arange(n, dtype=np.float32),
                "grad_norm": sizes.numpy(),
                "ids": [f"é{i}" for i in range(n)] if ids is None else list(ids),
                "batch_hash": np.zeros((n, 16), dtype=np.uint8),
                "batch_rows": np.ones(n, dtype=np.int32),
            }
            if more.get("checkpoints"):
                columns["checkpoint_loss"] = np.ones((n, len(more["checkpoints"])), dtype=np.float32)
            examples.append(0, columns)
            examples.finish(n)
        if curvature is not None:
            drawn = curvature if curvature.ndim == 3 else curvature[:, None]
            with writer.curvature() as sample:
                count = len(drawn)
                sample.append(
                    0,
                    {
                        "curvature/features": drawn.numpy(),
                        "curvature/ids": [f"é{i}" for i in range(count)],
                        "curvature/draw": np.zeros(count, dtype=np.int32),
                    },
                )
                sample.finish(count)
        writer.finish(n, None if curvature is None else len(curvature))
    return gs.FeatureStore.open(path)


def low_rank(n: int, dim: int, *, rank: int = 24, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Rows like those of a trained model: a spectrum that falls, norms that differ by an order of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, dim, generator=torch.Generator().manual_seed(99)) / dim**0.5
    spectrum = torch.arange(1, rank + 1) ** -0.5
    rows = (torch.randn(n, rank, generator=generator) * spectrum) @ basis
    rows += noise * torch.randn(n, dim, generator=generator) / dim**0.5
    return rows * torch.exp(0.7 * torch.randn(n, 1, generator=generator))
