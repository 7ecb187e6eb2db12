"""How many steps a corrected query needs, on a language model that was really trained.

The truth is a solve by conjugate gradients to rounding: of the damped true Fisher, and of the damped Gauss-Newton
matrix. After each step the query's exact scores of all records are ranked and compared with the truth's ranking; with
the preconditioner that is used, and without any.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired import FULL
from torch import Tensor
from trained_lm import train

import gradsift as gs
from gradsift.engine.curvature.conjugate import Checkpoint, conjugate_gradients
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.losses import language_model

QUERIES, DIM = (8, 4096) if FULL else (2, 512)
CASES = ((400, 8), (2000, 1)) if FULL else ((60, 2), (120, 1))
"""Records, and labels that are drawn for each."""
FEW = 200 if FULL else 50
"""Examples, whole batches of them, where the model itself is differentiated."""
STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
DAMPINGS = (0.3, 1.0)
BATCH = 50
CLOSE = 0.995
LIMIT = 30
"""Steps after which a preconditioned solve is taken for the limit."""


class Setup:
    """The model, exact rows of records and queries, its curvature sample, and exact rows of that."""

    def __init__(self, records: int, labels: int) -> None:
        sizes = {"width": 64, "steps": 300, "epochs": 4} if FULL else {"width": 32, "steps": 2, "epochs": 1}
        self.model, tuned, unseen = train(records, unseen=QUERIES, **sizes)
        batches = [{"input_ids": part} for part in tuned.split(BATCH)]
        self.sample = [
            language_model.sampled_batch(self.model, batch, range(i * BATCH, i * BATCH + len(batch["input_ids"])))
            for i, batch in enumerate(batches * labels)
        ]
        self.words = f"{records:,} records, {labels} label{'s' * (labels > 1)} drawn of each"
        exact = gs.SketchSpec(kind="identity")
        self.records, self.asked = self.rows(exact, batches), self.rows(exact, [{"input_ids": unseen}])
        self.drawn = self.rows(exact, self.sample)
        sketched = self.rows(gs.SketchSpec(dim=DIM), self.sample)
        self.curvature = gs.Curvature(self.model, self.sample, language_model, sketched, examples=records)
        some = self.sample[: FEW // BATCH]
        self.few = gs.Curvature(self.model, some, language_model, sketched[:FEW], examples=records)

    def rows(self, spec: gs.SketchSpec, batches: Sequence[dict[str, Tensor]]) -> Tensor:
        capture = gs.Capture(self.model, spec)
        return torch.cat([capture(batch, language_model).values for batch in batches]).double()


@cache
def setup_of(records: int, labels: int) -> Setup:
    return Setup(records, labels)


def agreement(setup: Setup, found: Tensor, truth: Tensor) -> float:
    """Spearman correlation of two vectors' exact scores of all records."""
    ranks = [torch.argsort(torch.argsort(setup.records @ v)).double() for v in (found, truth)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def trail(
    product: Callable[[Tensor], tuple[Tensor, Tensor]],
    right: Tensor,
    better: Callable[[Tensor], Tensor],
    steps: Sequence[int] = STEPS,
) -> dict[int, Tensor]:
    """Answers after so many steps, each going on from the one before."""
    with tempfile.TemporaryDirectory() as folder:
        state = Checkpoint(Path(folder) / "state.npz", "")
        return {n: conjugate_gradients(product, lambda: right, better, steps=n, checkpoint=state).answer for n in steps}


def compared(setup: Setup, trails: Sequence[dict[int, Tensor]], truths: Sequence[Tensor]) -> dict[int, float]:
    """Mean agreement with the truths after so many steps."""
    return {
        n: float(np.mean([agreement(setup, found[n], truth) for found, truth in zip(trails, truths, strict=True)]))
        for n in STEPS
    }


def close_after(found: dict[int, float]) -> int:
    """The first number of steps that is close enough."""
    return next((steps for steps, figure in found.items() if figure >= CLOSE), STEPS[-1] + 1)


def said(found: dict[int, float]) -> str:
    count = close_after(found)
    after = f"more than {STEPS[-1]} steps" if count > STEPS[-1] else f"{count} step{'s' * (count > 1)}"
    return ", ".join(f"{figure:.4f}" for steps, figure in found.items() if steps <= 5) + f" ({CLOSE} after {after})"


@pytest.mark.parametrize("k", DAMPINGS)
@pytest.mark.parametrize(("records", "labels"), CASES)
def test_fisher_steps(benchmark: Any, records: int, labels: int, k: float) -> None:
    setup = setup_of(records, labels)
    rows, damping = setup.drawn, setup.curvature.fisher(k).damping
    exact = Fisher(rows)
    exact.damping = damping
    truths = list(exact.solve(setup.asked))

    def product(c: Tensor) -> tuple[Tensor, Tensor]:
        combined = rows.T @ c
        return rows @ combined / len(rows) + damping * c, combined

    def trails(better: Callable[[Tensor], Tensor]) -> list[dict[int, Tensor]]:
        return [
            {n: (v - t / len(rows)) / damping for n, t in trail(product, rows @ v, better).items()} for v in setup.asked
        ]

    sketched = compared(setup, trails(setup.curvature.sketched(damping).solve_dual), truths)
    plain = compared(setup, trails(lambda r: r), truths)
    v = setup.few.products().flat.split(setup.asked[0])
    found = benchmark.pedantic(setup.few.correct, args=(v, "fisher"), kwargs={"k": k, "steps": 8}, rounds=1)
    exact = Fisher(rows[:FEW])
    exact.damping = found.damping
    real = agreement(setup, torch.cat([t.reshape(-1) for t in found.values()]), exact.solve(setup.asked[:1])[0])
    benchmark.extra_info["facts"] = [
        f"exact Fisher, k = {k:g}, {setup.words}: rank correlation with the limit after 1 to 5 steps, preconditioned "
        f"by a sketch of {DIM}: {said(sketched)}; not preconditioned: {said(plain)}"
    ]
    assert real >= CLOSE, "the model's own products are not those of its rows"
    if FULL:
        assert close_after(sketched) <= (4 if k == 1 or labels > 1 else 6), sketched
        assert close_after(plain) >= 2 * close_after(sketched), plain


@pytest.mark.parametrize("k", DAMPINGS)
def test_gauss_newton_steps(benchmark: Any, k: float) -> None:
    setup = setup_of(*CASES[0])
    curvature = setup.few
    products, damping, asked = curvature.products(), curvature.fisher(k).damping, setup.asked[:2]

    def product(u: Tensor) -> tuple[Tensor, Tensor]:
        return products.gauss_newton(u) / FEW + damping * u, u

    def by_factors(r: Tensor) -> Tensor:
        return curvature.by_factors(r, damping)

    fitted = [trail(product, v, by_factors, (*STEPS, LIMIT)) for v in asked]
    truths = [found[LIMIT] for found in fitted]
    with_factors = compared(setup, fitted, truths)
    plain = compared(setup, [trail(product, v, lambda r: r) for v in asked], truths)
    alone = np.mean([agreement(setup, by_factors(v), truth) for v, truth in zip(asked, truths, strict=True)])
    fisher = Fisher(setup.drawn[:FEW])
    fisher.damping = damping
    drawn = np.mean([agreement(setup, v, truth) for v, truth in zip(fisher.solve(asked), truths, strict=True)])
    benchmark.extra_info["facts"] = [
        f"Gauss-Newton, k = {k:g}, {FEW} examples: rank correlation with the limit after 1 to "
        f"5 steps, preconditioned by EK-FAC: {said(with_factors)}; not preconditioned: {said(plain)}; of EK-FAC alone "
        f"{alone:.4f}, of the exact Fisher of one drawn label each {drawn:.4f}"
    ]
    benchmark.pedantic(product, args=(asked[0],), rounds=1)
    if FULL:
        assert close_after(with_factors) <= 6, with_factors
