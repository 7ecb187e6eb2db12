"""A LoRA language model on Python's own source code: 320 records of 48 bytes out of 32 files, one query per file."""

from __future__ import annotations

import copy
import hashlib
import os
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsift.engine.checkpoints.adam import adam_moments
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.extras import require
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.losses import language_model

__all__ = ["LMPlan", "lm_case"]

LENGTH = 48
"""Bytes per record."""

_BASE_RATE = 2e-3

_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"}


@dataclass(frozen=True, slots=True)
class LMPlan:
    """Sizes of the case.

    Attributes:
        files, per_file: source files, and records of each; one more is its query.
        width: of the model.
        pretraining: steps on the other files.
        epochs, batch, rate: of the LoRA's training.
    """

    files: int = 32
    per_file: int = 10
    width: int = 96
    pretraining: int = 800
    epochs: int = 6
    batch: int = 16
    rate: float = 2e-3


def lm_case(folder: Path, plan: LMPlan | None = None, report: Callable[[int, int], None] | None = None) -> FidelityCase:
    """The case; its base model is trained once and kept in the folder.

    Args:
        report: called with steps done and steps in all while the base model trains.
    """
    plan = plan or LMPlan()
    source = _Source(plan)
    key = "".join(f" {name} {value}" for name, value in asdict(plan).items())
    base = _kept(source, plan, folder / f"lm_base_{source.fingerprint}_{plan.pretraining}_{plan.width}.pt", report)

    def retrain(rows: Sequence[int], seed: int) -> nn.Module:
        return _tune(base, source.records, rows, seed, plan)

    def checkpoints() -> list[Checkpoint]:
        kept: list[Checkpoint] = []
        _tune(base, source.records, range(len(source.records)), 0, plan, kept)
        return kept

    return FidelityCase(
        name="lm",
        key=f"2{key} {source.fingerprint}",
        examples=len(source.records),
        retrain=retrain,
        batches=_batches(source.records),
        queries=_batches(source.queries),
        loss=language_model,
        checkpoints=checkpoints,
        before=base,
        texts=_texts(source.records),
        query_texts=_texts(source.queries),
        states=_mean_state,
        labels=source.files,
        query_labels=np.arange(plan.files),
    )


def _batches(records: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in records.split(32)]


def _texts(records: Tensor) -> list[str]:
    return [bytes(record).decode("utf-8", "replace") for record in records.tolist()]


def _mean_state(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    state: Tensor = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1]
    return state.mean(dim=1)


def _kept(source: _Source, plan: LMPlan, path: Path, report: Callable[[int, int], None] | None) -> nn.Module:
    """The base model, from disk when it is there."""
    model = _llama(plan)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    _pretrain(model, source, plan, report)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model.eval()


def _llama(plan: LMPlan) -> nn.Module:
    """A Llama of three layers over bytes."""
    transformers = require("transformers")
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=plan.width,
        intermediate_size=3 * plan.width,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


class _Source:
    """The text of the case, as bytes.

    Attributes:
        records: int64 (n, LENGTH), what the LoRA is tuned on.
        files: int64 (n,), the file of each record.
        queries: int64 (files, LENGTH), one held-out piece of each file, in the files' order.
        other: uint8, the text of all other files, what the base model is trained on.
        fingerprint: of all this text: another Python has another library.
    """

    def __init__(self, plan: LMPlan) -> None:
        paths = [path for path in _sources() if path.stat().st_size >= 64 * LENGTH]
        places = np.linspace(0, len(paths) - 1, plan.files).round().astype(int)
        chosen = [paths[place] for place in places]
        rng = np.random.default_rng(0)
        records, queries = [], []
        for path in chosen:
            text = np.frombuffer(path.read_bytes(), dtype=np.uint8)
            starts = np.linspace(0, len(text) - LENGTH, plan.per_file + 1).astype(int)
            pieces = [text[start : start + LENGTH] for start in starts]
            queries.append(pieces.pop(int(rng.integers(len(pieces)))))
            records += pieces
        self.records = torch.from_numpy(np.stack(records).astype(np.int64))
        self.queries = torch.from_numpy(np.stack(queries).astype(np.int64))
        self.files = np.repeat(np.arange(plan.files), plan.per_file)
        rest = set(paths) - set(chosen)
        self.other = np.concatenate([np.frombuffer(p.read_bytes(), dtype=np.uint8) for p in paths if p in rest])
        digest = hashlib.blake2b(self.other.tobytes(), digest_size=6)
        digest.update(self.records.numpy().tobytes() + self.queries.numpy().tobytes())
        self.fingerprint = digest.hexdigest()


def _sources() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts))


def _pretrain(model: nn.Module, source: _Source, plan: LMPlan, report: Callable[[int, int], None] | None) -> None:
    """Train on the other files."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_RATE, fused=True)
    for step in range(plan.pretraining):
        for group in optimizer.param_groups:
            group["lr"] = _BASE_RATE * min(1.0, step / 50) * (1 - step / plan.pretraining)
        starts = torch.randint(0, len(source.other) - LENGTH, (32,), generator=generator)
        batch = np.stack([source.other[start : start + LENGTH] for start in starts.tolist()]).astype(np.int64)
        _mean_loss(model, torch.from_numpy(batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report is not None:
            report(step + 1, plan.pretraining)


def _tune(
    base: nn.Module,
    records: Tensor,
    rows: Sequence[int],
    seed: int,
    plan: LMPlan,
    checkpoints: list[Checkpoint] | None = None,
) -> nn.Module:
    """A LoRA of rank 4 on every linear map, tuned on these records; the base stays as it was.

    Args:
        checkpoints: gets one at the end of every epoch.
    """
    peft = require("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        model: nn.Module = peft.get_peft_model(copy.deepcopy(base), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0, fused=True)
    order = torch.Generator().manual_seed(seed)
    kept = torch.zeros(len(records), dtype=torch.bool)
    kept[list(rows)] = True
    epochs = [(p := torch.randperm(len(records), generator=order))[kept[p]] for _ in range(plan.epochs)]
    batches = [batch for epoch in epochs for batch in epoch.split(plan.batch)]
    rates: list[float] = []
    for step, batch in enumerate(batches):
        rates.append(plan.rate * min(1.0, (step + 1) / (0.1 * len(batches))) * (1 - step / len(batches)))
        optimizer.param_groups[0]["lr"] = rates[-1]
        _mean_loss(model, records[batch]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if checkpoints is not None and (step + 1) % (len(batches) // plan.epochs) == 0:
            weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            moments = adam_moments(optimizer, model)
            mean = float(np.mean(rates[-(len(batches) // plan.epochs) :]))
            checkpoints.append(Checkpoint(weights, mean, moments, f"epoch {len(checkpoints) + 1}"))
    return model.eval()


def _mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.transpose(1, 2), batch[:, 1:])
