"""Policy gradients on stored rollouts against autograd of the formula written out, one prompt at a time."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import SPEC, VOCAB, error, llama, oracle, with_lora
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.bindings.describe import describe
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.losses import IGNORE, PolicyGradient
from gradsift.engine.scorers.stores import summed_tokens

SIZES = (3, 2, 4)
ROWS, WIDTH = sum(SIZES), 10


def rollouts(**columns: bool) -> dict[str, Any]:
    """Responses of different lengths to prompts of three tokens, in no order; the last prompt's are all right."""
    generator = torch.Generator().manual_seed(7)
    owners = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    owners = owners[torch.randperm(ROWS, generator=generator)]
    ids = torch.randint(0, VOCAB, (ROWS, WIDTH), generator=generator)
    ends = torch.tensor([WIDTH - i % 4 for i in range(ROWS)])
    mask = (torch.arange(WIDTH) < ends[:, None]).long()
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, :3] = IGNORE
    rewards = torch.rand(ROWS, generator=generator)
    rewards[owners == len(SIZES) - 1] = 1.0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "owners": owners, "rewards": rewards}
    near = (
        -torch.rand(ROWS, WIDTH, generator=generator) * 2 - 3.5
    )  # around log(1 / 97), so that some ratios are clipped
    if columns.get("old"):
        batch["old_logprobs"] = near.masked_fill(labels == IGNORE, float("inf"))  # must not be read there
    if columns.get("reference"):
        batch["ref_logprobs"] = near.flip(0).masked_fill(labels == IGNORE, float("nan"))
    return batch


def prompt(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """One prompt alone, without the padding that its responses do not need."""
    rows = (batch["owners"] == index).nonzero().flatten()
    width = int(batch["attention_mask"][rows].sum(1).max())
    alone = {name: value[rows] for name, value in batch.items()}
    alone = {name: value[:, :width] if value.ndim == 2 else value for name, value in alone.items()}
    return {**alone, "owners": torch.zeros(len(rows), dtype=torch.int64)}


def plain(settings: dict[str, Any]) -> Any:
    """The formula for one prompt, token by token."""
    clip, high = settings.get("clip", 0.2), settings.get("clip_high") or settings.get("clip", 0.2)
    beta, temperature = settings.get("beta", 0.0), settings.get("temperature", 1.0)

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        rewards = batch["rewards"].double()
        advantages = rewards - rewards.mean()
        if settings.get("scale_rewards", True):
            advantages = advantages / (rewards.std() + 1e-4)
        responses = []
        for row, advantage in enumerate(advantages):
            length = int(batch["attention_mask"][row].sum())
            logits = model(input_ids=batch["input_ids"][row : row + 1, :length], use_cache=False).logits[0].double()
            tokens = []
            for t in range(3, length):
                now = (logits[t - 1] / temperature).log_softmax(0)[batch["labels"][row, t]]
                if "old_logprobs" in batch:
                    r = (now - batch["old_logprobs"][row, t].double()).exp()
                    token = -torch.min(r * advantage, torch.clip(r, 1 - clip, 1 + high) * advantage)
                else:
                    token = -now * advantage
                if beta:
                    d = batch["ref_logprobs"][row, t].double() - now
                    token = token + beta * (d.exp() - d - 1)
                tokens.append(token)
            responses.append(torch.stack(tokens))
        if settings.get("aggregate") == "sequence":
            return torch.stack([tokens.mean() for tokens in responses]).mean()[None]
        return torch.cat(responses).sum()[None]

    return loss


CASES = [
    ({"beta": 0.04, "clip_high": 0.3}, {"old": True, "reference": True}),
    ({"aggregate": "sequence", "temperature": 0.7, "scale_rewards": False}, {"old": True}),
    ({"aggregate": "sequence", "beta": 0.5}, {"reference": True}),
    ({}, {}),
]


@pytest.mark.parametrize(("settings", "columns"), CASES)
def test_rows_are_autograds_of_the_formula_one_prompt_at_a_time(settings: dict[str, Any], columns: Any) -> None:
    model, batch, loss = with_lora(llama()), rollouts(**columns), PolicyGradient(**settings)
    heard = range(len(SIZES) - (not settings.get("beta")))
    got = gs.Capture(model, SPEC)(batch, loss)
    alone = [prompt(batch, i) for i in range(len(SIZES))]
    rows, norms = oracle(model, alone, plain(settings), SPEC)
    assert error(got.values[heard], rows[heard]) <= 1e-5
    torch.testing.assert_close(got.grad_norm.double(), norms, rtol=1e-5, atol=1e-7)
    expected = torch.cat([plain(settings)(model, one) for one in alone]).detach()
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-4)
    capture = gs.Capture(model, SPEC)
    by_itself = torch.cat([capture(one, loss).values for one in alone])
    assert error(by_itself[heard], got.values[heard].double()) <= 1e-5
    whole = gs.gradient(model, batch, loss)
    total = sum(gs.sketch_matrix(SPEC, n, tuple(g.shape)).double() @ g.double().flatten() for n, g in whole.items())
    assert error(got.values.sum(0)[None], total[None]) <= 1e-5  # type: ignore[index]


@pytest.mark.parametrize(("settings", "columns", "method"), [(*CASES[0], "central"), (*CASES[2], "forward")])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_shares_of_tokens_add_up_to_autograds_dot_products(settings: dict[str, Any], columns: Any, method: Any) -> None:
    model, batch, loss = with_lora(llama()), rollouts(**columns), PolicyGradient(**settings)
    v = gs.gradient(model, prompt(batch, 1), loss)
    exact = gs.rescore(model, batch, loss.token_losses, v, method)
    assert exact.tokens.shape == (len(SIZES), max(SIZES), WIDTH)
    for i in range(len(SIZES)):
        g = gs.gradient(model, prompt(batch, i), loss)
        dot = sum(float((g[name].double() * t.double()).sum()) for name, t in v.items())
        assert abs(float(exact.scores[i]) - dot) <= 2e-3 * float(exact.scores.abs().max())
    tokens = loss.token_losses(model, batch)
    torch.testing.assert_close(tokens.sum((1, 2)), loss(model, batch), rtol=1e-5, atol=1e-5)
    own = (batch["owners"] == 2).nonzero().flatten()
    for place, row in enumerate(own.tolist()):  # a prompt's responses stay in the order of its rows
        length = int(batch["attention_mask"][row].sum())
        assert (tokens[2, place, :3] == 0).all()
        assert (tokens[2, place, length:] == 0).all()
    assert (tokens[1, SIZES[1] :] == 0).all()
    assert loss.loss_tokens(batch).tolist() == [
        int((batch["labels"][batch["owners"] == i] != IGNORE).sum()) for i in range(len(SIZES))
    ]


def test_grpos_first_step_is_the_plain_policy_gradient() -> None:
    """There the ratio is 1 and clips nothing; later, a clipped token has no gradient."""
    model, batch, loss = with_lora(llama()), rollouts(), PolicyGradient()
    old = -gs.losses.language_model.token_losses(
        model, {n: batch[n] for n in ("input_ids", "attention_mask", "labels")}
    )
    capture = gs.Capture(model, SPEC)
    first = capture({**batch, "old_logprobs": old.detach()}, loss)
    assert error(first.values[:2], capture(batch, loss).values[:2].double()) <= 1e-5
    far = {**batch, "old_logprobs": old.detach() - 1, "advantages": torch.ones(ROWS)}
    assert (capture(far, loss).grad_norm == 0).all()
    assert (capture({**far, "advantages": -torch.ones(ROWS)}, loss).grad_norm > 0).all()


def test_advantages_may_be_given_instead() -> None:
    model, batch, loss = with_lora(llama()), rollouts(), PolicyGradient()
    rewards = batch.pop("rewards").double()
    groups = [rewards[batch["owners"] == i] for i in range(len(SIZES))]
    means = torch.stack([g.mean() for g in groups])[batch["owners"]]
    spreads = torch.stack([g.std() for g in groups])[batch["owners"]]
    given = {**batch, "advantages": (rewards - means) / (spreads + 1e-4)}
    torch.testing.assert_close(loss(model, given), loss(model, {**batch, "rewards": rewards}))
    single = prompt({**given, "owners": torch.arange(ROWS)}, 4)
    assert loss(model, single).shape == (1,)
    assert "rewards" not in single


def test_a_prompt_without_an_advantage_is_named_and_its_row_is_zero() -> None:
    model, batch = with_lora(llama()), rollouts()
    assert PolicyGradient().silent(batch).tolist() == [False, False, True]
    norms = gs.Capture(model, SPEC)(batch, PolicyGradient()).grad_norm
    assert norms[2] == 0
    assert (norms[:2] > 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_is_the_model_without_its_adapter_or_another(checkpointing: bool) -> None:
    model, batch, base = with_lora(llama()), rollouts(), llama()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    stored = {**batch, "ref_logprobs": -gs.losses.language_model.token_losses(base, inputs).detach()}
    expected = gs.Capture(model, SPEC)(stored, PolicyGradient(beta=0.3))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    flags = [p.requires_grad for p in model.parameters()]
    capture = gs.Capture(model, SPEC)
    for loss in (PolicyGradient(beta=0.3), PolicyGradient(beta=0.3, reference=base)):
        assert error(capture(batch, loss).values, expected.values.double()) <= 1e-5
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


class Words(nn.Module):
    """Logits of the next token from this one alone, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_sampled_gradients_have_the_divergences_curvature(aggregate: Any) -> None:
    """Their second moment is the Hessian of the aggregated divergence from the policy as it is; 5 sigma."""
    draws, model, loss = 1500, Words(), PolicyGradient(aggregate=aggregate)
    one = {
        "input_ids": torch.tensor([[0, 1, 2], [0, 2, 0]]),
        "labels": torch.tensor([[IGNORE, 1, 2], [IGNORE, 2, IGNORE]]),
        "owners": torch.tensor([0, 0]),
        "rewards": torch.tensor([0.0, 1.0]),
    }
    many = {name: t.repeat(draws, *([1] * (t.ndim - 1))) for name, t in one.items()}
    many["owners"] = torch.arange(draws).repeat_interleave(2)
    drawn = loss.sampled_batch(model, many, range(draws))
    torch.testing.assert_close(loss(model, drawn), loss.sampled(model, many, range(draws)))
    torch.testing.assert_close(loss.token_losses(model, drawn).sum((1, 2)), loss(model, drawn))
    rows = gs.Capture(_Linear(model.table), gs.SketchSpec(kind="identity"), modules="*")(drawn, loss).values.double()
    rows = rows.view(-1, 3, 3).transpose(1, 2).flatten(1)
    logs = model.table.detach().log_softmax(1)
    weights = (
        {(0, 1): 1.0, (0, 2): 1.0, (1, 0): 1.0} if aggregate == "token" else {(0, 1): 0.25, (0, 2): 0.25, (1, 0): 0.5}
    )

    def divergence(table: Tensor) -> Tensor:
        now, ids = table.log_softmax(1), one["input_ids"]
        return sum(
            w * (logs[ids[row, t - (row == 0)]].exp() * (logs - now)[ids[row, t - (row == 0)]]).sum()
            for (row, t), w in weights.items()
        )  # type: ignore[return-value]

    hessian = torch.autograd.functional.hessian(divergence, model.table.detach()).reshape(9, 9)  # type: ignore[no-untyped-call]
    products = rows[:, :, None] * rows[:, None]
    assert ((products.mean(0) - hessian).abs() <= 5 * products.std(0) / draws**0.5 + 1e-6).all()
    alone = {name: value[10:12] for name, value in many.items()} | {"owners": torch.tensor([0, 0])}
    few = loss.sampled_batch(model, alone, [5])
    assert torch.equal(few["drawn"], drawn["drawn"][10:12])


class _Linear(nn.Module):
    """The same as one captured linear map of one-hot tokens; its weight is the table, transposed."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(3, 3, bias=False)
        self.map.weight = nn.Parameter(table.detach().T.float().contiguous())

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.map(functional.one_hot(input_ids, 3).float()))


def test_a_store_of_rollouts_says_what_it_holds(tmp_path: Any) -> None:
    model, loss = with_lora(llama()), PolicyGradient(beta=0.01, aggregate="sequence")
    batch = {**rollouts(), "ids": ["easy", "hard", "solved"]}
    store = gs.extract(model, [batch], loss, tmp_path / "grpo", spec=SPEC, curvature=6, progress=False)
    assert list(store.ids) == ["easy", "hard", "solved"]
    kind = store.metadata["loss"]["kind"]
    assert kind == (
        "policy gradient: ratios clipped to 0.8 and 1.2, mean of the responses' means, divergence 0.01 from the model "
        "without its adapter"
    )
    assert PolicyGradient.from_settings(store.metadata["loss"]["settings"]).kind == kind
    assert PolicyGradient(temperature=0.5, scale_rewards=False).kind.endswith("rewards not scaled, temperature 0.5")
    assert store.curvature is not None
    assert math.isclose(float(store.loss_tokens.sum()), float((batch["labels"] != IGNORE).sum()))  # type: ignore[union-attr]
    assert summed_tokens(store) is None  # they are means already
    assert describe(store)["mean_loss"] == pytest.approx(float(store.loss.mean()))


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_adams_rows_are_of_means_and_means_are_not_divided_again(aggregate: Any, tmp_path: Path) -> None:
    model, batch, loss = with_lora(llama()), {**rollouts(), "ids": [0, 1, 2]}, PolicyGradient(aggregate=aggregate)
    captured = parameters_of(model)
    for parameter in captured.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(captured.values())
    loss(model, batch).sum().backward()
    optimizer.step()
    adam = gs.adam_moments(optimizer, model)
    weights = {name: p.detach().clone() for name, p in captured.items()}
    found = gs.extract(
        model,
        [batch],
        loss,
        tmp_path / "a",
        spec=SPEC,
        curvature=0,
        checkpoints=[gs.Checkpoint(weights, adam=adam)],
        progress=False,
    )

    def mean(model: nn.Module, batch: Any) -> Tensor:
        tokens = loss.loss_tokens(batch) if aggregate == "token" else 1
        return loss(model, batch) / tokens

    mean.owners = loss.owners  # type: ignore[attr-defined]
    expected = gs.Capture(model.eval(), SPEC)(batch, mean, adam=adam)
    torch.testing.assert_close(torch.from_numpy(found.features[:]), expected.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aggregate": "batch"}, "aggregate is 'batch', expected 'token' or 'sequence'"),
        ({"clip": 1.5}, "expected a clip between 0 and 1"),
        ({"beta": -1.0}, "a beta of 0 or more"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ({"reference": "base"}, "reference is 'base', expected 'adapter'"),
    ],
)
def test_options_that_do_not_exist_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(gs.SpecError, match=words):
        PolicyGradient(**settings)
    with pytest.raises(gs.SpecError, match="those of 'dpo', expected those of a policy gradient"):
        PolicyGradient.from_settings({"name": "dpo"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "the batch has no labels"),
        ({"owners": None}, "the batch has no owners"),
        ({"rewards": None}, "neither rewards nor advantages"),
        ({"owners": torch.zeros(3, dtype=torch.int64)}, r"owners has shape \(3,\) and torch.int64 for 9 rows"),
        ({"owners": torch.zeros(ROWS)}, "torch.float32 for 9 rows"),
        ({"owners": torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2])}, "prompt 1 has no response"),
        ({"ids": ["a", "b", "c", "d"]}, "prompt 'd' has no response"),
        ({"ids": ["a", "b"]}, "owners name prompt 2 but the batch has 2 ids"),
        ({"owners": torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])}, "prompt 1 has one response, so its reward"),
        ({"rewards": torch.ones(3)}, r"rewards has shape \(3,\), expected one number for each of 9 responses"),
        ({"advantages": torch.ones(ROWS, WIDTH)}, r"advantages has shape \(9, 10\), expected one number"),
        ({"rewards": torch.full((ROWS,), float("nan"))}, "rewards of response 0 is not finite"),
        ({"old_logprobs": torch.ones(ROWS)}, r"old_logprobs has shape \(9,\), expected \(9, 10\)"),
        ({"ref_logprobs": torch.ones(ROWS, 2)}, r"ref_logprobs has shape \(9, 2\)"),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], words: str) -> None:
    batch = {name: value for name, value in {**rollouts(), **change}.items() if value is not None}
    with pytest.raises((gs.DataError, gs.ShapeError), match=words):
        PolicyGradient(beta=0.1)(with_lora(llama()), batch)


def test_a_reference_that_is_not_there_and_seeds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(gs.DataError, match="give reference=the reference model, or ref_logprobs in the batch"):
        PolicyGradient(beta=0.1)(llama(), rollouts())
    with pytest.raises(gs.ShapeError, match="got 2 seeds for 3 examples"):
        PolicyGradient().sampled(llama(), rollouts(), [1, 2])
