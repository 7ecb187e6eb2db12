"""Check: a healthy model passes everything, and each way to break one is named by the check that is about it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gradsift as gs
from gradsift.engine.check.batches import cast, take, without_padding
from gradsift.engine.check.parts import kind_of
from gradsift.engine.check.report import Report
from gradsift.engine.check.retrieval import overlap
from gradsift.engine.check.run import CHECKS, check
from gradsift.engine.losses import language_model
from gradsift.kernels.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SPEC = gs.SketchSpec(dim=1024)
VOCAB = 61
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def counting(seed: int, n: int = 6, length: int = 12) -> dict[str, Any]:
    """Records that count upwards in steps, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 20, (n, 1), generator=generator)
    step = torch.randint(1, 4, (n, 1), generator=generator)
    ids = (start + step * torch.arange(length)) % VOCAB
    lengths = torch.tensor([length - 2 * (i % 4) for i in range(n)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "ids": [f"r{seed}-{i}" for i in range(n)]}


BATCHES = [counting(seed) for seed in range(4)]


def tune(model: Any, steps: int = 12) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(steps):
        loss = torch.cat([language_model(model, batch) for batch in BATCHES]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def adapted(base: Any = None, **config: Any) -> Any:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **config}
    return get_peft_model(base or llama(), LoraConfig(**settings)).eval()


@cache
def _tuned() -> Any:
    torch.manual_seed(1)
    return tune(adapted(lora_dropout=0.2))


def healthy() -> Any:
    """A tuned LoRA model of one's own."""
    return copy.deepcopy(_tuned())


def run(model: nn.Module, batches: Any = None, loss_fn: Any = language_model, **options: Any) -> Report:
    return check(model, BATCHES if batches is None else batches, loss_fn, spec=SPEC, **options)


def troubles(report: Report) -> dict[str, str]:
    return {result.name: result.verdict for result in report.results if result.verdict in ("warn", "fail")}


def packed(seed: int) -> dict[str, Any]:
    batch = counting(seed)
    lengths = batch["attention_mask"].sum(1)
    ids = torch.cat([row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)])[None]
    segments = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return {"input_ids": ids, "labels": ids.clone(), "segments": segments}


def test_a_healthy_model_passes_everything() -> None:
    model = healthy()
    asked: list[str] = []
    report = run(model, progress=asked.append)
    assert troubles(report) == {}
    assert report.ok
    assert "all 12 checks passed" in report.verdict
    assert {result.name for result in report.results} == set(CHECKS) == set(asked)
    assert [kind.kind for kind in report.kinds] == ["q_proj", "v_proj", "down_proj"]
    for kind in report.kinds:
        assert kind.maps == 2
        assert kind.features is not None
        assert kind.features < 1e-5
        assert kind.conservation is not None
        assert kind.conservation < 1e-5
        assert kind.batch is not None
        assert kind.batch < 1e-4
        assert kind.precision is not None
        assert kind.precision > 0.98
        assert kind.sketch is not None
        assert kind.sketch < 0.1
    assert sum(kind.energy or 0 for kind in report.kinds) == pytest.approx(1, abs=1e-5)
    assert report.shown is not None
    assert report.shown.id == "r0-0"
    assert report.shown.trained == (False, *[True] * 11)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_the_model_is_left_as_it_was_found() -> None:
    model = healthy().train()
    model.base_model.model.model.layers[0].eval()
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    memory = {name: value.data_ptr() for name, value in model.named_parameters()}
    state = [(p.requires_grad, p.dtype, p.grad is None) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    run(model, loss_fn=seeded_language_model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert memory == {name: value.data_ptr() for name, value in model.named_parameters()}
    assert state == [(p.requires_grad, p.dtype, p.grad is None) for p in model.parameters()]
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def seeded_language_model(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return language_model(model, batch)


def unshifted(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)


def test_a_loss_without_its_shift() -> None:
    report = run(healthy(), loss_fn=unshifted)
    assert report["loss"].verdict == "fail"
    assert "shifted by 0 tokens instead of 1" in report["loss"].sentence
    assert troubles(report).keys() <= {"loss"}
    assert not report.ok


def test_labels_that_are_shifted_twice() -> None:
    batches = []
    for batch in BATCHES:
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        batches.append({**batch, "labels": labels})
    report = run(healthy(), batches)
    assert "shifted already" in report["labels"].sentence
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"labels"}


def test_labels_on_padding() -> None:
    batches = [{**batch, "labels": batch["input_ids"]} for batch in BATCHES]
    report = run(healthy(), batches)
    assert "labels lie on padding" in report["labels"].sentence
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"labels"}


def test_examples_without_loss_are_named() -> None:
    labels = BATCHES[0]["labels"].clone()
    labels[2] = -100
    report = run(healthy(), [{**BATCHES[0], "labels": labels}, *BATCHES[1:]])
    assert report["labels"].verdict == "warn"
    assert "r0-2" in report["labels"].sentence
    assert report.ok


def test_packing_that_leaks() -> None:
    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        tokens = batch["input_ids"].shape[1]
        return language_model(model, {**batch, "position_ids": torch.arange(tokens)[None]})

    batches = [packed(seed) for seed in range(3)]
    report = run(healthy(), batches, loss_fn)
    assert troubles(report) == {"batch": "fail", "isolation": "fail"}
    assert "packed examples see each other" in report["batch"].sentence
    assert "attend to each other" in report["isolation"].sentence
    sound = run(healthy(), batches)
    assert troubles(sound) == {}
    assert "(packed)" in sound["isolation"].sentence


def test_a_merged_adapter() -> None:
    model = healthy()
    model.merge_adapter()
    report = run(model)
    assert troubles(report) == {"adapter": "fail", "maps": "fail"}
    assert "merged into the base weights" in report["adapter"].sentence
    assert "6 of 6 maps refused" in report["maps"].sentence
    assert report["features"].verdict == "skip"


def test_a_disabled_adapter() -> None:
    model = healthy()
    with model.disable_adapter():
        report = run(model)
    assert troubles(report) == {"adapter": "fail", "maps": "fail"}
    assert "disabled" in report["adapter"].sentence


def test_dropout_that_is_on() -> None:
    report = run(healthy().train())
    assert troubles(report) == {"mode": "fail"}
    assert "dropout is active in 6 modules (p = 0.2)" in report["mode"].sentence


def test_an_untrained_adapter() -> None:
    report = run(adapted())
    assert troubles(report) == {"adapter": "warn"}
    assert "every lora_B is zero" in report["adapter"].sentence
    assert report.ok


def test_an_adapter_with_random_weights() -> None:
    model = adapted(tune(llama(), 30))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    report = run(model)
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"adapter"}
    assert "weights look random" in report["adapter"].sentence


def test_two_adapters_at_once() -> None:
    model = healthy()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.mul_(1e-3)
    model.base_model.set_adapter(["default", "other"])
    report = run(model)
    assert "2 adapters are active (default, other)" in report["adapter"].sentence
    assert report.ok


def test_dora_is_refused_by_name() -> None:
    report = run(adapted(use_dora=True))
    assert "DoRA divides by the norm" in report["maps"].sentence
    assert "6 of 6 maps refused" in report["maps"].sentence
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"maps"}


def test_a_few_refused_maps_do_not_stop_the_rest() -> None:
    model = healthy()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.use_dora["default"] = True
    report = run(model)
    assert "1 of 6 maps refused: model.layers.1.mlp.down_proj: DoRA" in report["maps"].sentence
    assert "DoRA" in report["maps"].sentence
    assert report["features"].verdict == "ok"
    assert report["sketch"].verdict == "ok"
    assert "down_proj.lora_A.weight" in report["coverage"].sentence


class Coupled(nn.Module):
    """Subtracts the mean over the batch, as batch normalisation does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y - 0.5 * y.mean(0, keepdim=True)


def test_examples_that_share_statistics() -> None:
    model = healthy()
    model.base_model.model.model.layers[0].mlp = Coupled(model.base_model.model.model.layers[0].mlp)
    report = run(model)
    fails = {k for k, v in troubles(report).items() if v == "fail"}
    assert fails - {"adapter"} == {"batch", "isolation"}
    assert "what else is in the batch changes it" in report["batch"].sentence
    assert "share statistics" in report["isolation"].sentence


def test_a_mask_that_is_not_passed_on() -> None:
    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return language_model(model, {k: v for k, v in batch.items() if k != "attention_mask"})

    batches = [{k: v.flip(1) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in BATCHES]
    report = run(healthy(), batches, loss_fn)
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"batch"}
    assert "attention_mask" in report["batch"].sentence


def test_a_mean_over_the_batch() -> None:
    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        losses = language_model(model, batch)
        return losses / len(losses)

    report = run(healthy(), loss_fn=loss_fn)
    assert troubles(report) == {"batch": "fail"}
    assert "0.167 times as long: the loss is divided by" in report["batch"].sentence


def test_a_scalar_loss() -> None:
    report = run(healthy(), loss_fn=lambda model, batch: language_model(model, batch).mean())
    assert troubles(report) == {"loss": "fail"}
    assert "shape ()" in report["loss"].sentence
    assert report["features"].verdict == "skip"


def test_a_loss_that_is_not_finite() -> None:
    def loss_fn(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return language_model(model, batch) / (batch["attention_mask"].sum(1) - 10)

    report = run(healthy(), loss_fn=loss_fn)
    assert report["loss"].verdict == "fail"
    assert "r0-1" in report["loss"].sentence


class Net(nn.Module):
    """Regression with two maps; `way` says how the second one is called."""

    def __init__(self, way: str = "module"):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 16)
        self.second = nn.Linear(16, 16)
        self.head = nn.Linear(16, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.way == "around":
            h = functional.linear(h, self.second.weight, self.second.bias)
        elif self.way == "both":
            h = self.second(h) + functional.linear(h, self.second.weight)
        elif self.way == "sequence first":
            h = self.second(h.transpose(0, 1)).transpose(0, 1)
        elif self.way == "unused":
            self.second(h)
        else:
            h = self.second(h)
        out: Tensor = self.head(h.tanh())
        return out.squeeze(-1)


def squared(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return ((model(x) - y) ** 2).sum(1)


def points(n: int = 5, steps: int = 5) -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(n, steps, 5, generator=generator), torch.randn(n, steps, generator=generator)) for _ in range(3)
    ]


def test_any_model_can_be_checked() -> None:
    report = run(Net(), points(), squared, modules="*")
    assert {k: v for k, v in troubles(report).items() if k != "coverage"} == {}
    assert report["adapter"].verdict == "skip"
    assert report["labels"].verdict == "skip"
    assert "bias" in report["coverage"].sentence
    assert report.shown is None
    assert set(report.uncovered) == {"first.bias", "second.bias", "head.bias"}


@pytest.mark.parametrize(("way", "cause"), [("around", "it never ran"), ("unused", "does not reach the loss")])
def test_a_map_that_reports_nothing(way: str, cause: str) -> None:
    report = run(Net(way), points(), squared, modules=["first", "second", "head"])
    # Where the weight does get a gradient, rows cannot add up to the whole.
    missing = {"conservation"} if way == "around" else set()
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"maps"} | missing
    assert "second" in report["maps"].sentence
    assert cause in report["maps"].sentence
    allowed = run(Net(way), points(), squared, modules=["first", "second", "head"], allow_idle=["second"])
    assert allowed["maps"].verdict == "ok"
    assert allowed.ok is (way == "unused")


def test_a_weight_that_is_used_behind_its_module() -> None:
    report = run(Net("both"), points(), squared, modules="*")
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"features", "conservation"}
    assert "second.weight" in report["features"].sentence
    assert "1 of 3 parameters" in report["features"].sentence


def test_a_batch_axis_that_is_wrong() -> None:
    report = run(Net("sequence first"), points(5, 5), squared, modules="second")
    fails = {k for k, v in troubles(report).items() if v == "fail"}
    assert "isolation" in fails
    assert "batch_axis" in report["isolation"].sentence
    right = run(Net("sequence first"), points(5, 5), squared, modules="second", batch_axis=1)
    assert right.ok


def test_what_is_trained_but_not_captured() -> None:
    model = adapted(modules_to_save=["lm_head"])
    report = run(tune(model, 4))
    assert report["coverage"].verdict == "fail"
    assert "lm_head" in report["coverage"].sentence
    assert report["coverage"].measured is not None
    assert report["coverage"].measured < 0.5


def test_a_sketch_that_is_too_small_is_named_but_not_wrong() -> None:
    generator = torch.Generator().manual_seed(6)
    noise = [(torch.randn(12, 1, 5, generator=generator), torch.randn(12, 1, generator=generator)) for _ in range(4)]
    report = check(Net(), noise, squared, spec=gs.SketchSpec(dim=64), modules="*")
    assert report["sketch"].verdict in ("ok", "warn")
    assert report["sketch"].measured is not None
    assert 0.02 < report["sketch"].measured < 0.25


def test_a_model_in_low_precision() -> None:
    report = run(healthy().to(torch.bfloat16))
    assert report["features"].verdict == "ok"
    assert report["precision"].measured is not None
    assert "bfloat16" in report["precision"].sentence


def test_no_batch_and_no_examples_are_refused() -> None:
    with pytest.raises(DataError, match="no batch to check"):
        run(healthy(), [])
    with pytest.raises(DataError, match="without a tensor"):
        run(healthy(), [{"text": ["a"]}])


def test_one_example_of_a_packed_batch() -> None:
    batch = packed(0)
    offsets = batch["segments"]
    one = take(batch, [2], len(offsets) - 1)
    assert torch.equal(one["input_ids"], batch["input_ids"][:, offsets[2] : offsets[3]])
    assert one["segments"].tolist() == [0, int(offsets[3] - offsets[2])]


def test_one_example_of_nested_conditions() -> None:
    nested = {"latents": torch.arange(6.0).view(3, 2), "added_cond_kwargs": {"time_ids": torch.arange(3), "scale": 2}}
    one = take(nested, [1], 3)
    assert one["latents"].tolist() == [[2, 3]]
    assert one["added_cond_kwargs"]["time_ids"].tolist() == [1]
    assert one["added_cond_kwargs"]["scale"] == 2
    assert cast(nested, torch.float64)["added_cond_kwargs"]["time_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "q_proj"),
        ("up_blocks.1.attentions.0.to_out.0", "to_out.*"),
        ("blocks.0.net.0.proj", "proj"),
        ("layers.2.1", "layers.*.*"),
        ("0", "*"),
    ],
)
def test_kind_of_a_map(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_padding_is_taken_off_where_it_carries_no_label() -> None:
    one = without_padding(take(BATCHES[0], [3], 6))
    assert one["input_ids"].shape == (1, 6)
    assert one["ids"] == ["r0-3"]
    kept = without_padding({**take(BATCHES[0], [3], 6), "labels": BATCHES[0]["input_ids"][3:4]})
    assert kept["input_ids"].shape == (1, 12)


def test_overlap_counts_shared_neighbours() -> None:
    truth = torch.tensor([[9.0, 1, 2, 3], [1, 9, 2, 3], [1, 2, 9, 3], [1, 2, 3, 9]])
    assert overlap(truth, truth, 2) == 1.0
    assert overlap(truth, -truth, 1) == 0.0
    assert overlap(truth, -truth, 1, among=3) == 1.0


def test_a_selection_of_nothing() -> None:
    report = run(llama())
    assert troubles(report) == {"maps": "fail"}
    assert "no LoRA layer" in report["maps"].sentence


def test_an_encoder_decoder() -> None:
    torch.manual_seed(5)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, **sizes))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)).eval()
    batches = []
    for batch in BATCHES:
        labels = batch["labels"][:, :9].clone()
        batches.append({**batch, "labels": labels, "decoder_attention_mask": (labels != -100).long()})
    report = run(model, batches)
    assert {k for k, v in troubles(report).items() if v == "fail"} <= {"adapter"}
    assert "equal to the model's own loss" in report["loss"].sentence
    assert "(100%)" in report["labels"].sentence

    def late(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        labels = functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return language_model(
            model, {**batch, "labels": labels, "decoder_input_ids": base._shift_right(batch["labels"])}
        )

    assert "shifted by 1 tokens instead of 0" in run(model, batches, late)["loss"].sentence


def test_fused_experts_are_refused_and_their_share_is_known() -> None:
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, **sizes)
    )
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = tune(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts)), 4)
    report = run(model)
    assert report["maps"].verdict == "fail"
    assert "model.layers.0.mlp.experts: LoRA on the parameter" in report["maps"].sentence
    captured = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "q_proj" in name)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report["coverage"].verdict == "fail"
    assert report["coverage"].measured == pytest.approx(captured / total)
    assert report["features"].verdict == "ok"


def test_no_map_reports_anything() -> None:
    report = run(Net("around"), points(), squared, modules="second")
    assert {k for k, v in troubles(report).items() if v == "fail"} == {"maps"}
    assert "1 of 1 maps gave no gradient (second)" in report["maps"].sentence
    assert report["sketch"].verdict == report["batch"].verdict == "skip"


def test_one_example_is_enough_for_most() -> None:
    report = run(healthy(), [take(BATCHES[0], [1], 6)])
    assert troubles(report) == {}
    assert report["isolation"].verdict == report["sketch"].verdict == "skip"


def test_all_labels_masked() -> None:
    batches = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in BATCHES]
    report = run(healthy(), batches)
    assert report["labels"].verdict == "fail"
    assert "no label of any example carries loss" in report["labels"].sentence
    assert report["precision"].verdict == report["sketch"].verdict == "skip"
