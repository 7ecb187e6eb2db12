"""A language model that was really trained: bytes of the standard library's docstrings, then LoRA on some records."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradsift.engine.losses import language_model

__all__ = ["LENGTH", "Trained", "train"]

LENGTH = 64
"""Bytes per record."""

_BATCH = 32


class Trained(NamedTuple):
    """A tuned model in eval mode, the records it was tuned on (n, LENGTH), and records that it has not seen."""

    model: nn.Module
    records: Tensor
    unseen: Tensor


def docstrings() -> Iterator[str]:
    """Docstrings of the standard library in the order of its files, long ones first cut to whole records later."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LENGTH:
                    yield text


def all_records(count: int) -> Tensor:
    """The first LENGTH bytes of each docstring, none twice: uint8 values as int64, (count, LENGTH), shuffled."""
    heads = (text.encode()[:LENGTH] for text in docstrings())
    unique = list(islice(dict.fromkeys(h for h in heads if len(h) == LENGTH), 4 * count))
    rows = torch.tensor([list(head) for head in unique])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][:count]


def train(records: int, *, unseen: int = 64, width: int = 128, steps: int = 600, epochs: int = 2) -> Trained:
    """Train a small Llama on one half of the text, then a LoRA of rank 4 on ``records`` of the other half."""
    data = all_records(2 * records + unseen)
    if len(data) < records + unseen + _BATCH:
        raise RuntimeError(f"the standard library holds only {len(data)} docstrings: ask for fewer records")
    held, tuned, rest = data[:unseen], data[unseen : unseen + records], data[unseen + records :]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    base = LlamaForCausalLM(config)
    _fit(base, rest, steps, 2e-3)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    _fit(model, tuned, max(1, epochs * records // _BATCH), 2e-3)
    return Trained(model.eval(), tuned, held)


def _fit(model: nn.Module, data: Tensor, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        batch = data[torch.randint(0, len(data), (_BATCH,), generator=generator)]
        optimizer.zero_grad()
        (language_model(model, {"input_ids": batch}).mean() / LENGTH).backward()
        optimizer.step()
