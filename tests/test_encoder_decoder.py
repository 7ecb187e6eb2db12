"""Losses of an encoder-decoder whose inputs and targets are padded to one width: the first target token counts, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SPEC, VOCAB, error, one, oracle, with_lora
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import gradsift as gs
from gradsift.engine.losses import DPO, IGNORE, Distillation, PolicyGradient

ROWS, WIDTH = 4, 6


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return with_lora(T5ForConditionalGeneration(config).eval(), target_modules=["q", "v"])


def rows(seed: int) -> dict[str, Tensor]:
    """Targets of different lengths, as wide as what the encoder reads."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = torch.randint(1, VOCAB, (2, ROWS, WIDTH), generator=generator)
    ends = torch.tensor([WIDTH - i for i in range(ROWS)])
    return {"input_ids": ids, "labels": labels.masked_fill(torch.arange(WIDTH) >= ends[:, None], IGNORE)}


def logps(model: nn.Module, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Log-probabilities of the labels that count, row by row."""
    scores = model(input_ids=ids, labels=labels, use_cache=False).logits.double().log_softmax(-1)
    kept = [row != IGNORE for row in labels]
    return [s[k].gather(1, row[k][:, None]).squeeze(1) for s, k, row in zip(scores, kept, labels, strict=True)]


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_policy_gradients_are_autograds(aggregate: Any) -> None:
    model, loss = t5(), PolicyGradient(aggregate=aggregate)
    batch = {**rows(1), "owners": torch.tensor([0, 0, 1, 1]), "advantages": torch.tensor([1.0, -0.5, 2.0, 0.3])}

    def plain(model: nn.Module, prompt: dict[str, Any]) -> Tensor:
        said = logps(model, prompt["input_ids"], prompt["labels"])
        sums = torch.stack([p.mean() / 2 if aggregate == "sequence" else p.sum() for p in said])
        return -(prompt["advantages"] * sums).sum()[None]

    alone = [{name: value[2 * i : 2 * i + 2] for name, value in batch.items()} for i in range(2)]
    expected, _ = oracle(model, alone, plain, SPEC)
    got = gs.Capture(model, SPEC)(batch, loss)
    assert error(got.values, expected) <= 1e-5
    assert bool((loss.token_losses(model, batch)[..., 0] != 0).all())


@pytest.mark.parametrize("form", ["sigmoid", "ipo"])
def test_preferences_are_autograds(form: Any) -> None:
    model, loss = t5(), DPO(0.3, form)
    sides = (("chosen", rows(1)), ("rejected", rows(2)))
    batch = {f"{side}_{name}": value for side, found in sides for name, value in found.items()}
    batch |= {f"ref_{side}_logps": -torch.rand(ROWS) for side in ("chosen", "rejected")}

    def plain(model: nn.Module, pair: dict[str, Any]) -> Tensor:
        ratios = []
        for side in ("chosen", "rejected"):
            (said,) = logps(model, pair[f"{side}_input_ids"], pair[f"{side}_labels"])
            ratio = said.sum() - pair[f"ref_{side}_logps"][0].double()
            ratios.append(ratio / len(said) if form == "ipo" else ratio)
        h = ratios[0] - ratios[1]
        return ((h - 1 / 0.6) ** 2 if form == "ipo" else -torch.nn.functional.logsigmoid(0.3 * h))[None]

    expected, _ = oracle(model, [one(batch, i) for i in range(ROWS)], plain, SPEC)
    got = gs.Capture(model, SPEC)(batch, loss)
    assert error(got.values, expected) <= 1e-5
    shares = loss.token_losses(model, batch)
    torch.testing.assert_close(shares.sum(dim=(1, 2)), loss(model, batch))
    assert torch.equal(shares != 0, torch.stack([batch["chosen_labels"], batch["rejected_labels"]], dim=1) != IGNORE)


def test_distillations_are_autograds() -> None:
    model, loss = t5(), Distillation()
    teacher = 3 * torch.randn(ROWS, WIDTH, VOCAB, generator=torch.Generator().manual_seed(3))
    batch = {**rows(1), "teacher_logits": teacher}

    def plain(model: nn.Module, example: dict[str, Any]) -> Tensor:
        labels = example["labels"]
        student = model(input_ids=example["input_ids"], labels=labels, use_cache=False).logits.double().log_softmax(-1)
        q = example["teacher_logits"].double().log_softmax(-1)
        return (q.exp() * (q - student)).sum(-1)[labels != IGNORE].sum()[None]

    expected, _ = oracle(model, [one(batch, i) for i in range(ROWS)], plain, SPEC)
    assert error(gs.Capture(model, SPEC)(batch, loss).values, expected) <= 1e-5
    assert bool((loss.token_losses(model, batch)[:, 0] > 0).all())
