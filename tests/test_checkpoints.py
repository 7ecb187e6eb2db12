"""Rows at several checkpoints, by group and with Adam: equal to plain autograd, resumable, and the model left alone."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import llama, one, padded_batch, with_lora
from torch import Tensor, nn
from toy import SPEC, ToyLoss, toy_batches, toy_extract, toy_model, tree

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.checkpoints.folder import weights_in
from gradsift.engine.checkpoints.spellings import matched

RATES = (3e-4, 1e-4)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Trained:
    """A toy model after some steps of AdamW, with what it was on the way."""

    def __init__(self, steps: int = 3, seed: int = 0) -> None:
        self.model = toy_model(seed)
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[dict[str, Any]] = []
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, betas=(0.8, 0.99))
        for _ in range(2):
            for batch in toy_batches()[:steps]:
                optimizer.zero_grad()
                ToyLoss()(self.model.eval(), batch).mean().backward()
                optimizer.step()
            self.weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            self.states.append(copy.deepcopy(optimizer.state_dict()))
        self.model.zero_grad(set_to_none=True)

    def checkpoints(self, form: str | None = None) -> list[gs.Checkpoint]:
        return [
            gs.Checkpoint(
                weights,
                rate,
                None if form is None else gs.adam_moments(state, self.model, "*", form),
                name=f"step {rate}",
            )
            for weights, state, rate in zip(self.weights, self.states, RATES, strict=True)
        ]


def at(weights: dict[str, Tensor]) -> nn.Module:
    model = toy_model()
    model.load_state_dict(weights)
    return model.eval()


def gradients(model: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
    """Each example's gradient of the captured weights, float64."""
    model = copy.deepcopy(model).double()
    found = []
    for i in range(len(batch["y"])):
        model.zero_grad()
        ToyLoss()(model, {"x": batch["x"][i : i + 1].double(), "y": batch["y"][i : i + 1]}).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("weight")})
    return found


def updated(grads: dict[str, Tensor], state: dict[str, Any], form: str) -> dict[str, Tensor]:
    """Adam's update by the formula, from the state_dict's own numbers."""
    beta1, beta2, eps = 0.8, 0.99, 1e-8
    numbers = {"0.weight": 0, "3.weight": 2}
    out = {}
    for name, g in grads.items():
        own = state["state"][numbers[name]]
        m = beta1 * own["exp_avg"].double() + (1 - beta1) * g
        v = beta2 * own["exp_avg_sq"].double() + (1 - beta2) * g * g
        if form == "less":
            out[name] = m / (v + eps).sqrt()
        else:
            t = int(own["step"]) + 1
            out[name] = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    return out


def sketched(grads: dict[str, Tensor]) -> Tensor:
    return sum(
        (gs.sketch_matrix(SPEC, n, tuple(g.shape)).double() @ g.reshape(-1) for n, g in grads.items()),
        torch.zeros(SPEC.dim, dtype=torch.float64),
    )


def norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in grads.values()))


def off(got: Any, expected: Any) -> float:
    got, expected = (torch.as_tensor(np.asarray(t)).double().reshape(len(t), -1) for t in (got, expected))
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


# Identity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "less", "torch"])
def test_every_part_is_that_checkpoints_own(tmp_path: Path, form: str | None) -> None:
    run, batches = Trained(), toy_batches()[:3]
    store = toy_extract(tmp_path / "a", batches, checkpoints=run.checkpoints(form), curvature=9)
    assert store.features.shape == (16, 2, SPEC.dim)
    assert [(p["checkpoint"], p["learning_rate"]) for p in store.parts] == [(f"step {r}", r) for r in RATES]
    rows, norms, losses = [], [], []
    for batch in batches:
        for c, weights in enumerate(run.weights):
            grads = gradients(at(weights), batch)
            if form is not None:
                means = [{n: t / int(y + 1) for n, t in g.items()} for g, y in zip(grads, batch["y"], strict=True)]
                grads = [updated(g, run.states[c], form) for g in means]
            rows.append(torch.stack([sketched(g) for g in grads]))
            norms.append(torch.tensor([norm(g) for g in grads]))
            losses.append(ToyLoss()(at(weights), batch).detach())
    pairs = range(0, len(rows), 2)
    expected = torch.cat([torch.stack(rows[i : i + 2], 1) for i in pairs])
    assert off(store.features[:].reshape(32, -1), expected.reshape(32, -1)) <= 1e-5
    assert off(store.grad_norm, torch.cat([torch.stack(norms[i : i + 2], 1) for i in pairs])) <= 1e-5
    assert store.checkpoint_loss is not None
    np.testing.assert_allclose(
        store.checkpoint_loss, torch.cat([torch.stack(losses[i : i + 2], 1) for i in pairs]), rtol=1e-5
    )
    np.testing.assert_array_equal(store.loss, store.checkpoint_loss[:, 1])
    plain = None if form is None else {"kind": "adam", "form": form, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8}
    assert store.metadata["preconditioner"] == plain


def test_curvature_rows_are_plain_gradients_at_each_checkpoint(tmp_path: Path) -> None:
    run = Trained()
    adam = toy_extract(tmp_path / "adam", checkpoints=run.checkpoints("less"))
    plain = toy_extract(tmp_path / "plain", checkpoints=run.checkpoints())
    last = toy_extract(tmp_path / "last", model=at(run.weights[1]))
    assert adam.curvature is not None and plain.curvature is not None and last.curvature is not None
    assert torch.equal(adam.curvature, plain.curvature)
    assert torch.equal(plain.curvature[:, 1], last.curvature)
    np.testing.assert_array_equal(plain.features[:, 1], last.features[:])
    assert plain.metadata["fingerprints"] == last.metadata["fingerprints"]


@pytest.mark.parametrize("kind", ["parameter", "map"])
def test_groups_of_a_lora_model(tmp_path: Path, kind: str) -> None:
    """Each group is the sketch of its parameters alone, and all together are the joint row."""
    model, batch = with_lora(llama()), padded_batch(3)
    spec = gs.SketchSpec(dim=256)
    joint = gs.Capture(model, spec)(batch, gs.losses.language_model)
    capture = gs.Capture(model, spec, groups=kind)
    apart = capture(batch, gs.losses.language_model)
    names = list(apart.groups)
    assert names == capture.group_names and len(names) == (12 if kind == "parameter" else 6)
    assert off(apart.values.sum(1), joint.values) <= 1e-5
    assert off(apart.grad_norm.square().sum(1).sqrt(), joint.grad_norm) <= 1e-6
    parameters = parameters_of(model, "lora")
    for i in range(3):
        grad = gs.gradient(model, one(batch, i), gs.losses.language_model)
        for place, name in enumerate(names):
            own = [n for n in parameters if n == name or n.startswith(f"{name}.")]
            row = sum(gs.sketch_matrix(spec, n, tuple(grad[n].shape)) @ grad[n].reshape(-1) for n in own)
            assert off(apart.values[i, place][None], row[None]) <= 1e-5  # type: ignore[index]
            exact = math.sqrt(sum(float(grad[n].double().square().sum()) for n in own))
            assert float(apart.grad_norm[i, place]) == pytest.approx(exact, rel=1e-5)
    store = gs.extract(
        model, [batch], gs.losses.language_model, tmp_path / "g", spec=spec, groups=kind, curvature=4, progress=False
    )
    assert [part["group"] for part in store.parts] == names
    assert off(store.features[:], apart.values) <= 1e-5
    assert store.curvature is not None and store.curvature.shape == (4, len(names), 256)


def test_checkpoints_are_the_outer_and_groups_the_inner_parts(tmp_path: Path) -> None:
    run = Trained()
    apart = toy_extract(tmp_path / "a", checkpoints=run.checkpoints("less"), groups="parameter")
    joint = toy_extract(tmp_path / "b", checkpoints=run.checkpoints("less"))
    order = [(part["checkpoint"], part["group"]) for part in apart.parts]
    assert order == [(f"step {r}", n) for r in RATES for n in ("0.weight", "3.weight")]
    assert off(apart.features[:].reshape(-1, 2, 2, SPEC.dim).sum(2), joint.features[:]) <= 1e-5


def test_parts_of_the_loss_stand_between_checkpoints_and_groups(tmp_path: Path) -> None:
    class TwoParts(ToyLoss):
        parts = ({"timestep": 1.0}, {"timestep": 2.0})

        def owners(self, batch: Any) -> list[int]:
            return list(range(2 * len(batch["y"])))

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            both = {key: value.repeat_interleave(2, 0) for key, value in batch.items() if key != "ids"}
            weight = torch.tensor([1.0, 3.0]).repeat(len(batch["y"]))
            return super().__call__(model, both) * weight

    run, batches = Trained(), toy_batches()[:2]
    loss = TwoParts()
    store = toy_extract(tmp_path / "a", batches, loss_fn=loss, checkpoints=run.checkpoints(), groups="map", curvature=0)
    assert [(p["learning_rate"], p["timestep"], p["group"]) for p in store.parts] == [
        (rate, t, g) for rate in RATES for t in (1.0, 2.0) for g in ("0", "3")
    ]
    rows = store.features[:].reshape(12, 2, 2, 2, SPEC.dim)
    np.testing.assert_allclose(rows[:, :, 1], 3 * rows[:, :, 0], rtol=1e-5, atol=1e-6)
    folded = gs.Capture(at(run.weights[1]), SPEC, "*", groups="map")(batches[0], loss).fold(2)
    assert off(folded.values, store.features[:5][:, 4:]) <= 1e-5 and folded.groups == ()


def test_an_example_without_a_gradient_has_no_update() -> None:
    """Momentum alone is nobody's: a row of it would rank an example that teaches nothing."""
    model, batch = with_lora(llama()), padded_batch(3)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    parameters = parameters_of(model, "lora")
    moments = gs.AdamMoments(
        {n: torch.randn_like(p) for n, p in parameters.items()},
        {n: torch.rand_like(p) for n, p in parameters.items()},
        {},
    )
    rows = gs.Capture(model, gs.SketchSpec(dim=256))(batch, gs.losses.language_model, adam=moments)
    assert rows.values[0].any() and rows.values[2].any() and not rows.values[1].any()
    assert rows.grad_norm[1] == 0 < rows.grad_norm[0]
    assert rows.preconditioner == moments.preconditioner


def test_a_weight_used_twice_is_one_gradient_and_two_passes_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).tanh())

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 6)
    shape = (6, 6)
    moments = gs.AdamMoments({"inner.weight": torch.randn(shape)}, {"inner.weight": torch.rand(shape)}, {})
    spec = gs.SketchSpec(kind="identity")
    capture = gs.Capture(model, spec, "*")
    got = capture({"x": x}, lambda m, b: m(b["x"]).square().sum(1), adam=moments)
    for i in range(3):
        grad = torch.autograd.grad(model(x[i : i + 1]).square().sum(), model.inner.weight)[0]
        assert off(got.values[i][None], moments.step("inner.weight")(grad[None]).flatten(1)) <= 1e-5

    def two_passes(module: nn.Module, batch: Any) -> Tensor:
        module(batch["x"]).square().sum().backward()
        return module(batch["x"]).square().sum(1)

    with pytest.raises(gs.CaptureError, match="inner got gradients in several backward passes"):
        capture({"x": x}, two_passes, adam=moments)


# The model, and resuming ---------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


class StoppingLoss(ToyLoss):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise StopError
        return super().__call__(model, batch)


@pytest.mark.parametrize("after", [1, 6, 10**6])
def test_the_model_gets_its_own_weights_back(tmp_path: Path, after: int) -> None:
    run = Trained()
    model = toy_model(seed=7)
    model[0].weight.data[0, 0] = float("nan")  # bits that no comparison of values would see
    before = {n: p.detach().clone().view(torch.int32) for n, p in model.named_parameters()}
    places = [p.data_ptr() for p in model.parameters()]
    try:
        toy_extract(
            tmp_path / "a", model=model, loss_fn=StoppingLoss(after), checkpoints=run.checkpoints(), curvature=0
        )
    except StopError:
        assert after < 100
    assert all(torch.equal(p.detach().view(torch.int32), before[n]) for n, p in model.named_parameters())
    assert [p.data_ptr() for p in model.parameters()] == places
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("after", [3, 9, 14])
def test_resumed_store_is_byte_identical(tmp_path: Path, after: int) -> None:
    run = Trained()
    settings: dict[str, Any] = {"checkpoints": run.checkpoints("less"), "groups": "map"}
    toy_extract(tmp_path / "whole", **settings)
    with pytest.raises(StopError):
        toy_extract(tmp_path / "parts", loss_fn=StoppingLoss(after), **settings)
    toy_extract(tmp_path / "parts", **settings)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    toy_extract(tmp_path / "parts", loss_fn=StoppingLoss(0), **settings)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    run = Trained()
    toy_extract(tmp_path / "a", checkpoints=run.checkpoints("less"))
    moved = run.checkpoints("less")
    moved[0].weights["0.weight"][0, 0] += 1  # type: ignore[index]
    momentum = Trained().checkpoints("less")
    next(iter(momentum[1].adam.first.values()))[0, 0] += 1  # type: ignore[union-attr]
    fresh = Trained().checkpoints("less")
    slower = [fresh[0], gs.Checkpoint(fresh[1].weights, 2e-4, fresh[1].adam, "step 0.0001")]
    for other, words in (
        ({"checkpoints": moved}, "fingerprints of checkpoint 'step 0.0003' was"),
        ({"checkpoints": momentum}, "the adam of checkpoint 'step 0.0001' was"),
        ({"checkpoints": slower}, "the learning rate of checkpoint 'step 0.0001' was 0.0001 and is now 0.0002"),
        ({"checkpoints": fresh[:1]}, "the number of checkpoints was 2 and is now 1"),
        ({"checkpoints": Trained().checkpoints()}, "the adam of checkpoint 'step 0.0003' was"),
        ({}, "the number of checkpoints was 2 and is now 0"),
        ({"checkpoints": fresh, "groups": "map"}, "the number of parts was 2 and is now 4"),
    ):
        with pytest.raises(gs.StoreError, match=words):
            toy_extract(tmp_path / "a", **other)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = Trained()
    first, second = run.weights
    adam = run.checkpoints("less")

    def refused(checkpoints: list[gs.Checkpoint], words: str) -> None:
        with pytest.raises(gs.DataError, match=words):
            toy_extract(tmp_path / "a", checkpoints=checkpoints)

    refused([], "checkpoints is empty")
    refused([gs.Checkpoint({"0.weight": first["0.weight"]})], "lacks 1 of 2 captured parameters, such as 3.weight")
    refused([gs.Checkpoint({**first, "4.weight": first["0.weight"]})], "holds '4.weight', which this model does not")
    refused([gs.Checkpoint({**first, "0.weight": first["3.weight"]})], "expected \\(16, 8\\)")
    weights_only = {n: t for n, t in second.items() if n.endswith("weight")}
    refused([gs.Checkpoint(first), gs.Checkpoint(weights_only)], "checkpoint '0' holds 0.bias and checkpoint '1' does")
    refused([gs.Checkpoint(first, name="a"), gs.Checkpoint(second, name="a")], "two checkpoints are called 'a'")
    refused([gs.Checkpoint(first, 1e-3), gs.Checkpoint(second)], "checkpoint '1' has no learning rate and others")
    refused([adam[0], gs.Checkpoint(second, 1e-4)], "give all of them moments of one kind, or none")
    refused([gs.Checkpoint(tmp_path / "nothing")], "does not exist")
    refused([gs.Checkpoint(tmp_path)], "neither adapter_model.safetensors nor model.safetensors")
    assert not (tmp_path / "a").exists()
    with pytest.raises(gs.DataError, match="learning rate of a checkpoint is -1"):
        gs.Checkpoint(first, -1.0)


def test_weights_may_be_partial_when_they_hold_what_is_captured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the checkpoint does not hold stays, and trainable parameters that stay are named."""
    run = Trained()
    own = {n: t for n, t in run.weights[0].items() if n.endswith("weight")}
    model = at(run.weights[0])
    with torch.no_grad():
        model[0].weight.zero_()
    store = toy_extract(tmp_path / "a", model=model, checkpoints=[gs.Checkpoint(own)])
    assert "2 trainable parameters are not in the checkpoints, such as 0.bias" in caplog.text
    whole = toy_extract(tmp_path / "b", model=at(run.weights[0]))
    np.testing.assert_array_equal(store.features[:], whole.features[:])
    assert store.parts[0]["learning_rate"] == 1.0 and store.features.shape == whole.features.shape


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapter_of_an_embedding_is_known_as_peft_saves_it(tmp_path: Path) -> None:
    model = with_lora(llama(), target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(tmp_path)
    saved = weights_in(tmp_path)
    assert any(name.endswith("lora_embedding_A") for name in saved)
    for target, value in matched(model, saved, "the adapter"):
        assert torch.equal(target, value)
