"""Denoisers of diffusers from random configurations: identity per example and conservation for the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from models import error, fill
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-5
IDENTITY = gs.SketchSpec(kind="identity")
N, K = 3, 2
TEXT = 6


class Case(NamedTuple):
    """A denoiser, what LoRA goes on (attention, feed-forward, convolutions), and its inputs for some rows."""

    build: Callable[[], Any]
    targets: str
    inputs: Callable[[int], dict[str, Tensor]]
    zero: str = ""
    """A map whose gradient is zero: its output is dropped, as of the last block's text queries."""


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _timesteps(rows: int) -> Tensor:
    return torch.arange(rows) * 97 % 1000


def _unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        num_class_embeds=5,
    )


def _unet_inputs(rows: int) -> dict[str, Tensor]:
    labels = torch.arange(rows) % 5
    return {"sample": _random(rows, 2, 8, 8), "timestep": _timesteps(rows), "class_labels": labels}


def _text_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT,
        attention_head_dim=2,
    )


def _text_unet_inputs(rows: int) -> dict[str, Tensor]:
    return {
        "sample": _random(rows, 2, 8, 8),
        "timestep": _timesteps(rows),
        "encoder_hidden_states": _random(rows, 5, TEXT),
    }


def _dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        norm_num_groups=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
    )


def _dit_inputs(rows: int) -> dict[str, Tensor]:
    labels = torch.arange(rows) % 5
    return {"hidden_states": _random(rows, 2, 4, 4), "timestep": _timesteps(rows), "class_labels": labels}


def _mmdit() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=8,
        pooled_projection_dim=TEXT,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def _mmdit_inputs(rows: int) -> dict[str, Tensor]:
    return {
        "hidden_states": _random(rows, 2, 4, 4),
        "timestep": _timesteps(rows),
        "encoder_hidden_states": _random(rows, 5, TEXT),
        "pooled_projections": _random(rows, TEXT),
    }


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(2, 2, 4),
    )


def _flux_inputs(rows: int) -> dict[str, Tensor]:
    """Latents of 4 x 4 in packs of 2 x 2: four tokens."""
    places = torch.stack([torch.zeros(4), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])], dim=1)
    return {
        "hidden_states": _random(rows, 4, 8),
        "timestep": _timesteps(rows) / 1000,
        "encoder_hidden_states": _random(rows, 5, TEXT),
        "pooled_projections": _random(rows, TEXT),
        "img_ids": places,
        "txt_ids": torch.zeros(5, 3),
    }


ATTENTION = r"to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out"
CONVOLUTIONS = r"conv\d?|conv_in|conv_out|conv_shortcut|proj_in"
CASES = {
    "unet": Case(_unet, rf".*\b({ATTENTION}|{CONVOLUTIONS}|time_emb_proj)", _unet_inputs),
    "unet with text": Case(_text_unet, rf".*\b({ATTENTION}|{CONVOLUTIONS})", _text_unet_inputs),
    "dit": Case(_dit, rf".*\b({ATTENTION})|pos_embed\.proj|.*norm1\.linear", _dit_inputs),
    "mmdit": Case(_mmdit, rf".*\b({ATTENTION})|pos_embed\.proj|context_embedder", _mmdit_inputs, "1.attn.add_q_proj"),
    "flux": Case(_flux, rf".*\b({ATTENTION})|x_embedder|.*norm\.linear", _flux_inputs),
}


class Squares:
    """Mean square of each prediction against a target, summed over an example's rows."""

    def __init__(self, owners: Tensor | None = None) -> None:
        self._owners = owners

    def owners(self, batch: dict[str, Tensor]) -> Tensor | None:
        return self._owners

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch).sample
        target = torch.linspace(-1, 1, output[0].numel()).view(output.shape[1:])
        loss = (output - target).square().flatten(1).mean(1)
        return loss if self._owners is None else loss.new_zeros(N).index_add(0, self._owners, loss)


def of_row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row; the places of tokens have no batch axis."""
    return {key: value if key.endswith("_ids") else value[row : row + 1] for key, value in inputs.items()}


def full(case: str) -> tuple[Any, list[str]]:
    """Every parameter filled: zero-initialised gates would leave whole blocks without a gradient."""
    torch.manual_seed(0)
    model = CASES[case].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, ["*"]


def lora(case: str) -> tuple[Any, str]:
    model, _ = full(case)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=CASES[case].targets)
    return fill(get_peft_model(model, config).eval()), "lora"


def by_autograd(model: nn.Module, modules: Any, inputs: dict[str, Tensor], owners: Tensor) -> Tensor:
    """Gradients of the captured parameters, one row at a time, in table order; summed by owner."""
    model = copy.deepcopy(model)
    parameters = list(parameters_of(model, modules).values())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    rows = []
    for row in range(len(owners)):
        grads = torch.autograd.grad(
            Squares()(model, of_row(inputs, row)).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]).double())
    stacked = torch.stack(rows)
    return stacked.new_zeros(N, stacked.shape[1]).index_add(0, owners, stacked)


@pytest.mark.parametrize("kind", [lora, full], ids=["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_the_gradients_of_single_examples(case: str, kind: Callable[[str], tuple[Any, Any]]) -> None:
    model, modules = kind(case)
    inputs = CASES[case].inputs(N)
    capture = gs.Capture(model, IDENTITY, modules=modules)
    features = capture(inputs, Squares())
    expected = by_autograd(model, modules, inputs, torch.arange(N))
    assert error(features.values, expected) <= TOLERANCE
    assert error(features.grad_norm, expected.norm(dim=1)) <= TOLERANCE
    assert capture.probed
    zero = {
        row.name for row, part in zip(capture.table, split(capture, features.values), strict=True) if not part.any()
    }
    assert zero == {row.name for row in capture.table if CASES[case].zero and CASES[case].zero in row.name}
    kinds = {found.kind for found in capture.maps}
    assert kinds == ({"lora"} if kind is lora else {"linear"} if case == "flux" else {"linear", "conv2d"})


def split(capture: gs.Capture, values: Tensor) -> list[Tensor]:
    """Rows of an identity sketch by parameter."""
    return list(values.split([torch.Size(row.shape).numel() for row in capture.table], dim=1))


@pytest.mark.parametrize("kind", [lora, full], ids=["lora", "full"])
@pytest.mark.parametrize("case", CASES)
def test_tap_conserves_the_whole_model(case: str, kind: Callable[[str], tuple[Any, Any]]) -> None:
    model, modules = kind(case)
    capture = gs.Capture(model, gs.SketchSpec(dim=256), modules=modules)
    with capture.tap() as tap:
        Squares()(model, CASES[case].inputs(N)).mean().backward()
    assert tap.conservation is not None
    assert tap.conservation <= TOLERANCE
    assert capture.probed


@pytest.mark.parametrize(
    ("case", "order"), [*((case, "example-major") for case in CASES), ("unet", "measurement-major")]
)
def test_measurements_of_an_example_are_summed(case: str, order: str) -> None:
    model, modules = lora(case)
    owners = torch.arange(N).repeat_interleave(K) if order == "example-major" else torch.arange(N).repeat(K)
    inputs = CASES[case].inputs(N * K)
    features = gs.Capture(model, IDENTITY, modules=modules)(inputs, Squares(owners))
    expected = by_autograd(model, modules, inputs, owners)
    assert error(features.values, expected) <= TOLERANCE
    assert error(features.grad_norm, expected.norm(dim=1)) <= TOLERANCE


@pytest.mark.parametrize("case", ["unet", "mmdit"])
def test_adapter_that_was_loaded_frozen(case: str) -> None:
    trained, _ = lora(case)
    base, _ = full(case)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=CASES[case].targets, inference_mode=True)
    loaded = get_peft_model(base, config).eval()
    set_peft_model_state_dict(loaded, get_peft_model_state_dict(trained))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    rows = [gs.Capture(model, gs.SketchSpec(dim=256))(CASES[case].inputs(N), Squares()) for model in (trained, loaded)]
    assert rows[0].table == rows[1].table
    assert torch.equal(rows[0].values, rows[1].values)


@pytest.mark.parametrize("case", ["unet with text", "dit"])
def test_gradient_checkpointing(case: str) -> None:
    plain, modules = lora(case)
    model = copy.deepcopy(plain)
    model.base_model.model.enable_gradient_checkpointing()
    inputs = CASES[case].inputs(N)
    features = gs.Capture(model, IDENTITY, modules=modules)(inputs, Squares())
    assert error(features.values, by_autograd(plain, modules, inputs, torch.arange(N))) <= TOLERANCE


def test_channels_last_unet() -> None:
    model, modules = full("unet with text")
    inputs = _text_unet_inputs(N)
    plain = gs.Capture(model, IDENTITY, modules=modules)(inputs, Squares())
    model.to(memory_format=torch.channels_last)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert (
        error(gs.Capture(model, IDENTITY, modules=modules)(inputs, Squares()).values, plain.values.double())
        <= TOLERANCE
    )


def test_adapter_of_diffusers_itself() -> None:
    """``add_adapter`` puts LoRA into the model without a wrapper; names are those of a PEFT model."""
    wrapped, _ = lora("unet with text")
    model, _ = full("unet with text")
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=CASES["unet with text"].targets))
    set_peft_model_state_dict(model, get_peft_model_state_dict(wrapped))
    inputs = _text_unet_inputs(N)
    rows = [gs.Capture(m, gs.SketchSpec(dim=256))(inputs, Squares()) for m in (wrapped, model)]
    assert rows[0].table == rows[1].table
    assert torch.equal(rows[0].values, rows[1].values)


def test_what_is_left_out_is_named_with_its_share() -> None:
    model, modules = full("unet")
    capture = gs.Capture(model, IDENTITY, modules=modules)
    left = capture.uncovered
    for name in ("conv_norm_out.weight", "class_embedding.weight", "time_embedding.linear_1.bias", "conv_in.bias"):
        assert name in left
    captured = sum(p.numel() for found in capture.maps for p in found.parameters.values())
    assert sum(left.values()) == pytest.approx(1 - captured / sum(p.numel() for p in model.parameters()))
    assert "time_embedding.linear_1.weight" not in left
