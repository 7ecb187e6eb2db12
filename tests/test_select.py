"""Selection: a dense score matrix reduced and sorted, whatever the blocks; budgets; rows without gradient."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import MemoryStore, dense_order, features, random_rows

import gradsift as gs
from gradsift.bindings.selection import parse_budget
from gradsift.engine.answers.select import least_share, write_jsonl
from gradsift.engine.curvature.fisher import Fisher


@pytest.mark.parametrize("scorer", ["fisher", "dot", "cosine"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("block", [1, 7, 300])
def test_equals_the_dense_matrix(scorer: Any, reduce: Any, block: int) -> None:
    rows, curvature = random_rows(300), random_rows(50, seed=2)
    targets = random_rows(4, seed=1) * 10.0 ** torch.arange(4)[:, None]
    store = MemoryStore(rows, block, curvature=curvature)
    asked = features(targets, gs.SketchSpec(dim=64))
    directions = Fisher(curvature, 1.0, 300).solve(asked.values) if scorer == "fisher" else asked.values.double()
    dense = (directions @ rows.double().T).numpy()
    if scorer == "cosine":
        dense /= asked.grad_norm.double().numpy()[:, None] * rows.norm(dim=1).double().numpy()
    dense = dense.max(axis=0) if reduce == "max" else dense.mean(axis=0)
    chosen = gs.select(store, asked, 0.1, reduce=reduce, scorer=scorer)
    np.testing.assert_array_equal(chosen.rows, dense_order(dense[None], 30)[0])
    np.testing.assert_allclose(chosen.scores, dense[chosen.rows], rtol=1e-9)
    assert chosen.scorer == scorer
    assert chosen.ids[0] == f"example {chosen.rows[0]}"


def test_blocks_change_no_bit() -> None:
    rows, targets = random_rows(100).repeat(2, 1), random_rows(3, seed=1)
    whole = gs.select(MemoryStore(rows, 200), targets, 50, scorer="dot")
    cut = gs.select(MemoryStore(rows, 3), targets, 50, scorer="dot", memory=4000)
    np.testing.assert_array_equal(cut.rows, whole.rows)
    np.testing.assert_array_equal(cut.scores, whole.scores)


def test_a_target_twice_changes_nothing() -> None:
    store, targets = MemoryStore(random_rows(80)), random_rows(3, seed=1)
    once = gs.select(store, targets, 9, scorer="cosine")
    twice = gs.select(store, targets.repeat(2, 1), 9, scorer="cosine")
    np.testing.assert_array_equal(once.rows, twice.rows)


def test_rows_without_gradient_are_dropped_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    rows = random_rows(20)
    rows[[4, 11]] = 0
    with caplog.at_level(logging.WARNING):
        chosen = gs.select(MemoryStore(rows, 3), random_rows(1, seed=1), 19, scorer="dot")
    assert chosen.dropped.tolist() == [4, 11]
    assert sorted(chosen.rows.tolist()) == [i for i in range(20) if i not in (4, 11)]
    assert "2 rows have no gradient and were left out, such as row 4 (id 'example 4')" in caplog.text
    assert "only 18 have a gradient" in caplog.text


@pytest.mark.parametrize(("budget", "rows"), [(0.05, 2), (0.999, 49), (1, 1), (50, 50)])
def test_budgets(budget: float, rows: int) -> None:
    assert len(gs.select(MemoryStore(random_rows(50)), random_rows(1, seed=1), budget, scorer="dot").rows) == rows


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (0.01, "no row at all"),
        (0, "no row at all"),
        (51, "holds 50"),
        (1.5, "a share between 0 and 1"),
        (1.0, "a share between 0 and 1"),
        (-3, "no row at all"),
    ],
)
def test_impossible_budgets_are_refused(budget: float, text: str) -> None:
    with pytest.raises(gs.DataError, match=text):
        gs.select(MemoryStore(random_rows(50)), random_rows(1, seed=1), budget, scorer="dot")


def test_shares_are_what_they_say_and_the_advice_is_followed() -> None:
    assert len(gs.select(MemoryStore(random_rows(100)), random_rows(1, seed=1), 0.29, scorer="dot").rows) == 29
    for total in (2, 3, 7, 30, 99, 100, 101, 12_345, 10**6 + 3):
        assert 1 <= int(least_share(total) * total + 1e-9) <= 2
        assert parse_budget(f"{100 * least_share(total):g}%", total) == int(least_share(total) * total + 1e-9)


def test_targets_that_cancel_out_have_no_mean() -> None:
    target = random_rows(1, seed=1)
    with pytest.raises(gs.ShapeError, match="cancel out"):
        gs.select(MemoryStore(random_rows(50)), torch.cat([target, -target]), 5, scorer="dot", reduce="mean")


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(gs.SpecError, match="method is 'best'"):
        gs.select(MemoryStore(random_rows(50)), random_rows(1), 5, "best")  # type: ignore[arg-type]


def test_jsonl_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "chosen.jsonl"
    records = [{"text": "süß\n", "score": 0.5}, {"text": "b", "score": -1.0}]
    assert write_jsonl(path, records) == 2
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == records

    when = datetime(2024, 5, 1)
    odd = {"when": when, "price": Decimal("1.50"), "raw": b"x", "half\ud83d": "a pair\ude00"}
    write_jsonl(path, [odd])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == {**odd, "when": str(when), "price": "1.50", "raw": "b'x'"}
    write_jsonl(path, records)

    def broken() -> Iterator[dict[str, int]]:
        yield {"a": 1}
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_jsonl(path, broken())
    assert [p.name for p in tmp_path.iterdir()] == ["chosen.jsonl"]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
