"""The language-model loss against plain formulas: shift, masks, packing, both derivative modes, sampled labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gradsift.engine.losses import IGNORE, counter_uniform, language_model, softmax
from gradsift.kernels.errors import DataError, ShapeError

VOCAB = 41


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def t5() -> Any:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def causal_batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCAB, (3, 7))
    mask = (torch.arange(7) < torch.tensor([7, 4, 2])[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[0, :3] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The textbook formula, one token at a time."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    out = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for i, row in enumerate(batch["labels"].tolist()):
        for t, label in enumerate(row):
            if t and label != IGNORE:
                out[i, t] = torch.logsumexp(logits[i, t - 1], 0) - logits[i, t - 1, label]
    return out


class Bigram(nn.Module):
    """Logits of the next token from this one alone: a language model whose probabilities are known."""

    def __init__(self, vocabulary: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, dtype=dtype))

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_causal_losses_are_the_textbook_formula(make: Any) -> None:
    model, batch = make(), causal_batch()
    expected = plain_tokens(model, batch)
    tokens = language_model.token_losses(model, batch)
    torch.testing.assert_close(tokens.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(language_model(model, batch).double(), expected.sum(1), atol=1e-5, rtol=1e-5)
    assert (tokens[:, 0] == 0).all()
    assert language_model.loss_tokens(batch).tolist() == [4, 3, 1]


def test_sum_over_the_batch_is_the_models_own_loss_times_its_tokens() -> None:
    model, batch = llama(), causal_batch()
    ours = language_model(model, batch).sum() / language_model.loss_tokens(batch).sum()
    torch.testing.assert_close(ours, model(**batch).loss)


def test_without_labels_every_attended_token_counts() -> None:
    model, batch = llama(), causal_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    expected = language_model(model, batch)
    del batch["labels"]
    torch.testing.assert_close(language_model(model, batch), expected)
    assert language_model.loss_tokens(batch).tolist() == [6, 3, 1]


def test_encoder_decoder_labels_are_aligned_and_not_shifted() -> None:
    model = t5()
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, IGNORE, IGNORE]])
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6)), "labels": labels}
    logits = model(**batch).logits.double()
    expected = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
    tokens = language_model.token_losses(model, batch)
    assert tokens.shape == labels.shape
    torch.testing.assert_close(tokens.double(), expected, atol=1e-5, rtol=1e-5)
    assert language_model.loss_tokens(batch).tolist() == [4, 2]
    torch.testing.assert_close(language_model(model, batch).sum() / 6, model(**batch).loss)
    given = model.prepare_decoder_input_ids_from_labels(labels)
    torch.testing.assert_close(language_model.token_losses(model, {**batch, "decoder_input_ids": given}), tokens)


def test_encoder_decoder_needs_labels_and_no_packing() -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(DataError, match="no labels"):
        language_model(t5(), {"input_ids": ids})
    with pytest.raises(DataError, match="pad instead"):
        language_model(t5(), {"input_ids": ids, "labels": ids, "segments": [0, 2, 4]})


@pytest.mark.parametrize("make", [llama, gpt2])
def test_packed_documents_are_the_padded_ones(make: Any) -> None:
    model, batch = make(), causal_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    kept = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][kept][None],
        "labels": batch["labels"][kept][None],
        "attention_mask": torch.ones(1, sum(lengths), dtype=torch.long),
        "segments": torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
        "ids": ["a", "b", "c"],
    }
    for name in ("__call__", "token_losses"):
        torch.testing.assert_close(
            getattr(language_model, name)(model, packed), getattr(language_model, name)(model, batch)
        )
    assert language_model.loss_tokens(packed).tolist() == language_model.loss_tokens(batch).tolist()
    torch.testing.assert_close(
        language_model.sampled(model, packed, [3, 4, 5]), language_model.sampled(model, batch, [3, 4, 5])
    )


@pytest.mark.parametrize("segments", [[0, 3], [1, 4], [0, 5, 4]])
def test_segments_that_do_not_cover_the_row_are_refused(segments: list[int]) -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "segments": segments}
    with pytest.raises(ShapeError, match="expected non-decreasing offsets from 0 to 4"):
        language_model(Bigram(VOCAB), batch)


def test_logits_of_another_length_are_refused() -> None:
    class Longer(Bigram):
        def forward(self, input_ids: Tensor) -> Any:
            return self.table[functional.pad(input_ids, (2, 0))]

    with pytest.raises(ShapeError, match="one row of logits per label"):
        language_model(Longer(VOCAB), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_derivatives_are_autograds_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(softmax, "_CHUNK_NUMBERS", chunk)
    logits = torch.randn(9, VOCAB, dtype=dtype)
    labels = torch.randint(0, VOCAB, (9,))
    labels[[2, 5]] = IGNORE
    step = torch.randn_like(logits)

    def plain(x: Tensor) -> Tensor:
        return functional.cross_entropy(x.double(), labels, reduction="none", ignore_index=IGNORE)

    def ours(x: Tensor) -> Tensor:
        return softmax._TokenLosses.apply(x, labels)  # type: ignore[no-any-return]

    wide = torch.promote_types(dtype, torch.float32)
    value, slope = torch.func.jvp(ours, (logits,), (step,))
    expected, expected_slope = torch.func.jvp(plain, (logits.double(),), (step.double(),))
    assert value.dtype == wide
    torch.testing.assert_close(value, expected.to(wide))
    torch.testing.assert_close(slope, expected_slope.to(wide), atol=1e-5, rtol=1e-5)
    weights = torch.randn(9, dtype=wide)
    leaf = logits.clone().requires_grad_()
    (ours(leaf) * weights).sum().backward()
    reference = logits.double().requires_grad_()
    (plain(reference) * weights.double()).sum().backward()
    torch.testing.assert_close(leaf.grad, reference.grad.to(dtype))


def test_a_bf16_model_is_upcast_before_the_softmax() -> None:
    model, batch = llama().to(torch.bfloat16), causal_batch()
    tokens = language_model.token_losses(model, batch)
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.double(), plain_tokens(model, batch), atol=1e-5, rtol=1e-5)


def test_sampled_labels_depend_on_seed_and_position_only() -> None:
    model, batch = llama(), causal_batch()
    together = language_model.sampled(model, batch, [11, 12, 2**64 + 13])
    for i, seed in enumerate([11, 12, 13]):
        length = int(batch["attention_mask"][i].sum())
        alone = {k: v[i : i + 1, :length] for k, v in batch.items()}
        torch.testing.assert_close(language_model.sampled(model, alone, [seed]), together[i : i + 1])
    assert not torch.equal(together, language_model.sampled(model, batch, [21, 22, 23]))
    with pytest.raises(ShapeError, match="one per example"):
        language_model.sampled(model, batch, [1])


@pytest.mark.parametrize("make", [llama, t5])
def test_sampled_labels_can_be_kept(make: Any) -> None:
    model, batch = make(), causal_batch()
    kept = language_model.sampled_batch(model, batch, [1, 2, 3])
    torch.testing.assert_close(language_model(model, kept), language_model.sampled(model, batch, [1, 2, 3]))
    assert not torch.equal(kept["labels"], batch["labels"])
    assert torch.equal(kept["labels"][:, 1:] == IGNORE, batch["labels"][:, 1:] == IGNORE)


def test_sampled_labels_follow_the_models_probabilities() -> None:
    """Per-token losses name the drawn label: compare how often each came with the softmax, 4 sigma."""
    model, draws = Bigram(5), 4000
    ids = torch.tensor([[2, 3, 1]]).expand(draws, -1)
    labels = torch.tensor([[IGNORE, IGNORE, 0]]).expand(draws, -1)
    drawn = language_model.sampled(model, {"input_ids": ids, "labels": labels}, range(draws)).detach()
    surprise = -model.table[3].detach().log_softmax(0)
    counts = torch.tensor([(abs(drawn - s) < 1e-9).sum() for s in surprise]) / draws
    p = surprise.neg().exp()
    assert (abs(counts - p) <= 4 * (p * (1 - p) / draws).sqrt()).all()


def test_sampled_gradients_average_to_zero_and_their_second_moment_to_the_fisher() -> None:
    model, draws = Bigram(4), 2000
    ids = torch.tensor([[1, 2]])
    p = model.table[1].detach().softmax(0)
    rows = []
    for start in range(0, draws, 500):
        batch = {"input_ids": ids.expand(500, -1)}
        leaf = model.table[1].detach().clone().requires_grad_()

        def loss(row: Tensor, seeds: range = range(start, start + 500), batch: Any = batch) -> Tensor:
            table = torch.cat([model.table[:1].detach(), row[None], model.table[2:].detach()])
            return torch.func.functional_call(_Sampled(model, seeds), {"model.table": table}, (batch,))

        rows.append(torch.autograd.functional.jacobian(loss, leaf))
    grads = torch.cat(rows)
    fisher = torch.diag(p) - torch.outer(p, p)
    assert (abs(grads.mean(0)) <= 4 * (fisher.diag() / draws).sqrt()).all()
    torch.testing.assert_close(grads.T @ grads / draws, fisher, atol=0.035, rtol=0)


class _Sampled(nn.Module):
    def __init__(self, model: nn.Module, seeds: range) -> None:
        super().__init__()
        self.model, self.seeds = model, seeds

    def forward(self, batch: Any) -> Tensor:
        return language_model.sampled(self.model, batch, self.seeds)


def test_a_token_without_probability_is_never_drawn() -> None:
    model = Bigram(4)
    with torch.no_grad():
        model.table[:, [0, 3]] = -torch.inf
    ids = torch.ones(500, 6, dtype=torch.long)
    assert torch.isfinite(language_model.sampled(model, {"input_ids": ids}, range(500))).all()


def test_counter_uniform_is_uniform_and_pinned() -> None:
    values = counter_uniform(np.arange(200)[:, None], np.arange(200)[None])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * values.size)
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(values.size)
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 4 / np.sqrt(values.size)
    assert counter_uniform(np.array([0, 1]), np.array([0, 7])).tolist() == [0.6524484863740322, 0.24696520214533768]


def test_wrappers_are_seen_through() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    model = t5()
    batch = {"input_ids": torch.randint(1, VOCAB, (2, 6)), "labels": torch.randint(1, VOCAB, (2, 3))}
    torch.testing.assert_close(language_model(Wrapper(model), batch), language_model(model, batch))
