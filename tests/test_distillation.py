"""Distillation against autograd of both divergences written out, whole and of the likeliest tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SPEC, VOCAB, error, llama, one, oracle, padded_batch, with_lora
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.engine.losses import IGNORE, Distillation, language_model


def taught(k: int | None = None, temperature: float = 1.0) -> dict[str, Any]:
    """A padded batch with a teacher's numbers: all of them, or the k likeliest."""
    batch: dict[str, Any] = padded_batch()
    batch["labels"][:, :2] = IGNORE
    logits = 3 * torch.randn(*batch["input_ids"].shape, VOCAB, generator=torch.Generator().manual_seed(3))
    if k is None:
        return {**batch, "teacher_logits": logits}
    top = (logits / temperature).log_softmax(-1).topk(k)
    return {**batch, "teacher_topk_logprobs": top.values, "teacher_topk_ids": top.indices}


def plain(direction: str, temperature: float) -> Any:
    """The formula for one example, token by token."""

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        length = int(batch["attention_mask"].sum())
        logits = model(input_ids=batch["input_ids"][:, :length], use_cache=False).logits[0].double()
        tokens = []
        for t in range(2, length):
            p = (logits[t - 1] / temperature).softmax(0)
            if "teacher_logits" in batch:
                q = (batch["teacher_logits"][0, t - 1].double() / temperature).softmax(0)
            else:
                q = batch["teacher_topk_logprobs"][0, t - 1].double().exp()
                p = p[batch["teacher_topk_ids"][0, t - 1]]
                p, q = (torch.cat([each, 1 - each.sum()[None]]) for each in (p, q))
            a, b = (q, p) if direction == "forward" else (p, q)
            tokens.append((a * (a.log() - b.log())).sum())
        return torch.stack(tokens).sum()[None]

    return loss


@pytest.mark.parametrize(("direction", "temperature"), [("forward", 1.0), ("reverse", 2.0)])
@pytest.mark.parametrize("k", [None, 5])
def test_rows_and_exact_scores_are_autograds_of_the_formula(direction: Any, temperature: float, k: int | None) -> None:
    model, batch, loss = with_lora(llama()), taught(k, temperature), Distillation(direction, temperature)
    capture = gs.Capture(model, SPEC)
    got = capture(batch, loss)
    examples = [one(batch, i) for i in range(4)]
    formula = plain(direction, temperature)
    rows, norms = oracle(model, examples, formula, SPEC)
    assert error(got.values, rows) <= 1e-5
    torch.testing.assert_close(got.grad_norm.double(), norms, rtol=1e-5, atol=0)
    expected = torch.cat([formula(model, example) for example in examples]).detach()
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-5)
    alone = torch.cat([capture(example, loss).values for example in examples])
    assert error(alone, got.values.double()) <= 1e-5
    tokens = loss.token_losses(model, batch)
    torch.testing.assert_close(tokens.sum(1), got.loss)
    assert (tokens[batch["labels"] == IGNORE] == 0).all()
    assert loss.loss_tokens(batch).tolist() == (batch["labels"] != IGNORE).sum(1).tolist()
    v = gs.gradient(model, examples[0], loss)
    # 2e-3: a random teacher's divergences are large, so that rounding is more of a central difference than usual.
    exact = gs.rescore(model, batch, loss.token_losses, v)
    for i, example in enumerate(examples):
        g = gs.gradient(model, example, loss)
        dot = sum(float((g[name].double() * t.double()).sum()) for name, t in v.items())
        assert abs(float(exact.scores[i]) - dot) <= 2e-3 * float(exact.scores.abs().max())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_forward_mode_works(direction: Any) -> None:
    model, batch, loss = with_lora(llama()), taught(4), Distillation(direction)
    v = gs.gradient(model, batch, loss)
    forward = gs.rescore(model, batch, loss.token_losses, v, "forward").scores
    square = sum(float(t.double().square().sum()) for t in v.values())
    assert abs(float(forward.sum()) - square) <= 1e-5 * square


def test_a_certain_teacher_is_the_language_models_loss() -> None:
    """Its entropy is zero; and a top k of the whole vocabulary is the whole."""
    model, batch = with_lora(llama()), taught()
    certain = functional.one_hot(batch["input_ids"].roll(-1, 1), VOCAB).float().log()
    hard = {**batch, "teacher_logits": certain}
    torch.testing.assert_close(
        Distillation()(model, hard), language_model(model, {n: t for n, t in batch.items() if n != "teacher_logits"})
    )
    capture = gs.Capture(model, SPEC)
    assert capture(hard, Distillation()).values.isfinite().all()
    for direction in ("forward", "reverse"):
        loss = Distillation(direction)  # type: ignore[arg-type]
        assert error(capture(taught(VOCAB), loss).values, capture(taught(), loss).values.double()) <= 1e-4


def test_packed_documents_are_the_padded_ones() -> None:
    model, batch = with_lora(llama()), taught()
    kept = batch["attention_mask"].bool()
    lengths = kept.sum(1)
    packed = {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept][None],
        "teacher_logits": batch["teacher_logits"][kept][None],
        "segments": [0, *lengths.cumsum(0).tolist()],
    }
    torch.testing.assert_close(Distillation()(model, packed), Distillation()(model, batch))
    torch.testing.assert_close(Distillation().token_losses(model, packed), Distillation().token_losses(model, batch))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_labels_are_the_students_own(temperature: float) -> None:
    """At a temperature they are those of a language model whose logits are divided by it."""
    model, batch, loss = with_lora(llama()), taught(3), Distillation(temperature=temperature)
    drawn = loss.sampled_batch(model, batch, range(4))
    torch.testing.assert_close(loss(model, drawn), loss.sampled(model, batch, range(4)))
    torch.testing.assert_close(loss.token_losses(model, drawn).sum(1), loss(model, drawn))
    seen = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    tempered = gs.losses.LanguageModelLoss(temperature)
    torch.testing.assert_close(tempered.sampled(model, seen, range(4)), loss(model, drawn))
    logits = model(**{n: seen[n] for n in ("input_ids", "attention_mask")}).logits[0, :-1] / temperature
    first = functional.cross_entropy(logits, drawn["drawn"][0, 1:], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(loss(model, drawn)[0], first)
    assert Distillation.from_settings(loss.settings).kind == loss.kind
    assert loss.kind == f"distillation: forward divergence at temperature {temperature:g}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_logits": None}, "the batch has nothing of the teacher, expected teacher_logits, or"),
        ({"teacher_topk_ids": torch.zeros(4, 11, 2)}, "has teacher_logits and teacher_topk_ids of the teacher"),
        ({"teacher_logits": torch.zeros(4, 11, 7)}, r"shape \(4, 11, 7\), expected those of the student \(4, 11, 97\)"),
        (
            {
                "teacher_logits": None,
                "teacher_topk_logprobs": torch.zeros(4, 11, 3),
                "teacher_topk_ids": torch.zeros(4, 11, 2, dtype=torch.int64),
            },
            r"teacher_topk_ids \(4, 11, 2\), expected \(4, 11, 'k'\) of both",
        ),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], words: str) -> None:
    batch = {name: value for name, value in {**taught(), **change}.items() if value is not None}
    with pytest.raises((gs.DataError, gs.ShapeError), match=words):
        Distillation()(llama(), batch)


def test_options_that_do_not_exist_are_refused() -> None:
    with pytest.raises(gs.SpecError, match="direction is 'both', expected 'forward' or 'reverse'"):
        Distillation("both")  # type: ignore[arg-type]
    with pytest.raises(gs.SpecError, match="temperature is -1, expected a positive number"):
        Distillation(temperature=-1)
    with pytest.raises(gs.SpecError, match="those of 'dpo', expected those of a distillation"):
        Distillation.from_settings({"name": "dpo"})
