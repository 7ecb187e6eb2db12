"""`--scorer NAME` of query and select: every scorer that the store serves answers, the others say what to run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commandline import Cli, refused
from tokens import save_adapter, save_base, write_jsonl

from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.store.reader import FeatureStore

RECORDS = [{"id": f"r{i}", "prompt": "the cat", "completion": f" sat on {'the mat ' * (i % 4 + 1)}"} for i in range(24)]


@pytest.fixture
def store(tmp_path: Path, cli: Cli) -> str:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    data, out = write_jsonl(tmp_path / "train.jsonl", RECORDS), str(tmp_path / "train.zarr")
    write_jsonl(tmp_path / "targets.jsonl", RECORDS[:2])
    done = cli(
        "extract", "--model", base, "--adapter", adapter, "--data", data, "--out", out, "--dim", "64",
        "--curvature", "12", "--device", "cpu", "--groups", "parameter",
    )  # fmt: skip
    assert done.code == 0, done.err
    return out


SENTENCES = {
    "less": "gradients at one checkpoint",
    "dmin": "keeps no timesteps apart",
    "dtrak": "needs those of the squared prediction",
    "self": "scores rows alone and compares no queries",
    "self_fisher": "scores rows alone and compares no queries",
}


def test_every_scorer_answers_or_says_what_to_run(store: str, cli: Cli, tmp_path: Path) -> None:
    opened = FeatureStore.open(store)
    assert opened.features.shape[1] == len(opened.table) > 2
    asked = ("query", store, "--data", str(tmp_path / "targets.jsonl"), "-k", "3", "--json")
    choose = ("select", store, "--targets", str(tmp_path / "targets.jsonl"), "--budget", "4", "--json")
    for scorer in SCORERS:
        done = cli(*asked, "--scorer", scorer)
        chosen = cli(*choose, "--scorer", scorer, "--out", str(tmp_path / f"{scorer}.jsonl"))
        if scorer in SENTENCES:
            refused(done, SENTENCES[scorer])
            refused(chosen, SENTENCES[scorer])
            continue
        assert done.code == 0, done.err
        assert json.loads(done.out)["scorer"] == scorer
        found = [row["score"] for row in json.loads(done.out)["queries"][0]["most"]]
        assert len(found) == 3
        assert np.all(np.diff(found) <= 0)
        assert chosen.code == 0, chosen.err
        assert len((tmp_path / f"{scorer}.jsonl").read_text().splitlines()) == 4
    for scorer in ("self", "self_fisher"):
        chosen = cli("select", store, "--budget", "4", "--scorer", scorer, "--out", str(tmp_path / f"{scorer}.jsonl"))
        assert chosen.code == 0, chosen.err
        assert len((tmp_path / f"{scorer}.jsonl").read_text().splitlines()) == 4
    refused(cli(*asked, "--scorer", "euclid"), "scorer is 'euclid', expected 'fisher', 'dot', 'cosine'")
    refused(cli(*asked, "--scorer", "trak", "--exact"), "do not decide the scorer 'trak'")
