"""`gradsift compact`, and every command that reads a store on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from commandline import Cli, refused
from test_cli import records
from tokens import save_adapter, save_base, write_jsonl

import gradsift as gs


class Site(NamedTuple):
    """Files of a tuned model, and where its stores go."""

    base: str
    adapter: str
    root: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    base = save_base(root / "base")
    write_jsonl(root / "train.jsonl", records(60))
    write_jsonl(root / "more.jsonl", [{**record, "id": f"more {record['id']}"} for record in records(8)])
    write_jsonl(root / "targets.jsonl", records(3))
    return Site(base, save_adapter(root / "adapter", base), root)


def extracted(cli: Cli, site: Site, name: str) -> str:
    out = site.root / f"{name}.zarr"
    if not out.exists():
        where = ["--model", site.base, "--adapter", site.adapter, "--data", str(site.root / f"{name}.jsonl")]
        done = cli("extract", *where, "--out", str(out), "--dim", "256", "--curvature", "20", "--device", "cpu")
        assert done.code == 0, done.err
    return str(out)


def test_compact_then_every_command(cli: Cli, site: Site, tmp_path: Path) -> None:
    whole, small = extracted(cli, site, "train"), str(tmp_path / "train.compact")
    done = cli("compact", whole, "--bytes", "16", "--out", small)
    assert done.code == 0, done.err
    made = gs.CompactStore.open(small)
    said = made.recall
    head, _, names, line, last = done.out.splitlines()[:5]
    assert head == "recall@10 of the whole store's fisher answers, 6 held-out rows as queries;"
    assert names.split() == ["bytes", "numbers", "bits", "alone", "list", "of", "100"]
    shown = [str(made.bytes), str(made.axes), str(made.bits), f"{said['alone']:.3f}", f"{said['listed']:.3f}"]
    assert line.split() == shown
    assert last.startswith("done")
    assert "60 examples in 16 bytes each" in " ".join(done.out.split())

    about = json.loads(cli("info", small, "--json", "--verify").out)
    assert about["compacted"]["recall"] == said
    assert about["compacted"]["source"] == str(Path(whole).resolve())
    assert about["examples"] == 60
    told = cli("info", small)
    assert "16 bytes per example" in told.out
    assert f"{said['alone']:.3f} alone" in told.out

    ask = ["--prompt", "the 3", "--completion", " cat sat", "--exact", "-k", "3", "--json", "--device", "cpu"]
    asked = {path: cli("query", path, *ask) for path in (whole, small)}
    assert asked[small].code == 0, asked[small].err
    found = {path: [row["id"] for row in json.loads(run.out)["queries"][0]["most"]] for path, run in asked.items()}
    assert found[small] == found[whole]  # a list of 100 of 60 examples holds all: exact gradients decide

    chosen = tmp_path / "chosen.jsonl"
    targets = str(site.root / "targets.jsonl")
    run = cli("select", small, "--targets", targets, "--budget", "5", "--out", str(chosen), "--device", "cpu")
    assert run.code == 0, run.err
    assert len({json.loads(line)["id"] for line in chosen.read_text().splitlines()}) == 5


def test_append(cli: Cli, site: Site, tmp_path: Path) -> None:
    small = str(tmp_path / "train.compact")
    assert cli("compact", extracted(cli, site, "train"), "--out", small, "--bytes", "16").code == 0
    more = extracted(cli, site, "more")
    run = cli("compact", more, "--append", "--out", small)
    assert run.code == 0, run.err
    assert run.out.startswith("added  8 examples, ")
    outside = gs.CompactStore.open(small).metadata["compacted"]["appended"][0]["outside"]
    assert f"{outside:.1%} of their squared length outside the axes" in run.out
    assert json.loads(cli("info", small, "--json").out)["compacted"]["appended"] == 8
    refused(cli("compact", more, "--append", "--out", small), "'more r0'", "already")
    refused(cli("compact", more, "--append", "--out", small, "--bytes", "64"), "leave --bytes")


def test_recall_instead_of_bytes(cli: Cli, site: Site, tmp_path: Path) -> None:
    run = cli("compact", extracted(cli, site, "train"), "--recall", "0.9", "--out", str(tmp_path / "a"), "--json")
    assert run.code == 0, run.err
    assert json.loads(run.out)["compacted"]["recall"]["listed"] >= 0.9


def test_one_sentence_for_what_cannot_be(cli: Cli, site: Site, tmp_path: Path) -> None:
    whole, out = extracted(cli, site, "train"), str(tmp_path / "a")
    refused(cli("compact", whole, "--out", whole), "holds a store already")
    refused(cli("compact", whole, "--out", out, "--bytes", "2"), "bytes is 2", "such as 128")
    refused(cli("compact", whole, "--out", out, "--bytes", "64", "--recall", "0.9"), "give one of them")
    refused(cli("compact", str(tmp_path / "none"), "--out", out), "does not exist")
    refused(cli("compact", whole, "--out", out, "--scorer", "datainf"), "datainf")
    assert not Path(out).exists()
