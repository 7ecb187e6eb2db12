"""The tap: the same rows from somebody else's backward pass, whose gradients stay the same to the bit."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from models import SPEC, error, llama, one, oracle, padded_batch, with_lora
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs

language_model = gs.losses.language_model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_rows_are_those_of_capture_and_gradients_are_unchanged(checkpointing: bool | None) -> None:
    model, batch = with_lora(llama()).train(), padded_batch()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    plain = copy.deepcopy(model)
    language_model(plain, batch).sum().backward()
    capture = gs.Capture(model, SPEC)
    with capture.tap() as tap:
        language_model(model, batch).sum().backward()
    assert error(tap.values, capture(batch, language_model).values.double()) <= 1e-6
    expected = gradients(plain)
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert tap.conservation is not None
    assert tap.conservation <= 1e-6


def test_scale_undoes_the_token_mean_of_a_hugging_face_loss() -> None:
    model, batch = with_lora(llama()), padded_batch()
    tokens = int(language_model.loss_tokens(batch).sum())
    capture = gs.Capture(model, SPEC)
    with capture.tap(scale=tokens) as tap:
        model(**batch).loss.backward()
    rows, norms = oracle(model, [one(batch, i) for i in range(4)], language_model, SPEC)
    assert error(tap.values, rows) <= 1e-5
    assert error(tap.grad_norm, norms) <= 1e-5


def test_conservation_is_checked_on_the_first_step_only_and_sees_accumulated_gradients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = with_lora(llama()), padded_batch()
    language_model(model, batch).sum().backward()  # gradients that were there before must not count
    capture = gs.Capture(model, SPEC)
    figures = []
    with caplog.at_level(logging.INFO, logger="gradsift.engine.capture.tap"):
        for _ in range(2):
            with capture.tap() as tap:
                language_model(model, batch).sum().backward()
            figures.append(tap.conservation)
    assert figures[0] is not None
    assert figures[0] <= 1e-6
    assert figures[1] is None
    assert "conservation holds" in caplog.text


def test_use_of_a_weight_that_no_map_reports_breaks_conservation() -> None:
    class UsesWeightTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + functional.linear(x, self.linear.weight).square()

    model = UsesWeightTwice()
    capture = gs.Capture(model, SPEC, modules="*")
    with pytest.raises(gs.CaptureError, match="do not add up"), capture.tap():
        model(torch.randn(3, 4, 8)).sum().backward()


def test_frozen_parameters_are_said_not_to_be_checked(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = with_lora(llama()), padded_batch()
    model.requires_grad_(False)
    capture = gs.Capture(model, SPEC)
    with capture.tap() as tap:
        language_model(model, batch).sum().backward()
    assert tap.conservation is None
    assert "not checked: 12 captured parameters are frozen" in caplog.text
    rows, _ = oracle(model, [one(batch, i) for i in range(4)], language_model, SPEC)
    assert error(tap.values, rows) <= 1e-5


def test_two_backward_passes_add_up_but_their_norm_is_unknown() -> None:
    model, batch = with_lora(llama()), padded_batch()
    capture = gs.Capture(model, SPEC)
    with capture.tap() as tap:
        for _ in range(2):
            language_model(model, batch).sum().backward()
    rows, _ = oracle(model, [one(batch, i) for i in range(4)], language_model, SPEC)
    assert error(tap.values, 2 * rows) <= 1e-5
    assert bool(tap.grad_norm.isnan().all())


def test_packed_rows_under_a_tap() -> None:
    model, batch = with_lora(llama()), padded_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    segments = torch.tensor([0, *lengths]).cumsum(0)
    packed: dict[str, Any] = {
        "input_ids": torch.cat([batch["input_ids"][i, :length] for i, length in enumerate(lengths)])[None],
        "segments": segments,
    }
    with gs.Capture(model, SPEC).tap(segments=segments) as tap:
        language_model(model, packed).sum().backward()
    rows, _ = oracle(model, [one(batch, i) for i in range(4)], language_model, SPEC)
    assert error(tap.values, rows) <= 1e-5


def test_bf16_conservation_has_the_tolerance_of_its_weight_gradients() -> None:
    model, batch = with_lora(llama()).to(torch.bfloat16), padded_batch()
    with gs.Capture(model, SPEC).tap() as tap:
        language_model(model, batch).sum().backward()
    assert tap.conservation is not None
    assert tap.conservation < 2e-2


def test_hooks_are_gone_after_an_error_inside_the_block() -> None:
    model = with_lora(llama())
    capture = gs.Capture(model, SPEC)
    with pytest.raises(RuntimeError, match="broken"), capture.tap():
        raise RuntimeError("broken")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_block_without_a_backward_pass_is_named() -> None:
    model, batch = with_lora(llama()), padded_batch()
    with pytest.raises(gs.CaptureError, match="no gradient came back"), gs.Capture(model, SPEC).tap():
        language_model(model, batch)


def test_packed_examples_that_leak_are_refused_on_the_first_step() -> None:
    model = with_lora(llama())
    ids = padded_batch(1)["input_ids"]
    with (
        pytest.raises(gs.CaptureError, match=r"example 1 reaches rows of example 0.*position_ids"),
        gs.Capture(model, SPEC).tap(segments=torch.tensor([0, 5, 11])),
    ):
        model(input_ids=ids, labels=ids).loss.backward()


def test_wrong_batch_axis_is_refused_on_the_first_step() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            return self.linear(x + x.mean(0)).transpose(0, 1)

    model, x = SequenceFirst(), torch.randn(4, 4, 8)
    with pytest.raises(gs.CaptureError, match="axis 0"), gs.Capture(model, SPEC, modules="*").tap():
        model(x).square().sum().backward()
    with gs.Capture(model, SPEC, modules="*").tap(batch_axis=1) as tap:
        model(torch.randn(4, 3, 8)).square().sum().backward()
    assert tap.values.shape == (4, SPEC.dim)
