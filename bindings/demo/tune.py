"""The demo's training loop, and the trick that makes it fit in minutes: frozen lower layers are computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradsift.bindings.data import Dataset
from gradsift.engine.losses import IGNORE

__all__ = ["Plan", "lower_states", "tune"]

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How the demo trains: AdamW, warm-up over a tenth of the steps, then down to 0 in a straight line.

    Attributes:
        epochs, batch: passes over the data, and records per step.
        rate: highest learning rate.
        seed: of the order of the records.
    """

    epochs: int
    batch: int
    rate: float
    seed: int = 0


def tune(
    model: Any,
    data: Dataset,
    rows: Sequence[int],
    plan: Plan,
    states: Sequence[Tensor] = (),
    report: Callable[[int, int], None] = lambda step, steps: None,
) -> float:
    """Train the model's trainable parameters on some records, each step on the mean loss of its counted tokens.

    The model (a Llama, perhaps inside PEFT) trains in the mode in which it is; it has no dropout.

    Args:
        rows: which records of ``data``.
        states: ``lower_states`` of all records of ``data``, or nothing.
        report: called after each step with steps done and steps in all.

    Returns:
        Mean loss per token over the last epoch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(plan.seed)
    steps = plan.epochs * -(-len(rows) // plan.batch)
    warm = max(1, steps // 10)
    step, loss_sum, tokens = 0, 0.0, 0
    decoder = _decoder(model)
    with _only(decoder, decoder.layers[_frozen(decoder) :] if states else decoder.layers):
        for _ in range(plan.epochs):
            loss_sum, tokens = 0.0, 0
            for chosen in torch.randperm(len(rows), generator=order).split(plan.batch):
                losses = _losses(model, data, [rows[i] for i in chosen.tolist()], states)
                losses.mean().backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                rate = plan.rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                loss_sum, tokens = loss_sum + float(losses.detach().sum()), tokens + len(losses)
                report(step, steps)
    return loss_sum / tokens


def lower_states(model: Any, data: Dataset) -> list[Tensor]:
    """What enters the first layer that is trained, for each record: (tokens, hidden), without padding.

    The layers below are frozen, so this is the same in every epoch and in every retraining.
    """
    decoder = _decoder(model)
    layers = decoder.layers[: _frozen(decoder) + 1]
    found: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.extend(state[:length].clone() for state, length in zip(inputs[0], lengths, strict=True))

    handle = layers[-1].register_forward_pre_hook(keep)
    try:
        with torch.no_grad(), _only(decoder, layers):
            for start in range(0, len(data), _AT_ONCE):
                batch = data.fetch(range(start, min(start + _AT_ONCE, len(data))))
                lengths = batch["attention_mask"].sum(dim=1).tolist()
                decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        handle.remove()
    return found


def _losses(model: Any, data: Dataset, rows: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """Loss of every counted token of these records; the head is computed for these tokens only."""
    batch = data.fetch(rows)
    inputs = {"attention_mask": batch["attention_mask"]}
    if states:
        inputs["inputs_embeds"] = nn.utils.rnn.pad_sequence([states[row] for row in rows], batch_first=True)
    else:
        inputs["input_ids"] = batch["input_ids"]
    hidden = _decoder(model)(**inputs, use_cache=False).last_hidden_state[:, :-1]
    target = batch["labels"][:, 1:]
    counted = target != IGNORE
    return cross_entropy(model.get_output_embeddings()(hidden[counted]), target[counted], reduction="none")


def _decoder(model: Any) -> Any:
    """What has ``embed_tokens`` and ``layers``."""
    return next(m for m in model.modules() if hasattr(m, "embed_tokens") and hasattr(m, "layers"))


def _frozen(decoder: Any) -> int:
    """Layers below the first that has a trainable parameter."""
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in decoder.layers]
    return trained.index(True)


@contextmanager
def _only(decoder: Any, layers: nn.ModuleList) -> Iterator[None]:
    """The decoder consists of these layers."""
    whole = decoder.layers
    decoder.layers = layers
    try:
        yield
    finally:
        decoder.layers = whole
