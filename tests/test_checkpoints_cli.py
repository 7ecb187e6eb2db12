"""Checkpoints on the command line: a real warm-up run, a store at its checkpoints, and targets asked at all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Cli, refused
from peft import PeftModel
from test_cli import records
from tokens import save_adapter, save_base, write_jsonl
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import gradsift as gs
from gradsift.bindings.data import Dataset
from gradsift.bindings.models import load

DIM = 256


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, a run of the Trainer on a new adapter with two checkpoints, training data and targets."""
    root = tmp_path_factory.mktemp("site")
    base = save_base(root / "base", layers=1)
    adapter = save_adapter(root / "adapter", base)
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    ids = torch.arange(60).view(6, 10) % 90
    arguments = TrainingArguments(
        str(root / "run"),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": i, "labels": i} for i in ids]).train()  # type: ignore[arg-type]
    return {
        "base": base,
        "adapter": adapter,
        "folders": [str(root / f"run/checkpoint-{step}") for step in (2, 4)],
        "data": write_jsonl(root / "train.jsonl", records(24)),
        "targets": write_jsonl(root / "targets.jsonl", records(3)),
        "root": root,
    }


def extraction(site: dict[str, Any], out: Path, *more: str) -> list[str]:
    at = [part for folder in site["folders"] for part in ("--checkpoint", folder)]
    return [
        "extract", "--model", site["base"], "--data", site["data"], "--out", str(out), "--dim", str(DIM), *at, *more,
    ]  # fmt: skip


def test_less_from_nothing_but_commands(site: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "train.zarr"
    done = cli(*extraction(site, out, "--adam", "less", "--curvature", "0"))
    assert done.code == 0, done.err
    store = gs.FeatureStore.open(out)
    assert store.features.shape == (24, 2, DIM)
    assert [part["checkpoint"] for part in store.parts] == ["checkpoint-2", "checkpoint-4"]
    assert store.metadata["notes"]["adapter"] == site["folders"][1]
    assert store.metadata["preconditioner"]["form"] == "less"
    facts = cli("info", str(out))
    assert "Adam's updates, in the form of less" in facts.out and "update norm at checkpoint-2" in facts.out

    chosen = tmp_path / "chosen.jsonl"
    done = cli(
        "select", str(out), "--targets", site["targets"], "--scorer", "less", "--budget", "4", "--out", str(chosen)
    )
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in chosen.read_text().splitlines()]

    values, rates = [], [part["learning_rate"] for part in store.parts]
    for folder in site["folders"]:
        loaded = load(site["base"], folder, device="cpu")
        targets = Dataset.open(site["targets"], loaded.tokenizer)
        values.append(gs.Capture(loaded.model, store.spec)(targets.fetch([0, 1, 2]), gs.losses.language_model).values)
    scores = np.zeros((3, 24))
    for c, rate in enumerate(rates):
        rows, queries = torch.from_numpy(store.features[:][:, c]).double(), values[c].double()
        unit = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(rows).T
        scores += rate / sum(rates) * unit.numpy()
    best = np.argsort(-scores.max(0))[:4]
    assert [line["id"] for line in lines] == [store.ids[int(i)] for i in best]
    np.testing.assert_allclose([line["score"] for line in lines], scores.max(0)[best], rtol=1e-4)

    again = cli(*extraction(site, out, "--curvature", "0"))
    refused(again, "the adam of checkpoint 'checkpoint-2' was")


def test_an_adapter_may_be_named_and_another_model_is_refused(site: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "train.zarr"
    done = cli(*extraction(site, out, "--adapter", site["adapter"], "--curvature", "8"))
    assert done.code == 0, done.err
    asked = cli("query", str(out), "--data", site["targets"], "--scorer", "dot", "-k", "2", "--json")
    assert asked.code == 0, asked.err
    refused(cli(*extraction(site, out)[:-4], "--adam", "less"), "--adam needs --checkpoint")
    refused(
        cli(*extraction(site, tmp_path / "b", "--adapter", site["adapter"], "--checkpoint", str(site["root"]))),
        "neither adapter_model",
    )
