"""A network tuned by LoRA on scikit-learn's digits, of which every tenth is mislabelled."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsift.engine.checkpoints.adam import adam_moments
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.extras import require
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.losses import classification

__all__ = ["digits_case"]

_BASE = 900
_WRONG = 0.1
_HIDDEN = 64
_RANK = 8
_STEPS, _RATE = 200, 1e-2
_DECAY = 1e-3


class Network(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 64)."""
        return self.head(self.hidden(pixels))  # type: ignore[no-any-return]

    def hidden(self, pixels: Tensor) -> Tensor:
        """What the head reads, (n, hidden)."""
        return torch.tanh(self.second(torch.tanh(self.first(pixels))))


def digits_case(examples: int = 400, queries: int = 100, seed: int = 0) -> FidelityCase:
    """Digits, a tenth of them mislabelled, on which a LoRA of a network that knows turned ones is tuned."""
    data = require("sklearn.datasets").load_digits()
    images, truth = torch.from_numpy(data.images / 16).float(), data.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(truth))
    tuned, asked, other = np.split(order[: examples + queries + _BASE], [examples, examples + queries])
    rng = np.random.default_rng(seed + 1)
    wrong = np.zeros(examples, dtype=bool)
    wrong[rng.choice(examples, int(_WRONG * examples), replace=False)] = True
    said = np.where(wrong, (truth[tuned] + rng.integers(1, 10, examples)) % 10, truth[tuned])
    base = _base(images[other].rot90(1, (1, 2)).flatten(1), torch.from_numpy(truth[other]))
    pixels, labels = images[tuned].flatten(1), torch.from_numpy(said)

    def retrain(rows: Sequence[int], seed: int) -> nn.Module:
        return _tune(base, pixels[list(rows)], labels[list(rows)], seed)

    def checkpoints() -> list[Checkpoint]:
        kept: list[Checkpoint] = []
        _tune(base, pixels, labels, 0, kept)
        return kept

    return FidelityCase(
        name="digits",
        key=f"2 {seed} {examples} {torch.stack([p.detach().double().sum() for p in base.parameters()]).sum():.6f}",
        examples=examples,
        retrain=retrain,
        batches=[{"pixels": pixels, "labels": labels}],
        queries=[{"pixels": images[asked].flatten(1), "labels": torch.from_numpy(truth[asked])}],
        loss=classification,
        checkpoints=checkpoints,
        before=base,
        states=_states,
        inputs=lambda batch: batch["pixels"],
        labels=truth[tuned],
        query_labels=truth[asked],
        wrong=wrong,
    )


def _states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    network = next(module for module in model.modules() if isinstance(module, Network))
    return network.hidden(batch["pixels"])


def _base(pixels: Tensor, labels: Tensor) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
    _train(network, pixels, labels)
    return network.eval()


def _tune(
    base: nn.Module, pixels: Tensor, labels: Tensor, seed: int, checkpoints: list[Checkpoint] | None = None
) -> nn.Module:
    peft = require("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=["first", "second", "head"])
        model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config)
    _train(model, pixels, labels, checkpoints)
    return model.eval()


def _train(model: nn.Module, pixels: Tensor, labels: Tensor, checkpoints: list[Checkpoint] | None = None) -> None:
    """Adam over all examples at once; ``checkpoints`` gets one after each quarter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY, fused=True)
    rates: list[float] = []
    for step in range(_STEPS):
        rates.append(_RATE * (1 - step / _STEPS))
        optimizer.param_groups[0]["lr"] = rates[-1]
        cross_entropy(model(pixels), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if checkpoints is not None and (step + 1) % (_STEPS // 4) == 0:
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            rate = float(np.mean(rates[-(_STEPS // 4) :]))
            checkpoints.append(Checkpoint(weights, rate, adam_moments(optimizer, model), f"step {step + 1}"))
