"""`gradsift eval`: a built-in case with floors well below what was measured, a user's own training, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokens import save_adapter, save_base, write_jsonl

TRAINING = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

BASE, TEXTS = {base!r}, {texts!r}

def retrain(lines, seed):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for line in lines:
        ids = tokenizer(TEXTS[line], return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with open("calls.txt", "a") as file:
        print(lines, seed, file=file)
    if seed == 1:
        model.save_pretrained("adapter")
        return "adapter"
    if seed == 2:
        model.merge_and_unload().save_pretrained("whole")  # without a tokenizer
        return "whole"
    return model
"""

PREFERENCES = """
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

def retrain(lines, seed):
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained({base!r}), {adapter!r})
    torch.manual_seed(sum(lines) + seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
"""


def test_digits_quick_shows_what_curvature_is_worth_and_resumes(cli: Any, tmp_path: Path) -> None:
    picture = tmp_path / "fidelity.png"
    methods = ["random", "loss", "nearest inputs", "exact dot", "exact fisher, k 0.3", "fisher, k 0.3, dim 1024"]
    chosen = [part for name in methods for part in ("--method", name)]
    command = ["eval", "--case", "digits", "--quick", "--cache", str(tmp_path / "kept"), *chosen]
    run = cli(*command, "--json", "--out", str(picture))
    assert run.code == 0, run.err
    found = json.loads(run.out)
    rows = {row["name"]: row for row in found["rows"]}
    lds = {name: row["lds"]["mean"] for name, row in rows.items()}
    # this run: dot .22, fisher .39; with 400 examples, 60 halves x 2 seeds: .25, .47 and .46 at dim 1024, random .01
    assert lds["exact fisher, k 0.3"] > lds["exact dot"] + 0.06
    assert lds["fisher, k 0.3, dim 1024"] > lds["exact dot"] + 0.06
    assert abs(lds["random"]) < 0.15
    assert rows["loss"]["auc"]["value"] > 0.9  # .98
    assert rows["exact fisher, k 0.3"]["auc"]["value"] > 0.9  # self-influence, .96
    assert rows["exact dot"]["class_recall"]["value"] > 0.3  # .54, chance .1
    assert rows["fisher, k 0.3, dim 1024"]["agreement"]["recall"]["value"] > 0.8  # .94
    assert "fisher" in found["advice"][0]
    assert picture.stat().st_size > 10_000

    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.npy")}
    assert len(kept) == 16
    again = cli(*command)
    assert again.code == 0 and "Use fisher" in again.out
    assert "at most 18 retrainings: 16 halves x 1 seed" in again.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.npy")} == kept


def test_a_users_own_training_is_called_with_lines_and_seeds(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter_all", base)
    texts = [f"{who} sat on the {what}" for who in ("the cat", "Paris") for what in ("mat", "cat", "user", "hello")]
    data = write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"text": "the cat sat on Paris"}, {"text": "hello user"}])
    (tmp_path / "own_training.py").write_text(TRAINING.format(base=base, texts=texts))
    made = cli(
        *("extract", "--model", base, "--adapter", adapter, "--data", data, "--out", "s.zarr"),
        *("--dim", "64", "--curvature", "8", "--json"),
    )
    assert made.code == 0, made.err
    command = [
        "eval",
        "s.zarr",
        "--retrain",
        "own_training:retrain",
        "--queries",
        asked,
        "--subsets",
        "3",
        "--seeds",
        "3",
    ]
    names = ["BM25", "exact dot", "activation difference", "hidden states", "fisher, k 1, dim 1024"]
    run = cli(*command, "--json", *(part for name in names for part in ("--method", name)))
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert [row["name"] for row in found["rows"]] == names
    assert (found["examples"], found["queries"], found["subsets"], found["seeds"]) == (8, 2, 3, 3)
    assert "less than one of 8" in found["left_out"]["QLD"]
    calls = [eval(line.rsplit(" ", 1)[0]) for line in Path("calls.txt").read_text().splitlines()]
    assert len(calls) == 9 and all(len(lines) == 4 and set(lines) <= set(range(8)) for lines in calls)
    assert cli(*command, "--method", "BM25", "--json").code == 0
    assert len(Path("calls.txt").read_text().splitlines()) == 9  # a second evaluation trains nothing


def test_preferences_are_measured_by_their_own_loss(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "first", base)
    said = ["the cat sat", "on the mat", "hello user", "Paris is"]
    pairs = [{"prompt": one, "chosen": other, "rejected": "mat"} for one in said for other in said[:2]]
    data, asked = write_jsonl(tmp_path / "pairs.jsonl", pairs), write_jsonl(tmp_path / "asked.jsonl", pairs[:2])
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "the cat sat on Paris"}])
    (tmp_path / "preferences.py").write_text(PREFERENCES.format(base=base, adapter=adapter))
    made = cli(
        *("extract", "--model", base, "--adapter", adapter, "--data", data, "--out", "s.zarr", "--loss", "dpo"),
        *("--dim", "64", "--curvature", "8", "--json"),
    )
    assert made.code == 0, made.err
    command = ["eval", "s.zarr", "--retrain", "preferences:retrain", "--subsets", "2", "--seeds", "1", "--json"]
    names = [part for name in ("BM25", "exact dot", "hidden states") for part in ("--method", name)]
    run = cli(*command, "--queries", asked, *names)
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert [row["name"] for row in found["rows"]] == ["BM25", "exact dot"]
    assert "no states" in found["left_out"]["hidden states"]
    other = cli(*command, "--queries", text)
    assert other.code == 2 and "are of the loss dpo" in other.err and "text" in other.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either a store"),
        (["--case", "digits", "--retrain", "a:b"], "brings its own training"),
        (["s.zarr"], "give --retrain module:function and --queries"),
        (["s.zarr", "--retrain", "nothing", "--queries", "q"], "expected module:function"),
        (["s.zarr", "--retrain", "no_such_module_here:f", "--queries", "q"], "no module 'no_such_module_here'"),
        (["s.zarr", "--retrain", "json:missing", "--queries", "q"], "has no function 'missing'"),
        (["--case", "digits", "--subsets", "0"], "greater than or equal to 1"),
        (["--case", "digits", "--seeds", "0"], "greater than or equal to 1"),
        (["--case", "digits", "--out", "nowhere/fidelity.png"], "there is no folder 'nowhere'"),
        (["--case", "digits", "--out", "fidelity.words"], "expected the name of a picture"),
    ],
)
def test_bad_input_is_a_sentence(cli: Any, arguments: list[str], sentence: str) -> None:
    run = cli("eval", *arguments)
    assert run.code == 2 and sentence in run.err and "Traceback" not in run.err


def test_an_unknown_method_is_answered_with_those_that_exist(cli: Any, tmp_path: Path) -> None:
    run = cli("eval", "--case", "digits", "--quick", "--cache", str(tmp_path), "--method", "magic", "--subsets", "2")
    assert run.code == 2 and "'exact dot'" in run.err
