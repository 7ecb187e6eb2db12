"""Selectors over stores that were really extracted: at two checkpoints, unsketched, against plain autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import MemoryStore
from torch import Tensor
from toy import ROWS, ToyLoss, toy_batches, toy_extract, toy_model

import gradsift as gs

RATES = (3e-4, 1e-4)
CLASSES = [int(y) for batch in toy_batches() for y in batch["y"]]
TASKS = ["a", "b", "a", "a"]


def weights(seed: int) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in toy_model(seed).named_parameters()}


def dense(batch: Any) -> Tensor:
    """Gradients of the captured weights by autograd at both checkpoints, float32 (n, 2, parameters)."""
    parts = []
    for seed in (0, 1):
        model = toy_model(seed).eval().double()
        rows = []
        for i in range(len(batch["y"])):
            model.zero_grad()
            ToyLoss()(model, {"x": batch["x"][i : i + 1].double(), "y": batch["y"][i : i + 1]}).sum().backward()
            grads = [p.grad for n, p in model.named_parameters() if n.endswith("weight") and p.grad is not None]
            rows.append(torch.cat([g.flatten() for g in grads]))
        parts.append(torch.stack(rows))
    return torch.stack(parts, dim=1).float()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[gs.FeatureStore, gs.FeatureStore, MemoryStore, Tensor]:
    """A store, one of targets, and the same rows and targets by autograd in one block."""
    root = tmp_path_factory.mktemp("exact")
    checkpoints = [
        gs.Checkpoint(weights(seed), rate, name=f"c{seed}") for seed, rate in zip((0, 1), RATES, strict=True)
    ]
    settings: dict[str, Any] = {
        "spec": gs.SketchSpec(kind="identity"),
        "checkpoints": checkpoints,
        "model": toy_model(1),
    }
    store = toy_extract(root / "train", **settings)
    asked = toy_batches((4,))
    asked[0]["x"] = torch.randn(4, 8, generator=torch.Generator().manual_seed(9))
    targets = toy_extract(root / "targets", asked, **{**settings, "curvature": 0})
    rows = torch.cat([dense(batch) for batch in toy_batches()])
    parts = [{"checkpoint": f"c{i}", "learning_rate": rate} for i, rate in enumerate(RATES)]
    memory = MemoryStore(rows, ROWS, parts=parts, loss_tokens=store.loss_tokens)
    return store, targets, memory, dense(asked[0])


CASES: list[tuple[str, dict[str, Any]]] = [
    ("top", {"scorer": "dot", "tasks": TASKS}),
    ("top", {"scorer": "cosine", "tasks": TASKS}),
    ("top", {"scorer": "cosine", "tasks": TASKS, "reduce": "rank"}),
    ("top", {"scorer": "cosine", "as_set": True, "tasks": TASKS}),
    ("tarot", {}),
    ("bids", {"scorer": "cosine", "tasks": TASKS}),
    ("bids", {"scorer": "dot", "rule": "gain"}),
    ("groups", {"scorer": "dot", "groups": CLASSES, "tasks": TASKS}),
    ("groups", {"scorer": "dot", "groups": CLASSES, "rule": "bandit", "per_draw": 2}),
    ("diverse", {"scorer": "cosine"}),
    ("order", {}),
    ("order", {"direction": "rising", "bins": 5}),
    ("vog", {"classes": CLASSES}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_a_store_chooses_what_plain_gradients_choose(made: Any, method: str, options: dict[str, Any]) -> None:
    store, targets, memory, asked = made
    alone = method in ("order", "vog")
    exact = gs.select(memory, None if alone else asked, 9, method, **options)
    found = gs.select(store, None if alone else targets, 9, method, **options)
    np.testing.assert_array_equal(found.rows, exact.rows)
    np.testing.assert_allclose(found.scores, exact.scores, rtol=1e-4, atol=1e-5 * np.abs(exact.scores).max())
    assert found.ids.tolist() == [store.ids[int(row)] for row in found.rows]
    if isinstance(exact.weights, dict):
        assert found.weights == pytest.approx(exact.weights, abs=1e-3)


def test_less_is_the_largest_over_tasks_of_the_mean_over_shots(made: Any) -> None:
    """Dense loop over checkpoints, rows and shots; learning rates renormalised, unit rows on both sides."""
    store, targets, memory, asked = made
    rows, rates = memory.rows.double(), torch.tensor(RATES, dtype=torch.float64)
    scores = np.zeros((4, ROWS))
    for c in range(2):
        for i in range(ROWS):
            for j in range(4):
                a, b = rows[i, c], asked[j, c].double()
                scores[j, i] += float(rates[c] / rates.sum() * (a @ b) / (a.norm() * b.norm()))
    expected = np.stack([scores[[0, 2, 3]].mean(axis=0), scores[1]]).max(axis=0)
    chosen = gs.select(store, targets, 0.25, scorer="less", tasks=TASKS)
    np.testing.assert_array_equal(chosen.rows, np.lexsort((np.arange(ROWS), -expected))[: ROWS // 4])
    np.testing.assert_allclose(chosen.scores, expected[chosen.rows], rtol=1e-4)
    assert chosen.scorer == "less"


def test_lobass_reads_the_losses_of_two_stores(tmp_path: Path) -> None:
    before, after = toy_extract(tmp_path / "before"), toy_extract(tmp_path / "after", model=toy_model(1))
    chosen = gs.select(before, None, 8, "lobass", reference=after)
    score = (before.loss.astype(float) - after.loss) / before.loss
    np.testing.assert_array_equal(chosen.rows, np.argsort(-score, kind="stable")[:8])
    with pytest.raises(gs.StoreError, match="given one store"):
        gs.select(before, None, 8, "lobass")


def test_a_compacted_store_answers_top_and_refuses_what_reads_rows(tmp_path: Path) -> None:
    from gradsift.engine.compaction.compact import compact

    store = toy_extract(tmp_path / "whole", curvature=50)
    targets = torch.from_numpy(store.features[[3, 17, 30]])
    small = compact(store, tmp_path / "small", bytes=32)
    whole = gs.select(store, targets, 10, scorer="dot", tasks=["x", "y", "x"])
    found = gs.select(small, targets, 10, scorer="dot", tasks=["x", "y", "x"])
    assert len(set(found.rows.tolist()) & set(whole.rows.tolist())) >= 7
    assert found.reasons is None
    for method, options in (("tarot", {}), ("bids", {}), ("diverse", {}), ("groups", {"groups": 2}), ("order", {})):
        with pytest.raises(gs.StoreError, match="is compacted and holds no rows"):
            gs.select(small, None if method == "order" else targets, 10, method, **options)  # type: ignore[arg-type]
