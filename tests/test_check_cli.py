"""`gradsift check` as a user meets it: tables, JSON and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import Cli
from rich.console import Console
from tokens import save_adapter, save_base, write_jsonl

from gradsift.bindings.check.render import mask
from gradsift.engine.check.run import CHECKS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("check")
    base = save_base(root / "base")
    words = ["the", "cat", "sat", "on", "the", "mat", "in", "Paris", "which", "is", "the", "capital", "of", "France"]
    records = [{"prompt": f"{words[i % 14]} {i}", "completion": " " + " ".join(words[: 2 + i % 7])} for i in range(30)]
    return {
        "base": base,
        "adapter": save_adapter(root / "adapter", base),
        "data": write_jsonl(root / "train.jsonl", records),
        "bad": write_jsonl(root / "bad.jsonl", [records[0], {"prompt": "a", "completion": 3}]),
    }


def test_json_holds_every_check(cli: Cli, site: dict[str, str]) -> None:
    got = cli(
        "check", "--model", site["base"], "--adapter", site["adapter"], "--data", site["data"], "--dim", "512", "--json"
    )
    report = json.loads(got.out)
    found = {check["name"]: check["verdict"] for check in report["checks"]}
    assert list(found) == list(CHECKS)
    assert {name for name, verdict in found.items() if verdict == "fail"} <= {"adapter"}
    assert found["coverage"] == found["features"] == found["conservation"] == "ok"
    assert got.code == (0 if report["ok"] else 1)
    assert report["dim"] == 512
    assert report["trained_on"].startswith("'completion' only")


def test_people_get_tables_and_a_verdict(cli: Cli, site: dict[str, str]) -> None:
    got = cli("check", "--model", site["base"], "--adapter", site["adapter"], "--data", site["data"], "--dim", "512")
    assert "kind of map" in got.out
    assert "q_proj" in got.out
    assert "✓  features" in got.out
    assert "[ the cat" in got.out
    assert got.out.strip().splitlines()[-1][:2] in ("✓ ", "! ", "✗ ")
    assert max(len(line.rstrip()) for line in got.out.splitlines()) <= 100


def test_something_wrong_is_exit_code_1(cli: Cli, site: dict[str, str]) -> None:
    got = cli("check", "--model", site["base"], "--data", site["data"])
    assert got.code == 1
    assert "no LoRA layer" in got.out
    assert "do not trust results on this model yet" in got.out
    assert "not run" in got.out


def test_bad_input_is_exit_code_2(cli: Cli, site: dict[str, str]) -> None:
    got = cli("check", "--model", site["base"], "--adapter", site["adapter"], "--data", site["bad"])
    assert got.code == 2
    assert "line 2" in got.err
    assert "column 'completion'" in got.err
    assert cli("check", "--model", site["base"], "--data", "absent.jsonl").code == 2


def test_the_mask_shows_what_is_trained_on(tmp_path: Path) -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as captured:
        console.print(mask(["How", " many?", " Four", "", "\n"], [False, False, True, True, False], marks=True))
    assert captured.get().rstrip() == "How many?[ Four<end>]↵"
