"""Selectors over a mapped store: time over one plain pass of products, and memory beside the mapped rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bench_search import BLOCK, DIM, ROWS, Setup, anonymous_peak
from paired import FULL, paired
from torch import Tensor

import gradsift as gs
from gradsift.engine.answers.select import Selection

ROUNDS = 3 if FULL else 2
TARGETS, TASKS, DOMAINS = 16, 4, 20
BUDGET = ROWS // 100


class Recut:
    """The same rows in larger blocks, or as two checkpoints of half the size."""

    mapped = True

    def __init__(self, whole: Setup, block: int = BLOCK, checkpoints: int = 1) -> None:
        self.ids = range(ROWS)
        self.rows, self.block = whole.rows, block
        self.loss = np.linspace(1, 2, ROWS)
        self.grad_norm = whole.grad_norm
        if checkpoints > 1:
            self.rows = whole.rows.unflatten(1, (checkpoints, -1))
            self.parts = [{"checkpoint": f"c{i}", "learning_rate": 1.0} for i in range(checkpoints)]
            # Half of a row of independent numbers: what "vog" and "order" do with a norm costs the same.
            self.grad_norm = np.repeat(whole.grad_norm[:, None] / checkpoints**0.5, checkpoints, axis=1)

    def __len__(self) -> int:
        return ROWS

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, ROWS, self.block):
            yield start, self.rows[start : start + self.block]

    @property
    def features(self) -> np.ndarray:
        return self.rows.numpy()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("selectors"))


LABELS = [f"domain {i % DOMAINS}" for i in range(ROWS)]
GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "top": ("top", {}),
    "top, ranks fused": ("top", {"reduce": "rank"}),
    "tarot": ("tarot", {}),
    "bids": ("bids", {}),
    "groups, mixture": ("groups", {"groups": LABELS}),
    "groups, bandit": ("groups", {"groups": LABELS, "rule": "bandit"}),
    "groups, bandit over k-means": ("groups", {"groups": DOMAINS, "rule": "bandit"}),
    "diverse, 10 of 100": ("diverse", {"candidates": 100}),
    "order": ("order", {}),
    "vog": ("vog", {"classes": LABELS}),
    "lobass": ("lobass", {}),
}


@pytest.mark.parametrize("name", GIVEN)
def test_selector(benchmark: Any, whole: Setup, name: str) -> None:
    method, options = GIVEN[name]
    alone = method in ("order", "vog", "lobass")
    asked = torch.randn(TARGETS, DIM, generator=torch.Generator().manual_seed(1))
    tasks = None if alone or method == "diverse" else [i % TASKS for i in range(TARGETS)]
    budget = 10 if method == "diverse" else BUDGET
    count = 2 if method in ("order", "vog") else 1
    if method == "lobass":
        options = {"reference": Recut(whole)}

    def choose(block: int) -> Callable[[], Selection]:
        store = Recut(whole, block, count)
        scorer = {} if alone or method == "tarot" else {"scorer": "dot"}
        return lambda: gs.select(store, None if alone else asked, budget, method, tasks=tasks, **scorer, **options)

    def plain() -> float:
        return float(max((asked @ block.T).max() for _, block in whole.blocks()))

    if not FULL:  # at full size this would double the wait
        np.testing.assert_array_equal(choose(BLOCK)().rows, choose(3 * BLOCK + 1)().rows)
    case = f"select {budget:,} of {ROWS:,} x {DIM}, {TARGETS} targets in {TASKS} tasks: {name}"
    if alone:
        case = f"select {budget:,} of {ROWS:,} x {DIM}: {name}"
    run = choose(BLOCK)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed but the allocator kept would hide what this one takes
    benchmark.extra_info["facts"] = [f"{case}: {anonymous_peak(run) / 2**20:.0f} MiB of memory beside the mapped rows"]
    paired(benchmark, case, {"one pass of products": plain, "gradsift": run}, "one pass of products", ROUNDS)
