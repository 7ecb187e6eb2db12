"""`gradsift select` with every method, and `gradsift methods`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commandline import Cli, refused
from tokens import save_adapter, save_base, write_jsonl

from gradsift.bindings.selection import parse_budget
from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.selectors.registry import SELECTORS
from gradsift.kernels.errors import DataError

WORDS = ["the", "cat", "sat", "on", "mat", "Paris", "is", "capital", "of", "France"]


class Site(NamedTuple):
    """A store of 30 records in two domains, one of a model tuned further, and targets of two tasks."""

    store: str
    tuned: str
    targets: str


def records(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{i}",
            "prompt": f"{WORDS[i % 10]} {i}",
            "completion": " " + " ".join(WORDS[(i * 7 + j) % 10] for j in range(2 + i % 4)),
            "domain": "even" if i % 2 == 0 else "odd",
            "tags": [WORDS[i % 3]],
        }
        for i in range(first, first + n)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Its stores are extracted by the first test that needs them."""
    root = tmp_path_factory.mktemp("site")
    base = save_base(root / "base")
    save_adapter(root / "adapter", base)
    save_adapter(root / "tuned", base, seed=3)
    write_jsonl(root / "train.jsonl", records(30))
    targets = [{**record, "task": f"t{i % 2}"} for i, record in enumerate(records(5, 40))]
    return Site(str(root / "train.zarr"), str(root / "tuned.zarr"), write_jsonl(root / "targets.jsonl", targets))


@pytest.fixture
def made(site: Site, cli: Cli) -> Site:
    for path, adapter in ((site.store, "adapter"), (site.tuned, "tuned")):
        if not Path(path).exists():
            root = Path(path).parent
            where = [
                "--model",
                str(root / "base"),
                "--adapter",
                str(root / adapter),
                "--data",
                str(root / "train.jsonl"),
            ]
            done = cli("extract", *where, "--out", path, "--dim", "256", "--curvature", "20", "--device", "cpu")
            assert done.code == 0, done.err
    return site


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("method", "more", "reason"),
    [
        ("top", ["--tasks", "task", "--scorer", "cosine"], "most for task 't"),
        ("top", ["--tasks", "task", "--reduce", "rank"], "rank "),
        ("tarot", [], "neighbour 1 of target "),
        ("bids", ["--tasks", "task", "--rule", "gain"], "for task 't"),
        ("groups", ["--labels", "domain"], "group '"),
        ("groups", ["--labels", "3", "--rule", "bandit", "--scorer", "dot"], "group "),
        ("diverse", [], "covers "),
    ],
)
def test_every_method_writes_records_ready_to_train_on(
    made: Site, cli: Cli, tmp_path: Path, method: str, more: list[str], reason: str
) -> None:
    out = tmp_path / "chosen.jsonl"
    done = cli(
        "select", made.store, "--targets", made.targets, "--budget", "20%", "--method", method, "--out", str(out), *more
    )
    assert done.code == 0, done.err
    chosen, originals = lines(out), {record["id"]: record for record in records(30)}
    assert len({line["id"] for line in chosen}) == 6
    for line in chosen:
        rest = {key: value for key, value in line.items() if key not in ("score", "reason", "weight")}
        assert rest == originals[line["id"]]
        assert isinstance(line["score"], float)
    assert chosen[0]["reason"].startswith(reason)
    assert ("weight" in chosen[0]) == (method in ("tarot", "diverse"))
    assert "6 of 30 examples" in " ".join(done.out.split())
    assert ("mixture in tokens: " in done.out) == (reason == "group '")


def test_methods_without_targets(made: Site, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "chosen.jsonl"
    done = cli(
        "select", made.store, "--method", "lobass", "--reference", made.tuned, "--budget", "4", "--out", str(out)
    )
    assert done.code == 0, done.err
    assert lines(out)[0]["reason"].startswith("loss per token ")
    done = cli("select", made.store, "--method", "order", "--out", str(out), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["facts"] == {"epochs": 1}
    assert len(lines(out)) == 30
    refused(
        cli("select", made.store, "--method", "vog", "--out", str(out)), "one checkpoint", "extract(..., checkpoints="
    )


def test_otm_finds_how_many(made: Site, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "chosen.jsonl"
    asked = ("select", made.store, "--targets", made.targets, "--method", "tarot", "--rule", "otm", "--out", str(out))
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["facts"]["ratio"] == pytest.approx(found["chosen"] / 30)
    refused(cli(*asked, "--budget", "5%"), "give budget=None")


def test_bad_input_is_one_sentence(made: Site, cli: Cli, tmp_path: Path) -> None:
    out = str(tmp_path / "chosen.jsonl")
    asked = ("select", made.store, "--targets", made.targets, "--out", out)
    refused(cli(*asked, "--method", "best"), "method is 'best', expected 'top', 'tarot'")
    refused(cli(*asked, "--scorer", "best"), "scorer is 'best', expected 'fisher'")
    refused(cli(*asked, "--rule", "gain"), "method 'top' has no option 'rule'")
    refused(cli(*asked, "--reduce", "best"), "reduce is 'best'")
    refused(cli(*asked, "--method", "bids", "--rule", "best"), "rule is 'best'")
    refused(cli(*asked, "--labels", "domain"), "--labels is of groups and vog but the method is top")
    refused(cli(*asked, "--method", "groups"), "method groups needs --labels")
    refused(cli(*asked, "--method", "groups", "--labels", "kind"), "training example 'r", "nothing in column 'kind'")
    refused(cli(*asked, "--method", "groups", "--labels", "tags"), "training example 'r", "has a list in column 'tags'")
    refused(cli(*asked, "--method", "lobass"), "method lobass needs --reference")
    refused(cli(*asked, "--tasks", "domains"), "target 'r40' has nothing in column 'domains'")
    refused(cli(*asked, "--budget", "1%"), "is less than one: give at least 3.4%")
    refused(cli("select", made.store, "--out", out), "method top compares with targets: give --targets")
    refused(cli("select", made.store, "--method", "order", "--tasks", "task", "--out", out), "give both or neither")
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("text", "rows"), [("5%", 2), ("0.05", 2), ("7", 7), ("29%", 14), ("100%", 50), ("1.0", 50), (" 3.9% ", 1)]
)
def test_budgets_are_rounded_down(text: str, rows: int) -> None:
    assert parse_budget(text, 50) == rows


@pytest.mark.parametrize("text", ["0", "-5%", "101%", "51", "half", "1%", "0.01"])
def test_impossible_budgets_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="budget"):
        parse_budget(text, 50)


@pytest.mark.parametrize("columns", [80, 120])
def test_methods_prints_what_exists(cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("methods")
    assert done.code == 0, done.err
    shown = done.out.splitlines()
    assert max(map(len, shown)) <= columns
    for name in (*SCORERS, *SELECTORS):
        assert any(line.startswith(f"  {name} ") for line in shown), name
    assert "arXiv 2412.00420" in done.out
    found = json.loads(cli("methods", "--json").out)
    assert [one["name"] for one in found["selectors"]] == list(SELECTORS)
    assert {"name", "formula", "needs", "cost", "source", "published"} <= found["scorers"][0].keys()
    assert "lam" in next(one for one in found["selectors"] if one["name"] == "diverse")["options"]
    assert [one["name"] for one in found["corrections"]] == ["none", "fisher", "ekfac", "ggn"]


def test_help_names_every_method(cli: Cli) -> None:
    shown = cli("select", "--help").out
    assert [name for name in SELECTORS if name not in shown] == []
    assert "methods" in cli("--help").out
