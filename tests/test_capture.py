"""The identity: a captured row is S times the autograd gradient of that example alone; and every silence raises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import SPEC, VOCAB, error, fill, llama, one, oracle, padded_batch, with_lora
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gradsift as gs
from gradsift.engine.capture.fused import FusedLora
from gradsift.engine.capture.layout import make_layout

language_model = gs.losses.language_model
TOLERANCE = 1e-5
EVERY_MAP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def examples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [one(batch, i) for i in range(len(batch["input_ids"]))]


def assert_identity(
    model: nn.Module, batch: Any, loss_fn: Any = language_model, modules: Any = "lora", plain: nn.Module | None = None
) -> gs.Features:
    """Capture `model`; compare with autograd on `plain`, the same weights without what is being tested."""
    features = gs.Capture(model, SPEC, modules=modules)(batch, loss_fn)
    rows, norms = oracle(plain or model, examples(batch), loss_fn, SPEC, modules)
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE
    return features


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rank", [1, 2, 7, 16, 64])
def test_padded_batch(rank: int, attention: str) -> None:
    model = with_lora(llama(attn_implementation=attention), r=rank, target_modules=EVERY_MAP)
    features = assert_identity(model, padded_batch())
    losses = [float(language_model(model, one(padded_batch(), i)).detach()) for i in range(4)]
    assert features.loss is not None
    torch.testing.assert_close(features.loss, torch.tensor(losses), rtol=1e-5, atol=1e-5)


def test_left_padding_with_position_ids() -> None:
    batch = padded_batch()
    flipped = {key: value.flip(1) for key, value in batch.items()}
    flipped["position_ids"] = (flipped["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert_identity(with_lora(llama()), flipped)


def test_lora_only_in_the_last_layer() -> None:
    assert_identity(with_lora(llama(), layers_to_transform=[1]), padded_batch())


def test_adapter_that_was_loaded_frozen() -> None:
    model = with_lora(llama())
    model.requires_grad_(False)
    assert_identity(model, padded_batch())


def test_two_active_adapters_keep_their_names() -> None:
    model = with_lora(llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    fill(model).base_model.set_adapter(["default", "second"])
    assert_identity(model, padded_batch())
    names = [row.name for row in gs.Capture(model, SPEC).table]
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    assert "model.layers.0.self_attn.q_proj.lora_A.second.weight" in names


def test_renamed_adapter_has_the_same_rows() -> None:
    rows = []
    for name in ("default", "renamed"):
        model = fill(get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"]), adapter_name=name).eval())
        for key, parameter in model.named_parameters():
            if "lora_A" in key:
                torch.manual_seed(5)
                nn.init.normal_(parameter)
        rows.append(gs.Capture(model, SPEC)(padded_batch(), language_model).values)
    assert torch.equal(*rows)


def test_fused_layer_is_used_where_it_is_the_same_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = FusedLora.forward

    def counted(ctx: Any, *args: Any) -> Tensor:
        calls.append(1)
        return original(ctx, *args)

    monkeypatch.setattr(FusedLora, "forward", staticmethod(counted))
    model, batch = with_lora(llama(attention_bias=True)), padded_batch()
    maps = 6
    fused = gs.Capture(model, SPEC)(batch, language_model).values
    assert len(calls) == 2 * maps  # the pass and the probe
    handles = [
        m.register_forward_hook(lambda *_: None) for n, m in model.named_modules() if n.endswith("lora_A.default")
    ]
    usual = gs.Capture(model, SPEC)(batch, language_model).values
    assert len(calls) == 2 * maps
    assert error(fused, usual.double()) <= 1e-6
    for handle in handles:
        handle.remove()
    with gs.Capture(model, SPEC).tap():
        language_model(model, batch).sum().backward()
    assert len(calls) == 3 * maps  # only the frozen replay of the first step
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_batch_composition_does_not_matter() -> None:
    model, batch = with_lora(llama()), padded_batch()
    capture = gs.Capture(model, SPEC)
    together = capture(batch, language_model).values
    for index in range(4):
        length = int(batch["attention_mask"][index].sum())
        alone = {key: value[index : index + 1, :length] for key, value in batch.items()}
        assert error(capture(alone, language_model).values, together[index : index + 1].double()) <= TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    plain = with_lora(llama(), target_modules=EVERY_MAP)
    model = copy.deepcopy(plain).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_identity(model, padded_batch(), plain=plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_full_linear_maps_under_checkpointing(reentrant: bool) -> None:
    plain = llama()
    model = copy.deepcopy(plain).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_identity(model, padded_batch(), modules=["*.mlp.*", "*.o_proj"], plain=plain)


def test_full_linear_maps_by_glob() -> None:
    assert_identity(llama(), padded_batch(), modules="*_proj")
    assert_identity(llama(tie_word_embeddings=False), padded_batch(), modules=["lm_head", "*.v_proj"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences(attention: str) -> None:
    model, batch = with_lora(llama(attn_implementation=attention)), padded_batch()
    lengths = batch["attention_mask"].sum(1).tolist()
    segments = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.cat([batch["input_ids"][i, :length] for i, length in enumerate(lengths)])[None]
    packed = {"input_ids": ids, "segments": segments}
    features = gs.Capture(model, SPEC)(packed, language_model, segments=segments)
    rows, norms = oracle(model, examples(batch), language_model, SPEC)
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE


def test_packed_sequences_that_leak_are_refused() -> None:
    model = with_lora(llama())
    segments = torch.tensor([0, 5, 11])
    ids = padded_batch(1)["input_ids"]

    def leaking(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch, use_cache=False).logits[0]
        losses = functional.cross_entropy(logits[:-1], batch[0, 1:], reduction="none")
        return torch.stack([losses[:4].sum(), losses[5:].sum()])

    with pytest.raises(gs.CaptureError, match=r"example 1 reaches rows of example 0.*position_ids"):
        gs.Capture(model, SPEC)(ids, leaking, segments=segments)


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return with_lora(T5ForConditionalGeneration(config), target_modules=["q", "k", "v", "o", "wi", "wo"])


@pytest.mark.parametrize("frozen_encoder", [False, True])
def test_encoder_decoder_with_cross_attention(frozen_encoder: bool) -> None:
    batch = padded_batch()
    batch["labels"] = torch.randint(0, VOCAB, (4, 7), generator=torch.Generator().manual_seed(3))
    modules = "*.decoder.*EncDecAttention.*" if frozen_encoder else "lora"
    assert_identity(t5(), batch, modules=modules)


def test_conv1d_of_gpt2_plain_and_under_lora() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    assert_identity(model, padded_batch(), modules="*.c_*")
    lora = with_lora(model, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    assert_identity(lora, padded_batch())


class Twice(nn.Module):
    """One map applied twice, in-place operations behind maps, and an example axis that can be moved."""

    def __init__(self, batch_axis: int = 0, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_axis = batch_axis
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(0, self.batch_axis)
        y = functional.relu(self.first(x), inplace=True)
        y = self.first(y + x)
        y += x
        y = self.second(y).mul_(1.5)
        return y.movedim(self.batch_axis, 0)


def square_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_map_called_twice_and_in_place_operations(batch_axis: int) -> None:
    model, x = Twice(batch_axis), torch.randn(5, 3, 12)
    features = gs.Capture(model, SPEC, modules="*")(x, square_loss, batch_axis=batch_axis)
    rows, norms = oracle(model, [x[i : i + 1] for i in range(5)], square_loss, SPEC, "*")
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE


def test_map_called_twice_on_packed_tokens() -> None:
    model, lengths = Twice(), [2, 0, 5, 3]
    x = torch.randn(1, 10, 12)
    segments = torch.tensor([0, *lengths]).cumsum(0)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return torch.stack([part.square().sum() for part in model(x)[0].split(lengths)])

    features = gs.Capture(model, SPEC, modules="*")(x, loss_fn, segments=segments)
    rows, norms = oracle(model, list(x.split(lengths, dim=1)), square_loss, SPEC, "*")
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE


def test_two_modules_that_share_a_weight_are_one_map() -> None:
    model = Twice()
    model.second.weight = model.first.weight
    x = torch.randn(4, 3, 12)
    capture = gs.Capture(model, SPEC, modules="*")
    assert [row.name for row in capture.table] == ["first.weight"]
    rows, _ = oracle(model, [x[i : i + 1] for i in range(4)], square_loss, SPEC, "*")
    assert error(capture(x, square_loss).values, rows) <= TOLERANCE


def test_wrong_batch_axis_is_refused_even_when_lengths_agree() -> None:
    class MixesTokens(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.mean(1, keepdim=True))

    x = torch.randn(5, 5, 12)
    with pytest.raises(gs.CaptureError, match=r"reaches rows of example .*axis 0"):
        gs.Capture(MixesTokens(1), SPEC, modules="*")(x, square_loss)
    with pytest.raises(gs.CaptureError, match="holds 3 entries but the batch has 5 examples"):
        gs.Capture(Twice(1), SPEC, modules="*")(torch.randn(5, 3, 12), square_loss)


def test_examples_that_share_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).train()
    with pytest.raises(gs.CaptureError, match=r"0: the loss of example 4 reaches rows.*batch normalisation"):
        gs.Capture(model, SPEC, modules="*")(torch.randn(5, 6), square_loss)


def test_flattened_tokens_are_followed_where_another_map_shows_their_length() -> None:
    class Flattens(Twice):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y.reshape(-1, 12)).reshape(x.shape)

    x = torch.randn(4, 3, 12)
    features = gs.Capture(Flattens(), SPEC, modules="*")(x, square_loss)
    rows, _ = oracle(Flattens(), [x[i : i + 1] for i in range(4)], square_loss, SPEC, "*")
    assert error(features.values, rows) <= TOLERANCE
    with pytest.raises(gs.CaptureError, match="12 entries but the batch has 4"):
        gs.Capture(Flattens(), SPEC, modules="second")(x, square_loss)

    class Shuffles(Flattens):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).transpose(0, 1)
            return self.second(y.reshape(-1, 12)).reshape(y.shape).transpose(0, 1)

    with pytest.raises(gs.CaptureError, match="second: the loss of example 3 reaches rows"):
        gs.Capture(Shuffles(), SPEC, modules="*")(x, square_loss)


def test_routed_tokens_are_refused() -> None:
    class Routes(Twice):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y.index_put((y[..., 0] > 0,), self.second(y[y[..., 0] > 0]))

    with pytest.raises(gs.CaptureError, match=r"second: .*routed"):
        gs.Capture(Routes(), SPEC, modules="*")(torch.randn(4, 3, 12), square_loss)


def test_identity_sketch_is_the_gradient_itself() -> None:
    model, batch = with_lora(llama()), padded_batch()
    capture = gs.Capture(model, gs.SketchSpec(kind="identity"))
    features = capture(batch, language_model)
    rows, norms = oracle(model, examples(batch), language_model, capture.spec)
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.values.norm(dim=1), norms) <= TOLERANCE


LOW: list[tuple[str, Callable[[], Any], torch.dtype | None, float]] = [
    ("bf16 weights", lambda: with_lora(llama()).to(torch.bfloat16), None, 2e-2),
    ("bf16 base, fp32 adapters", lambda: with_lora(llama().to(torch.bfloat16)), None, 2e-2),
    ("fp16 weights", lambda: with_lora(llama()).to(torch.float16), None, 3e-3),
    ("autocast", lambda: with_lora(llama()), torch.bfloat16, 2e-2),
]


@pytest.mark.parametrize(("name", "build", "autocast", "tolerance"), LOW, ids=[case[0] for case in LOW])
def test_low_precision(name: str, build: Callable[[], Any], autocast: torch.dtype | None, tolerance: float) -> None:
    """The oracle is the fp64 product of the recorded factors; torch's own gradient bounds how far off is fair."""
    model, batch = build(), padded_batch()
    capture = gs.Capture(model, gs.SketchSpec(kind="identity"))
    exact = _FromFactors(capture)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        features = capture(batch, language_model)
        expected = exact(batch)
        rows, _ = oracle(model, examples(batch), language_model, capture.spec)
    assert error(features.values, expected) <= TOLERANCE
    assert error(features.values, rows) <= tolerance


class _FromFactors:
    """fp64 products of the factors that a pass recorded."""

    def __init__(self, capture: gs.Capture) -> None:
        self.capture = capture

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        found: dict[str, Tensor] = {}

        def receive(_: Any, uses: Any) -> None:
            for use in uses:
                for factor in use:
                    product = torch.einsum("ntp,ntq->npq", factor.g.double(), factor.x.double() * factor.scale)
                    found[factor.parameter] = product.flatten(1)

        model = self.capture.model
        flags = {p: p.requires_grad for p in model.parameters()}
        model.requires_grad_(False)
        with self.capture.recorded(receive, make_layout(None, 0)):
            language_model(model, batch).sum().backward()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        return torch.cat([found[row.name] for row in self.capture.table], dim=1)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's own, while it traces
@pytest.mark.parametrize("where", ["model", "layers"])
def test_compiled_after_a_call(where: str) -> None:
    plain = with_lora(llama())
    model = copy.deepcopy(plain)
    if where == "model":
        model = torch.compile(model, backend="eager")
    else:
        for layer in model.base_model.model.model.layers:
            layer.compile(backend="eager")
    batch = padded_batch()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert_identity(model, batch, plain=plain)


def test_merged_and_disabled_adapters_are_refused() -> None:
    model = with_lora(llama())
    capture = gs.Capture(model, SPEC)
    model.merge_adapter()
    for attempt in (lambda: gs.Capture(model, SPEC), lambda: capture(padded_batch(), language_model)):
        with pytest.raises(gs.CaptureError, match=r"q_proj.*merged.*unmerge_adapter"):
            attempt()
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(gs.CaptureError, match=r"q_proj.*disabled"):
        capture(padded_batch(), language_model)
    capture(padded_batch(), language_model)


def test_dora_is_refused_by_name() -> None:
    with pytest.raises(gs.CaptureError, match=r"layers\.0\.self_attn\.q_proj.*DoRA"):
        gs.Capture(with_lora(llama(), use_dora=True), SPEC)


def test_mixed_adapters_in_a_batch_are_refused() -> None:
    model = with_lora(llama(), target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))

    def loss_fn(model: Any, batch: Any) -> Tensor:
        names = ["default", "second", "default", "second"]
        return model(input_ids=batch["input_ids"], adapter_names=names).logits.float().square().flatten(1).sum(1)

    with pytest.raises(gs.CaptureError, match=r"q_proj.*adapter_names"):
        gs.Capture(model, SPEC)(padded_batch(), loss_fn)


def test_fused_experts_are_refused_by_name() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    wrapped = get_peft_model(
        model, LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    )
    with pytest.raises(gs.CaptureError, match=r"mlp\.experts .*gate_up_proj"):
        gs.Capture(wrapped, SPEC)
    capture = gs.Capture(wrapped, SPEC, modules="*.q_proj")
    assert sum(capture.uncovered.values()) > 0.5
    assert any("experts" in name for name in capture.uncovered)


def test_map_that_never_runs_is_named() -> None:
    class Skips(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(self.first(x), self.second.weight)

    with pytest.raises(gs.CaptureError, match=r"second.*never ran"):
        gs.Capture(Skips(), SPEC, modules="*")(torch.randn(3, 4, 12), square_loss)
    features = gs.Capture(Skips(), SPEC, modules="*", allow_idle=["second"])(torch.randn(3, 4, 12), square_loss)
    assert features.values.shape == (3, 256)
    assert bool(features.values.any())

    class Bypasses(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x.requires_grad_(), self.first.weight)

    features = gs.Capture(Bypasses(), SPEC, modules="*", allow_idle=["*"])(torch.randn(3, 4, 12), square_loss)
    assert features.values.shape == (3, 256)
    assert not features.values.any()


def test_map_whose_output_is_unused_is_named() -> None:
    class Drops(Twice):
        def forward(self, x: Tensor) -> Tensor:
            self.second(x)
            return self.first(x)

    with pytest.raises(gs.CaptureError, match=r"second.*does not reach the loss"):
        gs.Capture(Drops(), SPEC, modules="*")(torch.randn(3, 4, 12), square_loss)


def test_losses_that_are_not_per_example_are_refused() -> None:
    capture = gs.Capture(Twice(), SPEC, modules="*")
    with pytest.raises(gs.CaptureError, match=r"shape \(\), expected one loss per example"):
        capture(torch.randn(3, 4, 12), lambda model, x: square_loss(model, x).mean())
    with pytest.raises(gs.CaptureError, match="no gradient"):
        capture(torch.randn(3, 4, 12), lambda model, x: square_loss(model, x).detach())


def test_selection_that_matches_nothing_says_what_there_is() -> None:
    with pytest.raises(gs.CaptureError, match="no LoRA layer"):
        gs.Capture(llama(), SPEC)
    with pytest.raises(gs.CaptureError, match=r"matches no linear map.*q_proj"):
        gs.Capture(llama(), SPEC, modules="*.query")


def test_weight_that_is_tied_to_an_embedding_is_refused() -> None:
    model = llama(tie_word_embeddings=True)
    with pytest.raises(gs.CaptureError, match=r"lm_head is tied to model\.embed_tokens"):
        gs.Capture(model, SPEC, modules="lm_head")


def test_uncovered_parameters_are_named_with_their_share() -> None:
    model = with_lora(llama(), modules_to_save=["lm_head"])
    capture = gs.Capture(model, SPEC)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert capture.uncovered == {"lm_head.weight": 32 * VOCAB / total}


def test_model_is_left_as_found_also_after_an_error() -> None:
    model = with_lora(llama()).train()
    model.base_model.model.model.layers[0].eval()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    weights = [p.detach().clone() for p in model.parameters()]
    before = _state(model)
    capture = gs.Capture(model, SPEC)
    capture(padded_batch(), language_model)
    assert _state(model) == before

    def breaks(model: Any, batch: Any) -> Tensor:
        language_model(model, batch)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        capture(padded_batch(), breaks)
    assert _state(model) == before
    assert all(map(torch.equal, weights, model.parameters()))
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def _state(model: nn.Module) -> list[Any]:
    hooks = [
        (m.training, *[len(getattr(m, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")])
        for m in model.modules()
    ]
    return [hooks, [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()]]


def test_capture_works_under_no_grad_and_inference_mode() -> None:
    model, batch = with_lora(llama()), padded_batch()
    capture = gs.Capture(model, SPEC)
    expected = capture(batch, language_model).values
    with torch.no_grad():
        assert torch.equal(capture(batch, language_model).values, expected)


def test_same_call_gives_the_same_bits() -> None:
    model, batch = with_lora(llama()), padded_batch()
    rows = [gs.Capture(model, SPEC)(batch, language_model).values for _ in range(2)]
    assert torch.equal(*rows)


def test_transformer_encoder_layer_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).eval()
    x = torch.randn(3, 5, 16)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).pow(3).flatten(1).sum(1)

    features = gs.Capture(model, SPEC, modules="linear*")(x, loss_fn)
    rows, _ = oracle(model, [x[i : i + 1] for i in range(3)], loss_fn, SPEC, "linear*")
    assert error(features.values, rows) <= TOLERANCE
    with pytest.raises(gs.CaptureError, match="out_proj"):
        gs.Capture(model, SPEC, modules="*")(x, loss_fn)
