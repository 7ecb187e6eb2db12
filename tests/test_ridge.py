"""Ridge regression end to end: extraction, curvature, solve and sign against the exact leave-one-out identity.

For rows x_i with residuals r_i and ``A = X'X + a I``, taking example i out of the training set moves the prediction
at x by exactly ``-x' A^-1 x_i r_i / (1 - h_ii)`` with ``h_ii = x_i' A^-1 x_i``. The gradients are ``-r_i x_i``; labels
drawn as prediction plus or minus 1 have gradients ``-+x_i``, whose second moment is ``X'X / n`` without any error.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.curvature.curvature import Curvature

N, D, RIDGE = 30, 6, 2.5


class Half:
    """Half the squared error of a linear prediction."""

    kind = "half a square"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"])[:, 0] - batch["y"]).square() / 2

    def token_losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self(model, batch)[:, None]

    def sampled_batch(self, model: nn.Module, batch: Any, seeds: Sequence[int]) -> dict[str, Any]:
        signs = torch.tensor([1.0 if seed % 2 else -1.0 for seed in seeds], dtype=torch.float64)
        return {**batch, "y": model(batch["x"])[:, 0].detach() + signs}

    def sampled(self, model: nn.Module, batch: Any, seeds: Sequence[int]) -> Tensor:
        return self(model, self.sampled_batch(model, batch, seeds))

    def gauss_newton(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        return model(batch["x"]), lambda tangent: tangent


class Ridge:
    """The fitted model, its data, a few queries, and what leaving each example out does to their predictions."""

    def __init__(self, path: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.asked = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, 4))
        self.y = self.x @ torch.randn(D, generator=generator, dtype=torch.float64) + torch.randn(
            N, generator=generator, dtype=torch.float64
        )
        self.targets = torch.randn(4, generator=generator, dtype=torch.float64)
        self.model = nn.Sequential(nn.Linear(D, 1, bias=False)).double()
        weights = self.solved(torch.ones(N, dtype=torch.bool))
        with torch.no_grad():
            self.model[0].weight.copy_(weights[None])
        left_out = [self.solved(torch.arange(N) != i) for i in range(N)]
        self.moved = torch.stack([self.asked @ (w - weights) for w in left_out], dim=1)
        self.leverage = ((self.x @ torch.linalg.inv(self.matrix())) * self.x).sum(1)
        self.errors = self.asked @ weights - self.targets
        batches = [{"ids": [*range(s, s + 10)], "x": self.x[s : s + 10], "y": self.y[s : s + 10]} for s in (0, 10, 20)]
        self.store = gs.extract(
            self.model,
            batches,
            Half(),
            path,
            spec=gs.SketchSpec(kind="identity"),
            modules="*",
            curvature=N,
            progress=False,
        )
        self.curvature = Curvature.of(self.store, self.model, Half(), self.fetch, modules="*", batch=7)
        self.k = RIDGE / N / self.curvature.fisher(1.0).damping

    def matrix(self, kept: Tensor | None = None) -> Tensor:
        x = self.x if kept is None else self.x[kept]
        return x.T @ x + RIDGE * torch.eye(D, dtype=torch.float64)

    def solved(self, kept: Tensor) -> Tensor:
        found: Tensor = torch.linalg.solve(self.matrix(kept), self.x[kept].T @ self.y[kept])
        return found

    def fetch(self, rows: Sequence[int]) -> dict[str, Any]:
        return {"ids": list(rows), "x": self.x[list(rows)], "y": self.y[list(rows)]}

    def query(self, i: int) -> dict[str, Any]:
        return {"x": self.asked[i : i + 1], "y": self.targets[i : i + 1]}

    def moves(self, scores: Tensor) -> Tensor:
        """Changes of predictions (q, n) that scores tell: a score is n e_q (1 - h_ii) times the move."""
        return scores / (N * self.errors[:, None] * (1 - self.leverage))


@pytest.fixture(scope="module")
def ridge(tmp_path_factory: pytest.TempPathFactory) -> Ridge:
    return Ridge(tmp_path_factory.mktemp("ridge") / "train.zarr")


def by_row(top: Any) -> Tensor:
    scores = np.empty(top.scores.shape)
    np.put_along_axis(scores, top.rows, top.scores, axis=1)
    return torch.from_numpy(scores)


def test_the_stores_fisher_gives_the_exact_moves(ridge: Ridge) -> None:
    capture = gs.Capture(ridge.model, gs.SketchSpec(kind="identity"), modules="*")
    asked = capture({"x": ridge.asked, "y": ridge.targets}, Half())
    scores = by_row(gs.topk(ridge.store, asked, N, ridge.curvature.fisher(ridge.k)))
    torch.testing.assert_close(ridge.moves(scores), ridge.moved, rtol=1e-4, atol=1e-6)  # rows are float32


@pytest.mark.parametrize("method", ["fisher", "ggn"])
def test_exact_scores_give_the_exact_moves(ridge: Ridge, method: str) -> None:
    vectors = [gs.gradient(ridge.model, ridge.query(i), Half(), "*") for i in range(4)]
    rescorer = gs.Rescorer(
        ridge.model,
        lambda rows: [ridge.fetch(rows)],
        Half().token_losses,
        vectors,
        "forward",
        "*",
        ridge.curvature,
    )
    scored = rescorer.corrected(method, k=ridge.k)
    scores = torch.stack([scored(i, np.arange(N)).scores for i in range(4)])
    torch.testing.assert_close(ridge.moves(scores), ridge.moved, rtol=1e-5, atol=1e-9)


def test_a_positive_score_helps_the_query(ridge: Ridge) -> None:
    """Without an example of positive score the query's loss rises; the largest move is meant, whose sign is sure."""
    for i in range(4):
        j = int(ridge.moved[i].abs().argmax())
        v = ridge.curvature.correct(gs.gradient(ridge.model, ridge.query(i), Half(), "*"), "fisher", k=ridge.k)
        score = gs.rescore(ridge.model, ridge.fetch([j]), Half().token_losses, v, modules="*").scores
        before, after = ridge.errors[i].square(), (ridge.errors[i] + ridge.moved[i, j]).square()
        slope = ridge.errors[i] * ridge.moved[i, j]
        assert (float(score) > 0) == (float(slope) > 0)
        if abs(ridge.moved[i, j]) < 2 * abs(ridge.errors[i]):
            assert (float(score) > 0) == (float(after) > float(before))


def test_evidence_finds_the_ridge_of_the_model(ridge: Ridge) -> None:
    """A gap of ``mean r_i^2 h_ii``, leaving one out to first order, asks for the ridge whose h_ii these are."""
    residuals = ridge.y - ridge.model(ridge.x)[:, 0].detach()
    seen = residuals.square() / 2
    rises = []
    for k in (ridge.k, 0.3 * ridge.k):
        damping = k * ridge.curvature.fisher(1.0).damping
        a = ridge.x.T @ ridge.x + N * damping * torch.eye(D, dtype=torch.float64)
        h = ((ridge.x @ torch.linalg.inv(a)) * ridge.x).sum(1)
        rises.append(float((residuals.square() * h).mean()))
    curvature = Curvature(ridge.model, [], Half(), ridge.store.curvature, modules="*", examples=N)
    found = curvature.choose_k(ridge.store, seen + rises[0])
    assert found.k == curvature.k
    assert found.k == pytest.approx(ridge.k, rel=0.1)
    assert curvature.choose_k(ridge.store, seen + rises[1]).k == pytest.approx(0.3 * ridge.k, rel=0.1)


def test_another_model_than_the_store_s_is_refused(ridge: Ridge) -> None:
    moved = copy.deepcopy(ridge.model)
    with torch.no_grad():
        moved[0].weight.mul_(2)
    longer = nn.Sequential(*copy.deepcopy(ridge.model), nn.Identity())
    wider = nn.Sequential(nn.Linear(D + 1, 1, bias=False))
    for model, text in (
        (moved, "the adapter is not the one that"),
        (longer, "the model is not the one that"),
        (wider, r"of other parameters than .*row 0 is 0\.weight \(1, 7\) x 1, expected 0\.weight \(1, 6\)"),
    ):
        with pytest.raises(gs.SpecError, match=text):
            Curvature.of(ridge.store, model, Half(), ridge.fetch, modules="*")


def test_a_damping_is_chosen_by_a_store_of_the_sample_s_own_kind_only(ridge: Ridge) -> None:
    losses, batches = torch.ones(3), [ridge.fetch(range(N))]
    short = Curvature(ridge.model, batches, Half(), torch.ones(N, 64), modules="*")
    with pytest.raises(gs.SpecError, match=r"curvature rows have dim 64 but .*rows=store\.curvature"):
        short.choose_k(ridge.store, losses)
    with pytest.raises(gs.SpecError, match=r'curvature rows were drawn by .*"dim":4096.* but'):
        Curvature(ridge.model, batches, Half(), modules="*").choose_k(ridge.store, losses)
    several, adam = copy.copy(ridge.store), copy.copy(ridge.store)
    several.parts = tuple({"checkpoint": name} for name in ("a", "b"))
    adam.metadata = {**ridge.store.metadata, "preconditioner": {"kind": "adam"}}
    with pytest.raises(gs.StoreError, match="rows of 2 checkpoints"):
        ridge.curvature.choose_k(several, losses)
    with pytest.raises(gs.SpecError, match="holds gradients after Adam"):
        ridge.curvature.choose_k(adam, losses)
    other = Curvature(nn.Sequential(nn.Linear(5, 1)), batches, Half(), ridge.store.curvature, modules="*")
    with pytest.raises(gs.SpecError, match="of other parameters"):
        other.choose_k(ridge.store, losses)


def test_evidence_outside_of_the_sweep_is_said(ridge: Ridge, caplog: pytest.LogCaptureFixture) -> None:
    curvature = Curvature(ridge.model, [], Half(), ridge.store.curvature, modules="*", examples=N)
    assert curvature.choose_k(ridge.store, torch.zeros(3)).k == 100
    assert "above all of the sweep" in caplog.text
    assert curvature.choose_k(ridge.store, torch.full((3,), 1e6)).k == 0.001
    assert "below all of the sweep" in caplog.text
    with pytest.raises(gs.ShapeError, match="nan"):
        curvature.choose_k(ridge.store, torch.tensor([torch.nan]))
