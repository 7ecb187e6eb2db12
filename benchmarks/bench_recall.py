"""Recall of the exact top 10 by the sketch alone and after re-scoring, on a language model that was really trained.

The truth is what gradients without any sketch say: inner products with the query's for "dot", the same after the
damped true Fisher of unsketched sampled-label rows for "fisher". Nothing is simulated: the lists are re-scored by
directional derivatives of the model, along vectors that ``gradient`` and ``precondition`` return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from paired import FULL
from torch import Tensor
from trained_lm import train

import gradsift as gs
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.losses import language_model

RECORDS, QUERIES, SAMPLE = (3000, 16, 300) if FULL else (120, 2, 20)
DIMS = (512, 1024, 4096) if FULL else (512, 1024)
LISTS = (30, 100, 300) if FULL else (30,)
K = 10
BATCH = 50


class Setup:
    """The model, exact rows of records, queries and curvature sample, and the vectors of the queries."""

    def __init__(self) -> None:
        sizes = {"width": 64, "steps": 300, "epochs": 1} if FULL else {"width": 32, "steps": 2, "epochs": 1}
        self.model, self.records, unseen = train(RECORDS, unseen=QUERIES, **sizes)
        self.batches = [{"input_ids": part} for part in self.records.split(BATCH)]
        self.queries = {"input_ids": unseen}
        chosen = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(2))[:SAMPLE]
        self.sample = [
            language_model.sampled_batch(self.model, {"input_ids": part}, range(i * BATCH, i * BATCH + len(part)))
            for i, part in enumerate(self.records[chosen].split(BATCH))
        ]
        identity = gs.Capture(self.model, gs.SketchSpec(kind="identity"))
        self.exact = self.rows(identity, self.batches)
        self.asked = self.rows(identity, [self.queries])
        self.fisher = Fisher(self.rows(identity, self.sample), examples=RECORDS)
        self.vectors = [
            gs.gradient(self.model, {"input_ids": q[None]}, language_model) for q in self.queries["input_ids"]
        ]

    def rows(self, capture: gs.Capture, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        return torch.cat([capture(batch, language_model).values for batch in batches])

    def fetch(self, rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for part in self.records[list(rows)].split(BATCH):
            yield {"input_ids": part}

    def truth(self, scorer: str) -> np.ndarray:
        asked = self.fisher.solve(self.asked) if scorer == "fisher" else self.asked.double()
        return torch.topk(asked @ self.exact.double().T, K).indices.numpy()


class Sketched:
    """A store in memory."""

    def __init__(self, setup: Setup, dim: int) -> None:
        capture = gs.Capture(setup.model, gs.SketchSpec(dim=dim))
        self.rows = setup.rows(capture, setup.batches)
        self.curvature = setup.rows(capture, setup.sample)
        self.asked = capture(setup.queries, language_model)
        self.grad_norm = setup.exact.norm(dim=1).numpy()
        self.ids = range(RECORDS)

    def __len__(self) -> int:
        return RECORDS

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.rows


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup()


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("scorer", ["dot", "fisher"])
def test_recall(benchmark: Any, setup: Setup, scorer: Any, dim: int) -> None:
    store, truth = Sketched(setup, dim), setup.truth(scorer)
    vectors: list[Any] = setup.vectors
    if scorer == "fisher":
        curvature = gs.Curvature(setup.model, setup.sample, language_model, store.curvature, examples=RECORDS)
        vectors = [gs.precondition(v, "fisher", curvature=curvature) for v in vectors]
    exact = gs.Rescorer(setup.model, setup.fetch, language_model.token_losses, vectors)
    figures = {"alone": recall(gs.topk(store, store.asked, K, scorer).rows, truth)}
    for shortlist in LISTS:
        top = gs.topk(store, store.asked, K, scorer, rescore=exact, shortlist=shortlist)
        figures[str(shortlist)] = recall(top.rows, truth)
    lists = ", ".join(f"list of {name} {figure:.3f}" for name, figure in figures.items() if name != "alone")
    benchmark.extra_info["facts"] = [
        f"recall@{K} of exact {scorer} over {RECORDS:,} records, dim {dim}: alone {figures['alone']:.3f}; "
        f"re-scored {lists}"
    ]
    benchmark.pedantic(gs.topk, args=(store, store.asked, K, scorer), rounds=1)
    if FULL and dim >= 1024:
        assert figures["100"] >= 0.97, figures
