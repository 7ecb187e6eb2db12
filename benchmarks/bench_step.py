"""A row against an ordinary training step: extraction, tap, the floor, and the loops that research scripts run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from paired import FULL, paired
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradsift as gs

EXAMPLES, TOKENS = (8, 256) if FULL else (2, 16)
ROUNDS = 25 if FULL else 2
DIM = 4096
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASE = f"step: Llama {'256 x 6' if FULL else '32 x 2'}, r = 16 on all linear maps, {EXAMPLES} x {TOKENS} tokens"


class Setup:
    """One model and batch; each provider is a method that does one unit of work."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        width, depth = (256, 6) if FULL else (32, 2)
        config = LlamaConfig(
            vocab_size=2048 if FULL else 97,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 16 * 16,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules=MAPS)).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.batch = {"input_ids": torch.randint(0, config.vocab_size, (EXAMPLES, TOKENS))}
        self.loss = gs.losses.language_model
        self.spec = gs.SketchSpec(dim=DIM)
        self.capture = gs.Capture(self.model, self.spec)

    def step(self) -> None:
        """Forward, backward with weight gradients; no optimizer."""
        for parameter in self.trainable.values():
            parameter.grad = None
        self.loss(self.model, self.batch).sum().backward()

    def extraction(self) -> Tensor:
        return self.capture(self.batch, self.loss).values

    def tap(self) -> Tensor:
        for parameter in self.trainable.values():
            parameter.grad = None
        with self.capture.tap() as tap:
            self.loss(self.model, self.batch).sum().backward()
        return tap.values

    def floor(self) -> None:
        """Forward and backward without weight gradients: what any extraction must spend."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(False)
        embeddings = self.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))
        try:
            self.loss(self.model, self.batch).sum().backward()
        finally:
            handle.remove()
            for parameter in self.trainable.values():
                parameter.requires_grad_(True)

    def gradients(self) -> Iterator[Tensor]:
        """Batch-1 autograd: the whole gradient of each example."""
        for i in range(EXAMPLES):
            loss = self.loss(self.model, {"input_ids": self.batch["input_ids"][i : i + 1]}).sum()
            grads = torch.autograd.grad(loss, list(self.trainable.values()))
            yield torch.cat([grad.reshape(-1) for grad in grads])


def dense_projection(gradients: Iterable[Tensor]) -> Tensor:
    """+-1 entries drawn block by block for all examples together, as research scripts do: the matrix does not fit."""
    stacked = torch.stack(list(gradients))
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(len(stacked), DIM)
    for part in stacked.split(8192, dim=1):
        signs = torch.randint(0, 2, (part.shape[1], DIM), generator=generator, dtype=torch.int8)
        rows += part @ (signs.float() * 2 - 1)
    return rows / DIM**0.5


class CountSketch:
    """One fully random bucket and sign per number: stored, so as fast as the loop can be."""

    def __init__(self, size: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.bucket = torch.randint(0, DIM, (size,), generator=generator)
        self.sign = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1

    def __call__(self, gradients: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.zeros(DIM).index_add_(0, self.bucket, flat * self.sign) for flat in gradients])


def gram_error(rows: Tensor, exact: Tensor) -> float:
    """Relative error of the Gram matrix of the rows."""
    return float((rows @ rows.T - exact @ exact.T).norm() / (exact @ exact.T).norm())


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def test_extraction_and_tap(benchmark: Any, setup: Setup) -> None:
    identity = gs.Capture(setup.model, gs.SketchSpec(kind="identity"))(setup.batch, setup.loss).values
    assert gram_error(identity, torch.stack(list(setup.gradients()))) <= 1e-5
    assert (setup.tap() - setup.extraction()).norm() <= 1e-5 * setup.extraction().norm()
    providers = {"LoRA step": setup.step, "extraction": setup.extraction, "tap": setup.tap, "floor": setup.floor}
    paired(benchmark, CASE, providers, "LoRA step", ROUNDS)


def test_batch_one_loops(benchmark: Any, setup: Setup) -> None:
    exact = torch.stack(list(setup.gradients()))
    size = exact.shape[1]
    seeds = range(20 if FULL else 2)
    captured = [gs.Capture(setup.model, gs.SketchSpec(dim=DIM, seed=s))(setup.batch, setup.loss).values for s in seeds]
    ours = statistics.fmean(gram_error(rows, exact) for rows in captured)
    theirs = [gram_error(CountSketch(size, seed)(exact), exact) for seed in seeds]
    benchmark.extra_info["facts"] = [
        f"relative error of the Gram matrix at dim {DIM}, mean of {len(theirs)} seeds: extraction {ours:.3f}, "
        f"a global CountSketch {statistics.fmean(theirs):.3f}"
    ]
    sketch = CountSketch(size)
    providers: dict[str, Callable[[], object]] = {
        "extraction": setup.extraction,
        "batch-1 loop, dense projection": lambda: dense_projection(setup.gradients()),
        "batch-1 loop, CountSketch": lambda: sketch(setup.gradients()),
    }
    paired(benchmark, f"loops of batch size 1; {CASE}", providers, "extraction", 3 if FULL else 1)
