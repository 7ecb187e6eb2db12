"""Preference pairs and rollouts from files to answers, as a user of the command line meets them."""

from __future__ import annotations

import json
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
from gradsift.engine.losses import DPO, PolicyGradient
from gradsift.engine.store.reader import FeatureStore

WORDS = ["the", "cat", "sat", "on", "mat", "Paris", "is", "capital", "of", "France"]


class Site(NamedTuple):
    base: str
    adapter: str
    pairs: str
    rollouts: str
    dpo: str
    grpo: str


def text(draw: np.random.Generator) -> str:
    return " " + " ".join(draw.choice(WORDS, size=int(draw.integers(2, 9))))


def pairs(n: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {"id": f"p{i}", "prompt": f"{WORDS[i % 10]} {i}", "chosen": text(draw), "rejected": text(draw)}
        for i in range(n)
    ]


def rollouts(n: int) -> list[dict[str, Any]]:
    """Every fourth prompt is solved by all of its responses."""
    draw = np.random.default_rng(1)
    made = []
    for i in range(n):
        count = 2 + i % 3
        rewards = [1.0] * count if i % 4 == 3 else [float(j == 0) for j in range(count)]
        responses = [text(draw) for _ in range(count)]
        made.append({"prompt": f"{WORDS[i % 10]} {i}", "responses": responses, "rewards": rewards})
    return made


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    base = save_base(root / "base")
    files = write_jsonl(root / "pairs.jsonl", pairs(12)), write_jsonl(root / "rollouts.jsonl", rollouts(12))
    return Site(base, save_adapter(root / "adapter", base), *files, str(root / "dpo.zarr"), str(root / "grpo.zarr"))


def extraction(site: Site, data: str, out: str, *more: str) -> list[str]:
    where = ["--model", site.base, "--adapter", site.adapter, "--data", data, "--out", out]
    return ["extract", *where, "--dim", "256", "--curvature", "12", "--device", "cpu", *more]


@pytest.fixture
def dpo(site: Site, cli: Cli) -> str:
    if not Path(site.dpo).exists():
        done = cli(*extraction(site, site.pairs, site.dpo, "--loss", "dpo", "--loss-option", "beta=0.3"))
        assert done.code == 0, done.err
        assert "'chosen' and 'rejected' only and the end-of-sequence token" in done.out
    return site.dpo


@pytest.fixture
def grpo(site: Site, cli: Cli) -> str:
    if not Path(site.grpo).exists():
        options = ("--loss", "policy_gradient", "--loss-option", "aggregate=sequence")
        done = cli(*extraction(site, site.rollouts, site.grpo, *options))
        assert done.code == 0, done.err
        assert "3 prompts whose responses all have one reward" in " ".join(done.out.split())
    return site.grpo


def test_rows_of_pairs_are_those_of_capture(site: Site, dpo: str) -> None:
    loaded, store = load(site.base, site.adapter, device="cpu"), FeatureStore.open(dpo)
    assert store.metadata["loss"]["kind"] == DPO(beta=0.3).kind
    assert store.curvature is not None
    encode = loaded.tokenizer
    for row, name in enumerate(store.ids[:3]):
        record = pairs(12)[int(str(name)[1:])]
        batch = {}
        for side in ("chosen", "rejected"):
            ids = [*encode(record["prompt"] + record[side])["input_ids"], encode.eos_token_id]
            start = len(encode(record["prompt"])["input_ids"])
            batch[f"{side}_input_ids"] = torch.tensor([ids])
            batch[f"{side}_labels"] = torch.tensor([[-100] * start + ids[start:]])
        expected = Capture(loaded.model, store.spec)(batch, DPO(beta=0.3)).values[0]
        torch.testing.assert_close(torch.from_numpy(store.features[row]), expected, rtol=1e-4, atol=1e-6)


def test_rows_of_rollouts_are_those_of_capture(site: Site, grpo: str) -> None:
    loaded, store = load(site.base, site.adapter, device="cpu"), FeatureStore.open(grpo)
    assert sorted(store.ids) == [i for i in range(12) if i % 4 != 3]
    data = Dataset.open(site.rollouts, loaded.tokenizer, forms=["rollouts"], skip_silent=True)
    batch = data.fetch(data.find(store.ids[:].tolist()))
    assert batch["owners"].tolist() == [i for i, name in enumerate(store.ids) for _ in range(2 + int(name) % 3)]
    loss = PolicyGradient(aggregate="sequence")
    assert store.metadata["loss"]["kind"] == loss.kind
    rows = Capture(loaded.model, store.spec)(batch, loss)
    torch.testing.assert_close(torch.from_numpy(store.features[:]), rows.values, rtol=1e-4, atol=1e-6)


def test_a_pair_is_found_by_itself_and_its_shares_add_up(site: Site, dpo: str, cli: Cli, tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", pairs(12)[4:6])
    done = cli("query", dpo, "--data", queries, "--scorer", "dot", "--exact", "-k", "3", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["loss"].startswith("dpo: sigmoid, beta 0.3")
    for name, answer in zip(("p4", "p5"), found["queries"], strict=True):
        assert answer["id"] == name
        for row in answer["most"]:
            record = row["record"]
            whole = 2 * record["prompt"] + record["chosen"] + record["rejected"]
            assert sorted("".join(piece for piece, _ in row["tokens"])) == sorted(whole)
            assert sum(share for _, share in row["tokens"]) == pytest.approx(row["score"], rel=1e-3)
            assert row["loss_tokens"] is None
    done = cli("query", dpo, "--data", queries, "--scorer", "cosine", "-k", "1", "--json", "--device", "cpu")
    assert [answer["most"][0]["id"] for answer in json.loads(done.out)["queries"]] == ["p4", "p5"]


def test_a_text_asks_which_pairs_or_rollouts_made_the_model_say_it(dpo: str, grpo: str, cli: Cli) -> None:
    for store, words in ((dpo, ("[chosen]", "[rejected]")), (grpo, ("[reward 1]", "[reward 0]"))):
        asked = ("query", store, "--prompt", "the cat", "--completion", " sat on the mat", "--device", "cpu")
        done = cli(*asked, "-k", "2", "--whole")
        assert done.code == 0, done.err
        for word in words:
            assert word in done.out
        assert "loss/token" not in done.out
        assert "per token" in done.out
        scorer = ("--scorer", "dot") if store == grpo else ("--sample", "4")  # one of them by the exact Fisher
        done = cli(*asked, "-k", "2", "--exact", "--json", *scorer)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["loss"] == "language_model"
        for row in found["queries"][0]["most"]:
            assert sum(share for _, share in row["tokens"]) == pytest.approx(row["score"], rel=2e-3, abs=1e-6)


def test_pairs_are_selected_for_targets_of_text(dpo: str, cli: Cli, tmp_path: Path) -> None:
    targets = write_jsonl(tmp_path / "targets.jsonl", [{"prompt": "the cat", "completion": " sat on the mat"}])
    out = tmp_path / "chosen.jsonl"
    done = cli("select", dpo, "--targets", targets, "--budget", "3", "--out", str(out), "--device", "cpu")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 3
    assert all({"id", "prompt", "chosen", "rejected", "score"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("loss", "record", "words"),
    [
        (
            "language_model",
            {},
            ("expected 'text', or 'prompt' and 'completion', or 'messages': preference pairs need",),
        ),
        ("policy_gradient", {}, ("expected 'prompt', 'responses' and 'rewards'", "need --loss dpo")),
        ("dpo", {"rejected": None}, ("line 1", "column 'rejected': missing")),
        ("dpo", {"chosen": ["a"]}, ("column 'chosen': list ['a'], expected text",)),
    ],
)
def test_pairs_that_cannot_be_used_are_refused(
    site: Site, cli: Cli, tmp_path: Path, loss: str, record: dict[str, Any], words: tuple[str, ...]
) -> None:
    data = write_jsonl(tmp_path / "bad.jsonl", [{**pairs(1)[0], **record}])
    refused(cli(*extraction(site, data, str(tmp_path / "a.zarr"), "--loss", loss)), *words)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"responses": "one"}, "column 'responses': expected a list of two texts or more"),
        ({"responses": ["", " b"]}, "column 'responses[0]': empty"),
        ({"rewards": [1.0]}, "column 'rewards': expected a list of 2 numbers"),
        ({"rewards": [1.0, "good"]}, "column 'rewards': expected a list of 2 numbers"),
        ({"rewards": [1.0, 1.0]}, "none of the 1 records is usable, for their rewards are all alike"),
        ({"old_logprobs": [[0.0], [0.0]]}, "column 'old_logprobs': text is tokenised anew"),
    ],
)
def test_rollouts_that_cannot_be_used_are_refused(
    site: Site, cli: Cli, tmp_path: Path, record: dict[str, Any], words: str
) -> None:
    good = {"prompt": "the", "responses": [" cat", " mat"], "rewards": [1.0, 0.0]}
    data = write_jsonl(tmp_path / "bad.jsonl", [{**good, **record}])
    refused(cli(*extraction(site, data, str(tmp_path / "a.zarr"), "--loss", "policy_gradient")), words)


@pytest.mark.parametrize(
    ("loss", "option", "words"),
    [
        ("dpo", "beta", "expected NAME=VALUE, where the loss dpo has beta, form, label_smoothing"),
        ("dpo", "gamma=1", "expected NAME=VALUE"),
        ("dpo", "beta=high", "--loss-option beta=high: expected a number"),
        ("dpo", "form=hinge", "form is 'hinge', expected 'sigmoid' or 'ipo'"),
        ("policy_gradient", "scale_rewards=1", "expected true or false"),
        ("policy_gradient", "clip_high=true", "expected a number"),
        ("language_model", "beta=1", "the loss language_model has no options"),
    ],
)
def test_options_that_a_loss_does_not_have_are_refused(
    site: Site, cli: Cli, loss: str, option: str, words: str
) -> None:
    refused(cli(*extraction(site, site.pairs, "a.zarr", "--loss", loss, "--loss-option", option)), words)


def test_queries_without_an_advantage_are_refused(grpo: str, cli: Cli, tmp_path: Path) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", [rollouts(4)[3]])
    refused(cli("query", grpo, "--data", queries, "--device", "cpu"), "nothing to learn from them")
