"""A classifier at several checkpoints: its exact gradients by autograd, and stores of them by an identity sketch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from stores import MemoryStore
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.engine.capture.features import Features
from gradsift.engine.scorers.scores import stream_scores

ROWS, QUERIES, CLASSES = 45, 3, 3
RATES = (2e-3, 1e-3, 5e-4)
ADAM = {"kind": "adam", "form": "less", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


cross_entropy.kind = "classification"  # type: ignore[attr-defined]


def margin(model: nn.Module, batch: Any) -> Tensor:
    """log(p / (1 - p)) of the label."""
    p = model(batch["x"]).softmax(dim=1).gather(1, batch["y"][:, None])[:, 0]
    return (p / (1 - p)).log()


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, CLASSES, bias=False))


def batch(n: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return {"x": x, "y": torch.randint(CLASSES, (n,), generator=generator)}


def per_example(model: nn.Module, examples: dict[str, Tensor], function: Callable[..., Tensor]) -> Tensor:
    """Gradients in float64, (n, P), without anything of gradsift."""
    double = copy.deepcopy(model).double()
    examples = {**examples, "x": examples["x"].double()}
    rows = []
    for i in range(len(examples["y"])):
        value = function(double, {key: v[i : i + 1] for key, v in examples.items()}).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(double.parameters()))]))
    return torch.stack(rows)


@dataclass(frozen=True)
class World:
    """Everything at three checkpoints, numbered 0 to 2."""

    @cached_property
    def models(self) -> list[nn.Module]:
        return [net(seed) for seed in range(len(RATES))]

    @cached_property
    def train(self) -> dict[str, Tensor]:
        return batch(ROWS, 10)

    @cached_property
    def asked(self) -> dict[str, Tensor]:
        return batch(QUERIES, 11)

    def exact(self, of: str, function: Callable[..., Tensor] = cross_entropy) -> Tensor:
        """Float64 (n, checkpoints, P)."""
        return torch.stack([per_example(model, getattr(self, of), function) for model in self.models], dim=1)

    @cached_property
    def captured(self) -> dict[str, list[Features]]:
        """What an identity capture gives at each checkpoint."""
        spec = gs.SketchSpec(kind="identity")
        return {
            of: [gs.Capture(model, spec, "*")(getattr(self, of), cross_entropy) for model in self.models]
            for of in ("train", "asked")
        }

    @cached_property
    def sizes(self) -> list[int]:
        return [row.shape[0] * row.shape[1] for row in self.captured["train"][0].table]

    def apart(self, of: str, groups: bool, checkpoints: int) -> Features:
        """Rows (n, checkpoints * groups, P): groups of one parameter each, the first checkpoints of the three."""
        found = self.captured[of][:checkpoints]
        values = torch.stack([f.values for f in found], dim=1)
        if groups:
            values = torch.stack([values * mask for mask in self.masks], dim=2).flatten(1, 2)
        values = values if values.shape[1] > 1 else values[:, 0]
        losses = torch.stack([f.loss for f in found if f.loss is not None], dim=1)
        losses = losses if checkpoints > 1 else losses[:, 0]
        return replace(found[0], values=values, grad_norm=values.norm(dim=-1), loss=losses)

    @cached_property
    def masks(self) -> Tensor:
        owner = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        return torch.stack([(owner == group).float() for group in range(len(self.sizes))])

    def store(
        self, block: int = 7, *, groups: bool = False, checkpoints: int = 1, rows: Any = slice(None), **attributes: Any
    ) -> MemoryStore:
        """A store of the training set."""
        given = self.apart("train", groups, checkpoints)
        names = [row.name for row in given.table] if groups else [None]
        named = checkpoints > 1
        parts = tuple(
            {
                "checkpoint": f"step {c}" if named else None,
                "learning_rate": RATES[c] if named else None,
                "group": name,
                "dim": given.spec.dim,
                "norm": None,
            }
            for c in range(checkpoints)
            for name in names
        )
        assert given.loss is not None
        settings = {
            "parts": parts,
            "spec": given.spec,
            "table": given.table,
            "checkpoint_loss" if named else "loss": given.loss.numpy()[rows],
            "metadata": {"loss": {"kind": "classification"}, "preconditioner": None},
            **attributes,
        }
        return MemoryStore(given.values[rows], block, **settings)


WORLD = World()


def queries_for(scorer: str, shape: dict[str, Any]) -> Any:
    """The queries in the shape of the store's rows; their loss is what the store says, whatever it calls it."""
    if scorer.startswith("self"):
        return None
    asked = WORLD.apart("asked", shape.get("groups", False), shape.get("checkpoints", 1))
    return replace(asked, loss_kind=shape["metadata"].get("loss", {}).get("kind")) if "metadata" in shape else asked


def streamed(store: Any, queries: Any, scorer: Any, **options: Any) -> np.ndarray:
    return np.concatenate([scores for _, scores in stream_scores(store, queries, scorer, **options)], axis=1)


def close(got: np.ndarray, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def solve(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.linalg.solve(matrix, rows.T).T


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
