"""Tiny models, batches and the one-example-at-a-time oracle that the capture tests share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of

SPEC = gs.SketchSpec(dim=256)
VOCAB = 97


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, **sizes, **config)
    ).eval()


def with_lora(model: Any, **config: Any) -> Any:
    """A PEFT model whose B is not zero, so that A's gradient is not zero either."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    return fill(get_peft_model(model, LoraConfig(**settings)).eval())


def fill(model: Any) -> Any:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def padded_batch(n: int = 4, length: int = 11) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (n, length), generator=generator)
    lengths = torch.tensor([length - (3 * i) % (length - 2) for i in range(n)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def one(batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index : index + 1] for key, value in batch.items()}


def oracle(
    model: nn.Module,
    examples: list[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    spec: gs.SketchSpec,
    modules: str | list[str] = "lora",
) -> tuple[Tensor, Tensor]:
    """Rows and norms by plain autograd on a copy, one example at a time, through the dense matrix."""
    model = copy.deepcopy(model)
    parameters = parameters_of(model, modules)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rows, norms = [], []
    for example in examples:
        loss = loss_fn(model, example).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        row = torch.zeros(spec.dim, dtype=torch.float64)
        square = 0.0
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            if grad is not None:
                row += gs.sketch_matrix(spec, name, tuple(parameter.shape)).double() @ grad.reshape(-1).double()
                square += float(grad.double().square().sum())
        rows.append(row)
        norms.append(square**0.5)
    return torch.stack(rows), torch.tensor(norms, dtype=torch.float64)


def error(got: Tensor, expected: Tensor) -> float:
    """Largest row error relative to the row's own norm."""
    difference = (got.double() - expected).reshape(len(expected), -1).norm(dim=1)
    return float((difference / expected.reshape(len(expected), -1).norm(dim=1).clamp_min(1e-12)).max())
