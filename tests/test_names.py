"""Canonical names: the same weights carry the same name under every wrapper."""

from __future__ import annotations

import pytest
import torch
from models import SPEC, llama, padded_batch, with_lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gradsift as gs
from gradsift.engine.capture.names import parameter_names

PAIR = ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"]


def table(model: nn.Module, modules: str = "lora") -> list[str]:
    return [row.name for row in gs.Capture(model, SPEC, modules=modules).table]


def test_peft_names_lose_prefix_and_adapter() -> None:
    assert table(with_lora(llama(), target_modules=["q_proj"]))[:2] == PAIR


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, checkpoint_wrapper])
def test_wrappers_around_the_model(wrap: type) -> None:
    assert table(wrap(with_lora(llama(), target_modules=["q_proj"])))[:2] == PAIR


def test_wrappers_inside_the_model() -> None:
    model = with_lora(llama(), target_modules=["q_proj"])
    layers = model.base_model.model.model.layers
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1].self_attn = torch.compile(layers[1].self_attn)
    names = table(model)
    assert names[:2] == PAIR
    assert names[2] == "model.layers.1.self_attn.q_proj.lora_A.weight"


def test_module_that_is_called_like_a_wrapper_keeps_its_name() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)
            self.base_model = nn.Linear(2, 2)

    assert set(parameter_names(Inner()).values()) == {
        f"{name}.{kind}" for name in ("module", "_orig_mod", "base_model") for kind in ("weight", "bias")
    }


def test_base_weight_is_called_the_same_with_and_without_an_adapter() -> None:
    plain = set(parameter_names(llama()).values())
    wrapped = set(parameter_names(with_lora(llama())).values())
    assert plain <= wrapped


def test_glob_matches_canonical_and_plain_names() -> None:
    model = with_lora(llama())
    expected = table(model, "*.q_proj")
    assert expected == [name for name in table(model) if "q_proj" in name]
    assert table(model, "base_model.model.*.q_proj") == expected


def test_gradient_uses_the_names_of_the_table() -> None:
    model = with_lora(llama())
    vector = gs.gradient(model, padded_batch(), gs.losses.language_model)
    assert list(vector) == table(model)
