"""The command line as a user meets it: files in, sentences and JSON out, a real process killed and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from commandline import Cli, refused
from tokens import save_adapter, save_base, write_jsonl

from gradsift.bindings.data import Dataset
from gradsift.bindings.models import load
from gradsift.engine.capture.capture import Capture
from gradsift.engine.losses import language_model
from gradsift.engine.store.reader import FeatureStore

WORDS = ["the", "cat", "sat", "on", "mat", "Paris", "is", "capital", "of", "France"]


class Site(NamedTuple):
    """Files of a tuned model, and a store made of them."""

    base: str
    adapter: str
    data: str
    targets: str
    store: str


def records(n: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {
            "id": f"r{i}",
            "prompt": f"{WORDS[i % 10]} {i}",
            "completion": " " + " ".join(draw.choice(WORDS, size=int(draw.integers(2, 9)))),
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    base = save_base(root / "base")
    return Site(
        base,
        save_adapter(root / "adapter", base),
        write_jsonl(root / "train.jsonl", records(40)),
        write_jsonl(root / "targets.jsonl", records(3)),
        str(root / "train.zarr"),
    )


@pytest.fixture
def store(site: Site, cli: Cli) -> str:
    """Extracted by the first test that needs it."""
    if not Path(site.store).exists():
        done = cli(*extraction(site, site.store))
        assert done.code == 0, done.err
    return site.store


def extraction(site: Site, out: str, *more: str) -> list[str]:
    where = ["--model", site.base, "--adapter", site.adapter, "--data", site.data, "--out", out]
    return ["extract", *where, "--dim", "256", "--curvature", "20", "--device", "cpu", *more]


def test_extract_says_what_it_trained_on_and_what_next(site: Site, cli: Cli, tmp_path: Path) -> None:
    done = cli(*extraction(site, str(tmp_path / "a.zarr")))
    assert done.code == 0, done.err
    assert "40 examples" in done.out
    assert "'completion' only and the end-of-sequence token" in done.out
    assert f"gradsift query {tmp_path / 'a.zarr'}" in done.out.replace("\n", "")
    opened = FeatureStore.open(tmp_path / "a.zarr")
    assert sorted(opened.ids) == sorted(record["id"] for record in records(40))
    notes = opened.metadata["notes"]
    assert notes["model"] == site.base
    assert notes["trained_on"] == "'completion' only and the end-of-sequence token"


def test_rows_are_those_of_capture(site: Site, store: str) -> None:
    loaded = load(site.base, site.adapter, device="cpu")
    data = Dataset.open(site.data, loaded.tokenizer)
    opened = FeatureStore.open(store)
    rows = Capture(loaded.model, opened.spec)(data.fetch(range(40)), language_model)
    order = data.find(opened.ids[:].tolist())
    torch.testing.assert_close(torch.from_numpy(opened.features[:]), rows.values[order], rtol=1e-4, atol=1e-5)
    assert opened.loss_tokens is not None
    assert opened.loss_tokens.tolist() == [data.example(i).scored for i in order]


def test_extract_in_json_prints_one_object(site: Site, cli: Cli, tmp_path: Path) -> None:
    done = cli(*extraction(site, str(tmp_path / "a.zarr"), "--json", "--store-dtype", "float16"))
    found = json.loads(done.out)
    assert found["examples"] == 40
    assert found["dtype"] == "float16"
    assert found["survey"]["bad"] == 0


def test_query_finds_a_training_example_by_itself(store: str, cli: Cli) -> None:
    wanted = records(40)[7]
    asked = ("--prompt", wanted["prompt"], "--completion", wanted["completion"])
    for scorer in ("dot", "cosine"):
        done = cli("query", store, *asked, "--scorer", scorer, "-k", "3", "--exact", "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["exact"]
        assert found["scorer"] == scorer
        (answer,) = found["queries"]
        rows = answer["most"]
        assert len(rows) == 3
        assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
        for row in rows:
            assert "".join(piece for piece, _ in row["tokens"]) == row["record"]["prompt"] + row["record"]["completion"]
            if scorer == "dot":
                assert sum(share for _, share in row["tokens"]) == pytest.approx(row["score"], rel=1e-3)
        if scorer == "cosine":
            assert rows[0]["id"] == "r7"
            assert rows[0]["score"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("method", ["none", "fisher", "ekfac", "ggn"])
def test_query_scores_exactly_along_a_curvature(site: Site, store: str, cli: Cli, method: str) -> None:
    asked = ("--prompt", "the cat", "--completion", " sat on the mat", "-k", "4", "--device", "cpu")
    done = cli("query", store, *asked, "--method", method, "--damping", "0.5", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["exact"]
    assert found["method"] == method
    rows = found["queries"][0]["most"]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        assert sum(share for _, share in row["tokens"]) == pytest.approx(row["score"], rel=1e-3)
    assert "plain gradients" not in done.err
    if method == "none":
        assert found["curvature"] == []
        return
    (curvature,) = found["curvature"]
    assert curvature["k"] == 0.5
    assert curvature["lambda"] > 0
    assert curvature["steps"] == {"fisher": 4, "ekfac": 0, "ggn": 6}[method]
    assert not Path(f"{store}.solving").exists()
    assert method == "fisher" or Path(f"{store}.ekfac").exists()
    said = cli("query", store, *asked, "--method", method, "--held-out", site.targets)
    assert said.code == 0, said.err
    assert f"exact gradients of a short list along {method} (k = " in " ".join(said.out.split())
    if method == "fisher":
        assert "fisher: at most 9 passes over the sample (27 batches), about" in said.err


def test_query_prints_every_question_and_both_ends(site: Site, store: str, cli: Cli) -> None:
    done = cli("query", store, "--data", site.targets, "-k", "2", "--least")
    assert done.code == 0, done.err
    assert done.out.count("most influential") == 3
    assert done.out.count("pushing the other way") == 3
    assert "targets.jsonl line 2" in done.out
    assert "+[" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_a_prompt_alone_is_answered_by_the_model_first(store: str, cli: Cli) -> None:
    done = cli("query", store, "--prompt", "the cat", "-k", "1", "--json")
    assert done.code == 0, done.err
    (answer,) = json.loads(done.out)["queries"]
    assert answer["record"]["prompt"] == "the cat"
    assert answer["record"]["completion"]


def test_select_writes_records_ready_to_train_on(site: Site, store: str, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "chosen.jsonl"
    done = cli("select", store, "--targets", site.targets, "--budget", "10%", "--out", str(out), "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert json.loads(done.out)["chosen"] == len(lines) == 4
    originals = {record["id"]: record for record in records(40)}
    for line in lines:
        assert {k: v for k, v in line.items() if k not in ("score", "reason")} == originals[line["id"]]
        assert line["reason"].startswith("most for target ")
    scores = [line["score"] for line in lines]
    assert scores == sorted(scores, reverse=True)


def test_info_tells_where_a_store_comes_from(site: Site, store: str, cli: Cli) -> None:
    plain = cli("info", store, "--verify")
    assert plain.code == 0, plain.err
    for word in ("40", "256 numbers", "20 rows", "'completion' only", "every byte is as it was written"):
        assert word in plain.out
    found = json.loads(cli("info", store, "--json").out)
    assert found["examples"] == 40
    assert found["complete"]
    assert found["notes"]["adapter"] == site.adapter


def test_bad_input_is_one_sentence(site: Site, store: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "the cat"}\n{"text": 3}\n', encoding="utf-8")
    bad = Site(site.base, site.adapter, str(tmp_path / "bad.jsonl"), "", "")
    out = str(tmp_path / "b.zarr")
    refused(cli(*extraction(bad, out)), "bad.jsonl line 2, column 'text': int 3, expected text")
    refused(cli(*extraction(bad, out, "--dim", "100")), "dim is 100, expected a multiple of 64")
    refused(cli(*extraction(site, site.base)), "holds something that is no gradsift store")
    refused(cli(*extraction(site, store, "--seed", "1")), "seed")
    refused(cli("query", str(tmp_path / "none"), "--text", "x"), "does not exist")
    refused(cli("query", store), "give exactly one of --text, --prompt and --data")
    refused(cli("query", store, "--text", "x", "--completion", "y"), "without --prompt")
    refused(cli("query", store, "--text", "the cat", "-k", "0"), "k is 0")
    refused(
        cli("select", store, "--targets", site.targets, "--budget", "120%", "--out", out), "budget is '120%', expected"
    )
    refused(cli("query", store, "--text", "the cat", "--train", "gone.jsonl"), "gone.jsonl", "does not exist")
    assert not Path(out).exists()


def test_bad_records_are_left_out_when_asked(site: Site, cli: Cli, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in records(6)]
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:2], "oops", *lines[2:]]), encoding="utf-8")
    bad = Site(site.base, site.adapter, str(tmp_path / "bad.jsonl"), "", "")
    done = cli(*extraction(bad, str(tmp_path / "b.zarr"), "--skip-bad"))
    assert done.code == 0, done.err
    assert "bad.jsonl line 3, column 1: not JSON" in done.out
    assert len(FeatureStore.open(tmp_path / "b.zarr")) == 6


def test_another_adapter_is_refused(site: Site, store: str, cli: Cli, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", site.base, seed=5)
    refused(cli("query", store, "--text", "the cat", "--adapter", other), "is not the one that", "extract again")


def test_a_store_made_from_python_asks_for_its_model(site: Site, cli: Cli, tmp_path: Path) -> None:
    from gradsift.engine.extraction.extract import extract

    loaded = load(site.base, site.adapter, device="cpu")
    batches = Dataset.open(site.data, loaded.tokenizer).batches(block=64)
    path = str(tmp_path / "p.zarr")
    extract(loaded.model, batches, language_model, path, curvature=4, progress=False)
    refused(cli("query", path, "--text", "the cat"), "give --model, --adapter and --train")
    given = ("--model", site.base, "--adapter", site.adapter, "--train", site.data)
    done = cli("query", path, "--text", "the cat", *given, "-k", "1", "--json")
    assert done.code == 0, done.err


def test_help_teaches_and_is_fast_to_load(cli: Cli) -> None:
    top = cli("--help")
    assert [name for name in ("demo", "check", "extract", "query", "select", "info") if name not in top.out] == []
    for command in ("extract", "query", "select", "info"):
        assert f"gradsift {command} " in cli(command, "--help").out
    loaded = "import sys; import gradsift.bindings.cli; print(sorted({'torch', 'numpy', 'zarr'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_killed_extraction_goes_on_and_ends_the_same(site: Site, cli: Cli, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "train.jsonl", records(200))
    larger = Site(site.base, site.adapter, data, "", "")

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gradsift", *extraction(larger, str(out), "--batch-size", "1")]
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    killed = start(tmp_path / "killed.zarr")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed.zarr").glob("blocks/c.*")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = FeatureStore.open(tmp_path / "killed.zarr", unfinished=True)
    assert not left.complete
    again = start(tmp_path / "killed.zarr")
    whole = cli(*extraction(larger, str(tmp_path / "whole.zarr"), "--batch-size", "1"))
    assert whole.code == 0, whole.err
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert err == ""
    assert "200 examples" in out
    files = [
        path.relative_to(tmp_path / "whole.zarr") for path in (tmp_path / "whole.zarr").rglob("*") if path.is_file()
    ]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "killed.zarr" / file).read_bytes() == (tmp_path / "whole.zarr" / file).read_bytes(), file
