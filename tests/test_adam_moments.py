"""Adam moments from everything that training leaves behind: equal to the optimizer's own, or refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import llama, one, padded_batch, with_lora
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.checkpoints.checkpoint import learning_rates, names

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**config: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, task_type="CAUSAL_LM", **config)
    )


def records() -> list[dict[str, Tensor]]:
    batch = padded_batch(8)
    return [{key: value[i] for key, value in batch.items()} for i in range(8)]


def trained(model: Any, folder: Path) -> Trainer:
    """Six steps, a checkpoint after every three."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta2=0.98,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=records())  # type: ignore[arg-type]
    trainer.train()
    return trainer


class Run:
    """What a Trainer left, and what its optimizer held at the end."""

    def __init__(self, model: Any, folder: Path) -> None:
        trainer = trained(model, folder)
        self.folders = [folder / "checkpoint-3", folder / "checkpoint-6"]
        self.model, self.optimizer = model, trainer.optimizer
        self.rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(lora(), tmp_path_factory.mktemp("lora"))


def own(run: Run, modules: Any = "lora") -> dict[str, Any]:
    """State of each captured parameter, from the optimizer that holds the parameter itself."""
    inner: Any = run.optimizer
    return {name: inner.state[p] for name, p in parameters_of(run.model, modules).items()}


def check(moments: gs.AdamMoments, expected: dict[str, Any]) -> None:
    assert list(moments.first) == list(expected)
    for name, state in expected.items():
        assert torch.equal(moments.first[name], state["exp_avg"])
        assert torch.equal(moments.second[name], state["exp_avg_sq"])
        assert moments.steps[name] == 6
    assert (moments.beta1, moments.beta2, moments.eps) == (0.9, 0.98, 1e-8)


# The Trainer ---------------------------------------------------------------------------------------------------------


def test_a_trainers_checkpoint_is_its_own_optimizer(run: Run, tmp_path: Path) -> None:
    """Into a model that was made anew and is not trainable, as a program would load it."""
    fresh = lora().eval().requires_grad_(False)
    for source in (run.folders[1], str(run.folders[1]), run.folders[1] / "optimizer.pt"):
        check(gs.adam_moments(source, fresh), own(run))
    check(gs.adam_moments(run.optimizer, run.model), own(run))
    check(gs.adam_moments(run.optimizer.state_dict(), run.model), own(run))  # type: ignore[union-attr]
    gs.adam_moments(run.folders[1], fresh).save(tmp_path / "moments.safetensors")
    check(gs.adam_moments(tmp_path / "moments.safetensors", fresh, form="torch"), own(run))


def test_parameters_without_weight_decay_come_last(tmp_path: Path) -> None:
    """A layer whose name says norm is of the second group though the model has it in the middle."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.norm = nn.Linear(4, 4, bias=False)
            self.scale = nn.LayerNorm(4)
            self.last = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            out = self.last(self.scale(self.norm(self.first(x).tanh())))
            return {"loss": out.square().mean()}

    torch.manual_seed(0)
    model = Net()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=6,
        save_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        weight_decay=0.1,
        adam_beta2=0.98,
        dataloader_pin_memory=False,
    )
    data = [{"x": torch.randn(4), "labels": torch.tensor(0)} for _ in range(8)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()
    state: Any = torch.load(tmp_path / "checkpoint-6/optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in state["param_groups"]] == [2, 4]
    torch.manual_seed(1)
    fresh = Net()
    moments = gs.adam_moments(tmp_path / "checkpoint-6", fresh, "*")
    optimizer: Any = trainer.optimizer
    expected = {name: optimizer.state[p] for name, p in parameters_of(model, "*").items()}
    assert list(expected) == ["first.weight", "norm.weight", "last.weight"]
    check(moments, expected)
    frozen = Net().requires_grad_(False)
    frozen.norm.requires_grad_(True)
    check(gs.adam_moments(tmp_path / "checkpoint-6", frozen, "*"), expected)


def test_checkpoints_of_a_trainer_end_to_end(run: Run, tmp_path: Path) -> None:
    """Rows at both, with Adam, from a model that is at neither: as of models that were loaded from the folders."""
    model = lora().eval()
    checkpoints = [gs.Checkpoint(f, adam=gs.adam_moments(f, model)) for f in run.folders]
    batch, spec = padded_batch(3), gs.SketchSpec(dim=256)
    store = gs.extract(
        model,
        [batch],
        gs.losses.language_model,
        tmp_path / "a",
        spec=spec,
        checkpoints=checkpoints,
        curvature=0,
        progress=False,
    )
    assert [part["checkpoint"] for part in store.parts] == ["checkpoint-3", "checkpoint-6"]
    first = sum(run.rates[:3]) / 3, sum(run.rates[3:]) / 3
    assert [part["learning_rate"] for part in store.parts] == pytest.approx(first)
    for place, folder in enumerate(run.folders):
        loaded: Any = LlamaForCausalLM(llama().config)
        loaded.load_state_dict(llama().state_dict())
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, str(folder)).eval()
        state: Any = torch.load(folder / "optimizer.pt", weights_only=True)
        numbers = {name: i for i, name in enumerate(parameters_of(loaded))}
        for i in range(3):
            grad = gs.gradient(loaded, one(batch, i), gs.losses.language_model)
            row = torch.zeros(256, dtype=torch.float64)
            for name, g in grad.items():
                m, v = (state["state"][numbers[name]][key].double() for key in ("exp_avg", "exp_avg_sq"))
                g = g.double() / int(gs.losses.language_model.loss_tokens(batch)[i])  # as it was trained
                step = (0.9 * m + 0.1 * g) / (0.98 * v + 0.02 * g * g + 1e-8).sqrt()
                row += gs.sketch_matrix(spec, name, tuple(g.shape)).double() @ step.reshape(-1)
            got = torch.from_numpy(store.features[i, place]).double()
            assert float((got - row).norm() / row.norm()) <= 1e-5
    assert store.metadata["preconditioner"]["beta2"] == 0.98


def test_a_whole_models_checkpoint(tmp_path: Path) -> None:
    """Tied weights are in its file once; capture sees some of its weights, and all of them are put in."""
    model = llama(tie_word_embeddings=True)
    trained(model, tmp_path)
    folder = tmp_path / "checkpoint-6"
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    fresh, batch, spec = llama(tie_word_embeddings=True), padded_batch(3), gs.SketchSpec(dim=256)
    before = {n: p.clone() for n, p in fresh.named_parameters()}
    adam = gs.adam_moments(folder, fresh, "*.q_proj")
    store = gs.extract(
        fresh,
        [batch],
        gs.losses.language_model,
        tmp_path / "a",
        spec=spec,
        modules="*.q_proj",
        curvature=0,
        checkpoints=[gs.Checkpoint(folder, adam=adam)],
        progress=False,
    )
    tokens = gs.losses.language_model.loss_tokens(batch)

    def mean(module: nn.Module, batch: Any) -> Tensor:
        return gs.losses.language_model(module, batch) / tokens

    expected = gs.Capture(model.eval(), spec, "*.q_proj")(batch, mean, adam=adam)
    torch.testing.assert_close(torch.from_numpy(store.features[:]), expected.values, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in fresh.named_parameters())


def test_learning_rates_of_folders(run: Run, tmp_path: Path) -> None:
    first, last = (gs.Checkpoint(f) for f in run.folders)
    assert learning_rates([first, last]) == pytest.approx([sum(run.rates[:3]) / 3, sum(run.rates[3:]) / 3])
    assert learning_rates([last]) == pytest.approx([sum(run.rates) / 6])
    assert learning_rates([gs.Checkpoint(run.folders[1], 0.5)]) == [0.5]
    quiet = tmp_path / "checkpoint-3"
    shutil.copytree(run.folders[0], quiet)
    state = json.loads((quiet / "trainer_state.json").read_text())
    (quiet / "trainer_state.json").write_text(json.dumps({**state, "log_history": []}))
    present: Any = torch.load(quiet / "scheduler.pt", weights_only=True)
    assert learning_rates([gs.Checkpoint(quiet)]) == present["_last_lr"][:1]
    assert names([first, gs.Checkpoint({}, name="b"), gs.Checkpoint({})]) == ["checkpoint-3", "b", "2"]


def test_an_adapter_in_a_folder_of_its_own_is_still_the_trainers(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT saves an adapter that is not called "default" in checkpoint-3/NAME; everything else lies beside it."""
    nested = []
    for folder in run.folders:
        nested.append(tmp_path / folder.name / "poet")
        shutil.copytree(folder, tmp_path / folder.name)
        nested[-1].mkdir()
        for file in (tmp_path / folder.name).glob("adapter_*"):
            file.rename(nested[-1] / file.name)
    checkpoints = [gs.Checkpoint(folder) for folder in nested]
    assert learning_rates(checkpoints) == learning_rates([gs.Checkpoint(f) for f in run.folders])
    assert names(checkpoints) == ["checkpoint-3", "checkpoint-6"]
    check(gs.adam_moments(nested[1], lora()), own(run))
    assert "learning rate" not in caplog.text
    for folder in nested:
        (folder.parent / "trainer_state.json").unlink()
    named = [gs.Checkpoint(folder, name=str(i)) for i, folder in enumerate(nested)]
    assert learning_rates(named) == [1.0, 1.0]
    assert "no checkpoint says its learning rate, so all weigh 1" in caplog.text


def test_weight_decay_beside_the_gradients_is_plain_adam() -> None:
    model, batch = lora().train(), padded_batch(4)
    model(**batch).loss.backward()
    for made, options in ((torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.Adam, {})):
        optimizer = made(parameters_of(model).values(), **options)  # type: ignore[arg-type]
        optimizer.step()
        for source in (optimizer, optimizer.state_dict()):
            assert len(gs.adam_moments(source, model).first) == 12
        before = optimizer.state_dict()  # as torch 2.6 and older wrote it
        for group in before["param_groups"]:
            del group["decoupled_weight_decay"]
        assert len(gs.adam_moments(before, model).first) == 12


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_is_not_plain_adam_is_refused() -> None:
    model, batch = lora().train(), padded_batch(4)
    captured = parameters_of(model)

    def after(optimizer: Any) -> Any:
        model(**batch).loss.backward()
        optimizer.step()
        return optimizer

    fine = after(torch.optim.AdamW(captured.values()))
    assert gs.adam_moments(fine, model).steps[next(iter(captured))] == 1
    for source, words in (
        (after(torch.optim.AdamW(captured.values(), amsgrad=True)), "is AMSGrad's"),
        (after(torch.optim.AdamW(captured.values(), maximize=True)), "is of an optimizer that maximizes"),
        (after(torch.optim.NAdam(captured.values())), "is NAdam's or RAdam's"),
        (after(torch.optim.RAdam(captured.values())).state_dict(), "is NAdam's or RAdam's"),
        (after(torch.optim.Adam(captured.values(), weight_decay=0.1)), "has weight decay 0.1 mixed into the gradients"),
        (after(torch.optim.Adam(captured.values(), weight_decay=0.1)).state_dict(), "mixed into the gradients"),
        (after(torch.optim.SGD(captured.values(), momentum=0.9)), "has momentum_buffer and not exp_avg"),
        (after(torch.optim.AdamW(list(captured.values())[1:])), "no moments for 1 of 12 captured parameters, such as"),
        (torch.optim.AdamW(captured.values()), "no moments for 12 of 12 .* after at least one step"),
        (3, "cannot be read from a int"),
        ({"weights": 1}, "expected a mapping of 'state' and 'param_groups'"),
    ):
        with pytest.raises(gs.DataError, match=words):
            gs.adam_moments(source, model)
    values = list(captured.values())
    mixed = after(torch.optim.AdamW([{"params": values[:3]}, {"params": values[3:], "betas": (0.5, 0.9)}]))
    with pytest.raises(gs.DataError, match="expected the same for all"):
        gs.adam_moments(mixed, model)
    broken = copy.deepcopy(fine)
    next(iter(broken.state.values()))["exp_avg_sq"][0, 0] = float("nan")
    state = broken.state_dict()
    with pytest.raises(gs.DataError, match="is not finite"):
        gs.adam_moments(state, model)


def test_orders_that_do_not_fit_or_do_not_decide_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Linear(3, 3, bias=False)
            self.plain = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(self.norm(x))

    def state(*groups: list[nn.Parameter]) -> Any:
        optimizer = torch.optim.AdamW([{"params": group} for group in groups])
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        return optimizer.state_dict()

    torch.manual_seed(0)
    model = Pair()
    norm, plain = model.norm.weight, model.plain.weight
    one_group = gs.adam_moments(state([norm, plain]), model, "*")
    assert list(one_group.first) == ["norm.weight", "plain.weight"]
    trainers = state([plain], [norm])
    assert torch.equal(gs.adam_moments(trainers, model, "*").first["norm.weight"], trainers["state"][1]["exp_avg"])
    with pytest.raises(gs.DataError, match="groups of \\[1\\] parameters, which fits no order"):
        gs.adam_moments(state([plain]), model, "*")
    layered = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b_bias": nn.Linear(2, 2, bias=False)})
    layered.add_module("LlamaRMSNorm", type("OldRMSNorm", (nn.Linear,), {})(2, 2, bias=False))
    assert gs.adam_moments(_named(layered), layered, "*").first.keys() == {
        "a.weight",
        "b_bias.weight",
        "LlamaRMSNorm.weight",
    }


def _named(model: nn.Module) -> Any:
    """A state that says names, in an order that no rule would guess."""
    optimizer = torch.optim.AdamW(reversed(list(model.named_parameters())))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def test_files_that_are_no_moments_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = lora()
    zeros = torch.zeros(2)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    save_file({"a": zeros}, tmp_path / "other.safetensors")
    save_file({"exp_avg.a": zeros, "exp_avg_sq.a": zeros.clone()}, tmp_path / "bare.safetensors")
    (tmp_path / "folder").mkdir()
    torch.save({"state": {}, "param_groups": [], "code": Path}, tmp_path / "code.pt")
    for file, words in (
        ("broken.safetensors", "cannot be read as safetensors"),
        ("other.safetensors", "holds no pairs of tensors named exp_avg"),
        ("bare.safetensors", "has no beta1 in its metadata"),
        ("folder", "optimizer.pt' does not exist"),
        ("code.pt", "cannot be read as tensors only"),
    ):
        with pytest.raises(gs.DataError, match=words):
            gs.adam_moments(tmp_path / file, model)
    with pytest.raises(gs.DataError, match="form of Adam is 'adamw'"):
        gs.AdamMoments({}, {}, {}, form="adamw")
    with pytest.raises(gs.DataError, match="after how many steps"):
        gs.AdamMoments({"a": zeros}, {"a": zeros}, {}, form="torch")
    moments = gs.AdamMoments({"a": zeros}, {"a": zeros}, {})
    with pytest.raises(gs.DataError, match=r"no Adam moments for model\.layers\.1"):
        gs.Capture(with_lora(llama()), gs.SketchSpec(dim=64))(padded_batch(2), gs.losses.language_model, adam=moments)
