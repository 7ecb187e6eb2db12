"""The unsketched gradient: autograd's, of the captured parameters only, and nothing of the model touched."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from models import SPEC, error, llama, oracle, padded_batch, with_lora
from torch import nn

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.losses import language_model


def state(model: nn.Module) -> list[Any]:
    return [(name, p.requires_grad, p.grad, p._version, p.detach().clone()) for name, p in model.named_parameters()] + [
        module.training for module in model.modules()
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool(a == b)

    return all(
        all(equal(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, tuple) else a == b
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("modules", ["lora", ["*q_proj", "*down_proj"]])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_its_sketch_is_the_sum_of_the_captured_rows(modules: Any, checkpointing: bool | None) -> None:
    model, batch = with_lora(llama()) if modules == "lora" else llama(), padded_batch()
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    before = state(model)
    v = gs.gradient(model, batch, language_model, modules)
    assert same(before, state(model))
    assert list(v) == list(parameters_of(model, modules))
    sketch = sum(
        gs.sketch_matrix(SPEC, name, tuple(g.shape)).double() @ g.reshape(-1).double() for name, g in v.items()
    )
    plain = with_lora(llama()) if modules == "lora" else llama()
    rows, _ = oracle(plain, [batch], language_model, SPEC, modules)
    assert error(torch.as_tensor(sketch)[None], rows) <= 1e-5


def test_gradients_that_a_training_loop_holds_are_not_added_to() -> None:
    model, batch = with_lora(llama()), padded_batch()
    for parameter in parameters_of(model).values():
        parameter.grad = torch.ones_like(parameter)
    fired: list[str] = []
    for name, parameter in parameters_of(model).items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    before = state(model)
    gs.gradient(model, batch, language_model)
    assert same(before, state(model))
    assert not fired


def test_a_frozen_captured_parameter_has_its_gradient_too() -> None:
    model, batch = with_lora(llama()), padded_batch()
    expected = gs.gradient(model, batch, language_model)
    frozen = copy.deepcopy(model).requires_grad_(False)
    for name, g in gs.gradient(frozen, batch, language_model).items():
        torch.testing.assert_close(g, expected[name])
    with torch.no_grad():
        assert list(gs.gradient(frozen, batch, language_model)) == list(expected)


def test_the_model_is_left_as_found_after_an_error() -> None:
    model = with_lora(llama()).train()
    before = state(model)

    def fails(model: nn.Module, batch: Any) -> torch.Tensor:
        language_model(model, batch)
        raise ValueError("broken loss")

    with pytest.raises(ValueError, match="broken loss"):
        gs.gradient(model, padded_batch(), fails)
    assert same(before, state(model))


def test_a_loss_that_ignores_the_model_is_refused() -> None:
    with pytest.raises(gs.CaptureError, match="does not depend on any of the 12 captured parameters"):
        gs.gradient(with_lora(llama()), padded_batch(), lambda model, batch: torch.ones(4))


def test_idle_parameters_are_zero_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = with_lora(llama())

    def first_layer(model: Any, batch: Any) -> torch.Tensor:
        hidden = model.get_base_model().model(batch["input_ids"], output_hidden_states=True).hidden_states[1]
        return torch.as_tensor(hidden.square().sum(dim=(1, 2)))

    with caplog.at_level(logging.WARNING):
        v = gs.gradient(model, padded_batch(), first_layer)
    assert "6 captured parameters got no gradient, such as model.layers.1" in caplog.text
    assert all((g == 0).all() == ("layers.1" in name) for name, g in v.items())
