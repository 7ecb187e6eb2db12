"""The exact curvature-corrected vector: conjugate gradients against the dense solve, whatever preconditions them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import llama, padded_batch, with_lora
from stores import random_rows
from torch import Tensor

import gradsift as gs
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.curvature.precondition import precondition
from gradsift.engine.losses import language_model


class Case:
    """A tiny model, its exact and sketched curvature rows, a query, and the dense answer."""

    def __init__(self) -> None:
        self.model = with_lora(llama(initializer_range=0.1))
        whole = padded_batch(12)
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randint(0, 97, whole["labels"].shape, generator=generator)
        whole["labels"] = torch.where(whole["labels"] == -100, -100, drawn)
        self.batches = [{key: value[i : i + 5] for key, value in whole.items()} for i in range(0, 12, 5)]
        exact = gs.Capture(self.model, gs.SketchSpec(kind="identity"))
        self.rows = self.captured(exact)
        query = {"input_ids": torch.randint(0, 97, (1, 9), generator=generator)}
        self.v = gs.gradient(self.model, query, language_model)
        self.fisher = Fisher(self.rows)
        self.dense = self.fisher.solve(torch.cat([g.reshape(-1) for g in self.v.values()])[None])[0]

    def captured(self, capture: gs.Capture) -> Tensor:
        return torch.cat([capture(batch, language_model).values for batch in self.batches])

    def solved(self, fisher: Fisher, **arguments: Any) -> Tensor:
        out = precondition(self.model, self.v, self.batches, language_model, fisher, method="forward", **arguments)
        return torch.cat([t.reshape(-1) for t in out.values()])

    def error(self, got: Tensor) -> float:
        return float((got - self.dense).norm() / self.dense.norm())


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def with_damping(rows: Tensor, damping: float) -> Fisher:
    fisher = Fisher(rows)
    fisher.damping = damping
    return fisher


def test_the_exact_gram_matrix_needs_one_step(case: Case) -> None:
    assert case.error(case.solved(case.fisher, steps=1)) <= 1e-4


def test_a_sketch_converges_in_few_steps_and_any_preconditioner_to_the_same(case: Case) -> None:
    sketched = case.captured(gs.Capture(case.model, gs.SketchSpec(dim=1024)))
    useless = random_rows(12, 64)
    errors = {}
    for name, rows in {"sketch": sketched, "useless": useless}.items():
        fisher = with_damping(rows, case.fisher.damping)
        errors[name] = [case.error(case.solved(fisher, steps=s)) for s in (3, 30)]
    assert errors["sketch"][1] <= 1e-4
    assert errors["useless"][1] <= 1e-4
    assert errors["sketch"][0] < errors["useless"][0]


def test_another_number_of_examples_is_refused(case: Case) -> None:
    with pytest.raises(gs.ShapeError, match="hold 12 examples but the Fisher was fitted to 5 rows"):
        case.solved(Fisher(random_rows(5)))
