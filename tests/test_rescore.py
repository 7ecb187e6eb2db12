"""Exact scores: equal to autograd's inner products, token by token, whatever the method, and nothing written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models import llama, one, padded_batch, with_lora
from stores import MemoryStore
from test_gradient import same, state
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.answers.rescore import Rescorer
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.losses import language_model

TOLERANCE = {"forward": 1e-5, "central": 1e-3, "auto": 1e-3}


@pytest.fixture
def model() -> Any:
    return with_lora(llama())


@pytest.fixture
def query() -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids}


def products(model: nn.Module, batch: dict[str, Tensor], v: dict[str, Tensor], modules: Any = "lora") -> Tensor:
    """<gradient of each example, v> by autograd, in float64."""
    scores = []
    for i in range(len(batch["input_ids"])):
        g = gs.gradient(model, one(batch, i), language_model, modules)
        scores.append(sum(float((g[name].double() * v[name].double()).sum()) for name in v))
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("method", ["forward", "central", "auto"])
@pytest.mark.parametrize("modules", ["lora", ["*q_proj", "*down_proj"]])
def test_equals_autograd(model: Any, query: Any, method: Any, modules: Any) -> None:
    model = model if modules == "lora" else llama(initializer_range=0.1)
    batch = padded_batch()
    v = gs.gradient(model, query, language_model, modules)
    exact = gs.rescore(model, batch, language_model.token_losses, v, method, modules=modules)
    expected = products(model, batch, v, modules)
    assert (exact.scores - expected).abs().max() <= TOLERANCE[method] * expected.abs().max()
    assert exact.tokens.shape == batch["input_ids"].shape
    torch.testing.assert_close(exact.tokens.sum(dim=1), exact.scores, rtol=0, atol=0)


def test_methods_agree_token_by_token_and_each_token_is_its_own_gradient(model: Any, query: Any) -> None:
    batch = padded_batch(2)
    v = gs.gradient(model, query, language_model)
    forward = gs.rescore(model, batch, language_model.token_losses, v, "forward").tokens
    central = gs.rescore(model, batch, language_model.token_losses, v, "central").tokens
    assert (forward - central).abs().max() <= 1e-3 * forward.abs().max()
    assert (forward[batch["labels"] == -100] == 0).all()
    assert (central[:, 0] == 0).all()
    for t in (1, 5):
        g = gs.gradient(model, batch, lambda m, b, t=t: language_model.token_losses(m, b)[:1, t])
        alone = sum(float((g[name] * v[name]).sum()) for name in v)
        assert abs(alone - float(forward[0, t])) <= 1e-5 * float(forward.abs().max())


@pytest.mark.parametrize("method", ["forward", "central"])
def test_positive_means_that_training_on_it_lowers_the_loss(model: Any, query: Any, method: Any) -> None:
    batch = padded_batch()
    v = gs.gradient(model, query, language_model)
    scores = gs.rescore(model, batch, language_model.token_losses, v, method).scores
    for i in (int(scores.argmax()), int(scores.argmin())):
        trained = with_lora(llama())
        g = gs.gradient(trained, one(batch, i), language_model)
        before = language_model(trained, query).item()
        with torch.no_grad():
            for name, parameter in parameters_of(trained).items():
                parameter -= 1e-4 * g[name]
        assert (language_model(trained, query).item() < before) == bool(scores[i] > 0)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_weights_mode_and_gradients_stay_bit_for_bit(model: Any, query: Any, method: Any) -> None:
    model.train()
    v = gs.gradient(model, query, language_model)
    before = state(model)
    gs.rescore(model, padded_batch(), language_model.token_losses, v, method)
    assert same(before, state(model))

    def fails(model: nn.Module, batch: Any) -> Tensor:
        language_model.token_losses(model, batch)
        raise ValueError("broken loss")

    with pytest.raises(ValueError, match="broken loss"):
        gs.rescore(model, padded_batch(), fails, v, method)
    assert same(before, state(model))


def test_dropout_does_not_come_between_the_two_passes(query: Any) -> None:
    model = with_lora(llama(attention_dropout=0.5), lora_dropout=0.5)
    v = gs.gradient(model, query, language_model)
    calm = gs.rescore(model, padded_batch(), language_model.token_losses, v)
    model.train()
    torch.testing.assert_close(gs.rescore(model, padded_batch(), language_model.token_losses, v).scores, calm.scores)


def test_alone_and_in_a_batch_are_the_same(model: Any, query: Any) -> None:
    batch = padded_batch()
    v = gs.gradient(model, query, language_model)
    together = gs.rescore(model, batch, language_model.token_losses, v, "forward").scores
    for i in range(4):
        alone = gs.rescore(model, one(batch, i), language_model.token_losses, v, "forward").scores
        assert abs(float(alone[0] - together[i])) <= 1e-5 * float(together.abs().max())


def test_half_precision_uses_forward_mode(query: Any) -> None:
    full, batch = with_lora(llama()), padded_batch()
    v = gs.gradient(full, query, language_model)
    expected = gs.rescore(full, batch, language_model.token_losses, v, "forward").scores
    half = with_lora(llama()).to(torch.bfloat16)
    got = gs.rescore(half, batch, language_model.token_losses, v).scores
    assert (got - expected).abs().max() <= 5e-2 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        cast = gs.rescore(full, batch, language_model.token_losses, v).scores
    assert (cast - expected).abs().max() <= 5e-2 * expected.abs().max()
    with pytest.raises(gs.GradsiftError, match=r"computes in torch\.bfloat16.*use method='forward'"):
        gs.rescore(half, batch, language_model.token_losses, v, "central")


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_scores_in_float16_go_with_the_length_of_the_vector(factor: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).half(), torch.randn(6, 4).half()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(model(batch["x"])).sin()

    v = gs.gradient(model, {"x": x[:1]}, lambda m, b: losses(m, b).sum(dim=1), "*")
    scaled = {name: factor * t.double() for name, t in v.items()}
    expected, found = (gs.rescore(model, {"x": x}, losses, each, modules="*").scores for each in (v, scaled))
    assert (found / factor - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_score_that_is_not_finite_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.ones(3, 4)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(model(batch["x"])) * torch.tensor([[1.0], [1e38], [1.0]]) * 1e38

    v = gs.gradient(model, {"x": x}, lambda m, b: m(b["x"]).sum(dim=1), "*")
    with pytest.raises(gs.ShapeError, match=r"exact score of example 1 is .*inf, expected a finite number"):
        gs.rescore(model, {"x": x}, losses, v, "forward", modules="*")
    with pytest.raises(gs.ShapeError, match="exact score of example 1"):
        Rescorer(model, lambda _: [{"x": x}], losses, [v], "forward", "*")(0, np.arange(3))


def test_refusals(model: Any, query: Any) -> None:
    v = gs.gradient(model, query, language_model)
    name = next(iter(v))
    losses, batch = language_model.token_losses, padded_batch()
    missing = {k: g for k, g in v.items() if k != name}
    with pytest.raises(gs.SpecError, match=rf"v lacks {name} \(1 names missing, 0 unknown\)"):
        gs.rescore(model, batch, losses, missing)
    with pytest.raises(gs.SpecError, match=r"v has lm_head\.weight, which the model does not"):
        gs.rescore(model, batch, losses, {**v, "lm_head.weight": torch.ones(3)})
    with pytest.raises(gs.SpecError, match=r"has shape \(3,\), expected"):
        gs.rescore(model, batch, losses, {**v, name: torch.ones(3)})
    with pytest.raises(gs.ShapeError, match="v has length 0"):
        gs.rescore(model, batch, losses, {k: torch.zeros_like(g) for k, g in v.items()})
    with pytest.raises(gs.ShapeError, match=r"shape \(4,\), expected \(examples, tokens\)"):
        gs.rescore(model, batch, language_model, v)
    with pytest.raises(gs.SpecError, match="method is 'exactly'"):
        gs.rescore(model, batch, losses, v, "exactly")  # type: ignore[arg-type]


class NoForwardDerivative(torch.autograd.Function):
    """An operation that only knows its backward pass, like flash attention."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def test_no_forward_derivative_is_said(model: Any, query: Any) -> None:
    v = gs.gradient(model, query, language_model)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return torch.as_tensor(NoForwardDerivative.apply(language_model.token_losses(model, batch)))

    gs.rescore(model, padded_batch(), losses, v, "central")
    with pytest.raises(gs.GradsiftError, match="forward-mode differentiation failed"):
        gs.rescore(model, padded_batch(), losses, v, "forward")


class Steep(nn.Module):
    """Losses that turn within the step of a central difference."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (300 * self.layer(batch["x"])).sin()

    @staticmethod
    def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.as_tensor(model(batch))

    @classmethod
    def loss(cls, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return cls.token_losses(model, batch).sum(dim=1)


def steep_case() -> tuple[Steep, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A model, a batch, a query's gradient, and the exact scores by autograd."""
    model, batch = Steep(), {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(1))}
    v = gs.gradient(model, one(batch, 0), Steep.loss, "layer")
    gradients = [gs.gradient(model, one(batch, i), Steep.loss, "layer") for i in range(6)]
    return model, batch, v, torch.tensor([sum(float((g[name] * v[name]).sum()) for name in v) for g in gradients])


def test_a_rescorer_leaves_central_differences_where_they_depend_on_their_step() -> None:
    model, batch, v, expected = steep_case()
    halves = [{"x": part} for part in batch["x"].split(3)]
    scores = {
        method: Rescorer(model, lambda _: halves, Steep.token_losses, [v], method, "layer")(0, np.arange(6)).scores  # type: ignore[arg-type]
        for method in ("central", "auto")
    }
    assert (scores["central"] - expected).abs().max() > 0.1 * expected.abs().max()
    assert (scores["auto"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_rescorer_says_when_it_cannot(caplog: pytest.LogCaptureFixture) -> None:
    model, batch, v, _ = steep_case()

    def opaque(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.as_tensor(NoForwardDerivative.apply(Steep.token_losses(model, batch)))

    Rescorer(model, lambda _: [batch, batch], opaque, [v], modules="layer")(0, np.arange(12))  # type: ignore[arg-type]
    assert "exact scores may be off by" in caplog.text
    assert len(caplog.records) == 1


def test_two_steps_end_in_the_exact_order(model: Any, query: Any) -> None:
    """A sketch of 64 numbers finds; exact scores decide, over ragged batches."""
    spec = gs.SketchSpec(dim=64)
    batch = padded_batch(12)
    capture = gs.Capture(model, spec)
    rows, asked = capture(batch, language_model), capture(query, language_model)
    v = gs.gradient(model, query, language_model)

    def fetch(rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for i in range(0, len(rows), 5):
            part = {key: value[list(rows[i : i + 5])] for key, value in batch.items()}
            longest = int(part["attention_mask"].sum(dim=1).max())
            yield {key: value[:, :longest] for key, value in part.items()}

    store = MemoryStore(rows.values, norms=rows.grad_norm)
    exact = Rescorer(model, fetch, language_model.token_losses, [v])
    top = gs.topk(store, asked, 4, "dot", rescore=exact)
    expected = products(model, batch, v)
    assert top.rows[0].tolist() == expected.argsort(descending=True)[:4].tolist()
    np.testing.assert_allclose(top.scores[0], expected[top.rows[0]], atol=1e-3 * float(expected.abs().max()))
    assert top.tokens is not None
    np.testing.assert_allclose(top.tokens.sum(axis=2), top.scores, rtol=1e-9)
    cosine = gs.topk(store, asked, 4, "cosine", rescore=exact)
    norms = float(asked.grad_norm[0]) * rows.grad_norm.double()
    assert cosine.rows[0].tolist() == (expected / norms).argsort(descending=True)[:4].tolist()
