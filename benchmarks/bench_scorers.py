"""Every scorer on one store beside plain inner products: time with all that it prepares, and memory.

All read the same mapped numbers: as one part, or as four, which are checkpoints, groups or timesteps as the scorer
wants them. So a ratio says what a scorer costs over the plain search of as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from bench_search import DIM, ROWS, Setup, anonymous_peak
from paired import FULL, paired
from torch import Tensor

import gradsift as gs
from gradsift.engine.capture.features import TableRow
from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.scorers.scores import stream_scores

PARTS, QUERIES, K = 4, 8, 10
SAMPLE = 2000 if FULL else 60
HEAVY = ("trak", "dtrak", "self_fisher")
"""Those that cost O(n dim^2): one round is enough."""

KINDS: dict[str, Any] = {
    "less": [{"checkpoint": f"step {c}", "learning_rate": 1e-3 / (c + 1)} for c in range(PARTS)],
    "datainf": [{"group": f"map {g}"} for g in range(PARTS)],
    "dmin": [{"timestep": t} for t in range(PARTS)],
}
"""What the parts are, for scorers that need some."""


class Shaped:
    """The mapped rows as the rows of a store that a scorer accepts."""

    mapped = True

    def __init__(self, setup: Setup, scorer: str):
        self.setup, self.parts = setup, KINDS.get(scorer, [{}])
        self.rows = setup.rows if len(self.parts) == 1 else setup.rows.view(ROWS, len(self.parts), -1)
        self.ids = setup.ids
        self.grad_norm = torch.linalg.vector_norm(self.rows, dim=-1).numpy()
        self.table = [TableRow(f"{part.get('group')}.weight", (16, DIM)) for part in self.parts]
        loss = {"kind": "a loss", "settings": {"measure": "squared_prediction"}}
        self.metadata = {"loss": loss, "preconditioner": {"kind": "adam"} if scorer == "less" else None}
        self.curvature = None
        if scorer in ("fisher", "self_fisher"):
            self.curvature = torch.randn(SAMPLE, DIM, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return ROWS

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start, block in self.setup.blocks():
            yield start, self.rows[start : start + len(block)]

    def queries(self) -> Tensor:
        """As many parts as a row."""
        drawn = torch.randn(QUERIES, DIM, generator=torch.Generator().manual_seed(1))
        return drawn if len(self.parts) == 1 else drawn.view(QUERIES, len(self.parts), -1)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("scorers"))


@pytest.mark.parametrize("scorer", [name for name in SCORERS if name != "dot"])
def test_scorer(benchmark: Any, setup: Setup, scorer: str) -> None:
    store, plain = Shaped(setup, scorer), Shaped(setup, "dot")
    queries = store.queries() if getattr(SCORERS[scorer], "needs_queries", True) else None

    def answer() -> np.ndarray:
        return gs.topk(store, queries, K, scorer).rows

    if not FULL:
        scores = np.concatenate([block for _, block in stream_scores(store, queries, scorer)], axis=1)
        assert (answer() == np.argsort(-scores, axis=1, kind="stable")[:, :K]).mean() >= 0.99  # of float32
    case = f"scorer {scorer}, top-{K} of {ROWS:,} x {DIM}, {QUERIES} queries"
    peak = anonymous_peak(answer)
    benchmark.extra_info["facts"] = [f"{case}: {peak / 2**20:.0f} MiB of memory beside the mapped rows"]
    providers = {"gradsift dot": lambda: gs.topk(plain, plain.queries(), K, "dot"), f"gradsift {scorer}": answer}
    paired(benchmark, case, providers, "gradsift dot", 1 if scorer in HEAVY else 3 if FULL else 2)
