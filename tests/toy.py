"""A model of two linear maps with its loss and data, for tests of the store: nothing but torch is needed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs

SPEC = gs.SketchSpec(dim=64, seed=3)
SIZES = (5, 7, 4, 6, 3, 9, 1, 5)
ROWS = sum(SIZES)
CLASSES = 3

logging.getLogger("gradsift.engine.capture.capture").setLevel(logging.ERROR)  # the biases are left out on purpose


class ToyLoss:
    """Cross-entropy with everything that a loss may offer."""

    kind = "toy"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def sampled(self, model: nn.Module, batch: Any, seeds: Sequence[int]) -> Tensor:
        logits = model(batch["x"])
        uniform = torch.tensor([seed / 2**63 for seed in seeds])
        drawn = (logits.detach().softmax(-1).cumsum(-1) < uniform[:, None]).sum(-1).clamp_max(CLASSES - 1)
        return functional.cross_entropy(logits, drawn, reduction="none")

    def loss_tokens(self, batch: Any) -> Tensor:
        return batch["y"] + 1


def toy_model(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, CLASSES))


def toy_batches(sizes: Sequence[int] = SIZES, ids: str | None = "text") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    batches: list[dict[str, Any]] = []
    first = 0
    for n in sizes:
        batch: dict[str, Any] = {
            "x": torch.randn(n, 8, generator=generator),
            "y": torch.randint(CLASSES, (n,), generator=generator),
        }
        if ids == "text":
            batch["ids"] = [f"é{i}" for i in range(first, first + n)]
        elif ids == "int":
            batch["ids"] = torch.arange(1000 + first, 1000 + first + n)
        batches.append(batch)
        first += n
    return batches


def toy_extract(path: Path, batches: Any = None, **settings: Any) -> gs.FeatureStore:
    arguments: dict[str, Any] = {
        "model": toy_model(),
        "loss_fn": ToyLoss(),
        "spec": SPEC,
        "modules": "*",
        "block": 8,
        "curvature": 50,
        "progress": False,
        **settings,
    }
    loader = toy_batches() if batches is None else batches
    return gs.extract(arguments.pop("model"), loader, arguments.pop("loss_fn"), path, **arguments)


def expected(batches: Sequence[Any] | None = None) -> np.ndarray:
    """The rows, straight from capture."""
    capture = gs.Capture(toy_model().eval(), SPEC, modules="*")
    return np.concatenate([capture(batch, ToyLoss()).values.numpy() for batch in batches or toy_batches()])


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store with its bytes."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
