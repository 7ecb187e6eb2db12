"""Exact scores of a short list against one forward pass over the same examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paired import FULL, paired
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import gradsift as gs
from gradsift.engine.losses import language_model

EXAMPLES, TOKENS, BATCH = (100, 128, 10) if FULL else (4, 16, 2)
ROUNDS = 9 if FULL else 2
VOCABULARY = 2048 if FULL else 97
CASE = f"re-scoring {EXAMPLES} x {TOKENS} tokens, Llama {'256 x 6' if FULL else '32 x 2'}, r = 16 on all linear maps"


class Setup:
    """A model, the short list in batches, and a query's gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        width, depth = (256, 6) if FULL else (32, 2)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=TOKENS,
        )
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        self.model = get_peft_model(LlamaForCausalLM(config), lora).eval()
        ids = torch.randint(0, VOCABULARY, (EXAMPLES, TOKENS))
        self.batches = [{"input_ids": part} for part in ids.split(BATCH)]
        self.v = gs.gradient(self.model, {"input_ids": ids[:1]}, language_model)

    def forward_pass(self) -> None:
        with torch.no_grad():
            for batch in self.batches:
                language_model.token_losses(self.model, batch)

    def exact(self, method: Any) -> torch.Tensor:
        losses = language_model.token_losses
        return torch.cat([gs.rescore(self.model, b, losses, self.v, method).scores for b in self.batches])


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def autograd(setup: Setup, examples: int) -> torch.Tensor:
    scores = []
    for i in range(examples):
        ids = setup.batches[i // BATCH]["input_ids"][i % BATCH, None]
        g = gs.gradient(setup.model, {"input_ids": ids}, language_model)
        scores.append(sum(float((g[name].double() * v).sum()) for name, v in setup.v.items()))
    return torch.tensor(scores, dtype=torch.float64)


def test_rescore(benchmark: Any, setup: Setup) -> None:
    expected = autograd(setup, min(8, EXAMPLES))
    errors = {}
    for method, tolerance in (("auto", 1e-3), ("forward", 1e-5)):
        got = setup.exact(method)[: len(expected)]
        errors[method] = float((got - expected).abs().max() / expected.abs().max())
        assert errors[method] <= tolerance
    benchmark.extra_info["facts"] = [
        f"{CASE}: largest error over the largest score: central {errors['auto']:.1e}, forward {errors['forward']:.1e}"
    ]
    providers = {
        "forward pass": setup.forward_pass,
        "central (auto)": lambda: setup.exact("auto"),
        "forward mode": lambda: setup.exact("forward"),
    }
    paired(benchmark, CASE, providers, "forward pass", ROUNDS)
