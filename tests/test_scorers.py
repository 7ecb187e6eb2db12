"""Every scorer against its formula on exact gradients, written out in float64, in any blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradients import ADAM, RATES, ROWS, WORLD, close, cross_entropy, margin, queries_for, solve, streamed, unit
from stores import dense_order
from torch import Tensor

import gradsift as gs

logging.getLogger("gradsift.engine.capture.capture").setLevel(logging.ERROR)

LEARNING = np.array(RATES)


# What each scorer is, on gradients x (n, C, P) and y (q, C, P) of everything at every checkpoint: (q, n).


def dot(x: Tensor, y: Tensor) -> Tensor:
    return y[:, 0] @ x[:, 0].T


def dot_checkpoints(x: Tensor, y: Tensor) -> Tensor:
    return sum((RATES[c] * y[:, c] @ x[:, c].T for c in range(3)), torch.zeros(()))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return unit(y[:, 0]) @ unit(x[:, 0]).T


def cosine_checkpoints(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([unit(y[:, c]) @ unit(x[:, c]).T for c in range(3)]).mean(dim=0)


def less(x: Tensor, y: Tensor) -> np.ndarray:
    weights = LEARNING / LEARNING.sum()
    out = np.zeros((len(y), len(x)))
    for c in range(3):
        for i in range(len(x)):
            for j in range(len(y)):
                a, b = x[i, c].numpy(), y[j, c].numpy()
                out[j, i] += weights[c] * (a / np.linalg.norm(a)) @ (b / np.linalg.norm(b))
    return out


def datainf(x: Tensor, y: Tensor) -> np.ndarray:
    out = np.zeros((len(y), len(x)))
    start = 0
    for size in WORLD.sizes:
        own = slice(start, start + size)
        rows, asked = x[:, 0, own].numpy(), y[:, 0, own].numpy()
        damping = 0.1 * (rows**2).mean()
        inverses = [np.linalg.inv(np.outer(g, g) + damping * np.eye(size)) for g in rows]
        out += asked @ np.mean(inverses, axis=0) @ rows.T
        start += size
    return out


def trak(checkpoints: int) -> Callable[..., np.ndarray]:
    def scores(x: Tensor, y: Tensor) -> np.ndarray:
        rows, asked = WORLD.exact("train", margin).numpy(), WORLD.exact("asked", margin).numpy()
        loss = torch.stack([cross_entropy(model, WORLD.train) for model in WORLD.models], dim=1)
        doubt = 1 - np.exp(-loss.detach().double().numpy())
        products = []
        for c in range(checkpoints):
            phi = rows[:, c]
            moment = phi.T @ phi + (phi**2).sum(axis=1).mean() * np.eye(phi.shape[1])
            products.append(solve(moment, asked[:, c]) @ phi.T)
        return np.mean(products, axis=0) * doubt[:, :checkpoints].mean(axis=1)

    return scores


def empirical(x: Tensor, y: Tensor) -> np.ndarray:
    phi = x[:, 0].numpy()
    moment = phi.T @ phi + (phi**2).sum(axis=1).mean() * np.eye(phi.shape[1])
    return solve(moment, y[:, 0].numpy()) @ phi.T


def own(x: Tensor, y: Tensor) -> Tensor:
    return x[:, 0].square().sum(dim=1)[None]


def own_checkpoints(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(dim=2) @ torch.tensor(RATES, dtype=torch.float64))[None]


SQUARED = {"loss": {"kind": "squared", "settings": {"measure": "squared_prediction"}}}
LANGUAGE = {"loss": {"kind": "classification, but not one label"}}

CASES: list[tuple[str, dict[str, Any], Callable[..., Any]]] = [
    ("dot", {}, dot),
    ("dot", {"groups": True}, dot),
    ("dot", {"checkpoints": 3}, dot_checkpoints),
    ("dot", {"checkpoints": 3, "groups": True}, dot_checkpoints),
    ("cosine", {}, cosine),
    ("cosine", {"groups": True}, cosine),
    ("cosine", {"checkpoints": 3}, cosine_checkpoints),
    ("cosine", {"checkpoints": 3, "groups": True}, cosine_checkpoints),
    ("less", {"checkpoints": 3, "metadata": {"preconditioner": ADAM}}, less),
    ("less", {"checkpoints": 3, "groups": True, "metadata": {"preconditioner": ADAM}}, less),
    ("datainf", {"groups": True}, datainf),
    ("trak", {}, trak(1)),
    ("trak", {"groups": True}, trak(1)),
    ("trak", {"checkpoints": 3}, trak(3)),
    ("trak", {"checkpoints": 3, "groups": True}, trak(3)),
    ("trak", {"metadata": LANGUAGE}, empirical),
    ("dtrak", {"metadata": SQUARED}, empirical),
    ("self", {}, own),
    ("self", {"groups": True}, own),
    ("self", {"checkpoints": 3, "groups": True}, own_checkpoints),
]


@pytest.mark.parametrize("block", [1, 8, ROWS])
@pytest.mark.parametrize(("scorer", "shape", "formula"), CASES)
def test_a_scorer_is_its_formula_on_exact_gradients(
    scorer: str, shape: dict[str, Any], formula: Callable[..., Any], block: int
) -> None:
    store, queries = WORLD.store(block, **shape), queries_for(scorer, shape)
    expected = np.asarray(formula(WORLD.exact("train"), WORLD.exact("asked")))
    got = streamed(store, queries, scorer)
    close(got, expected)
    top = gs.topk(store, queries, 9, scorer)
    assert top.scorer == scorer
    np.testing.assert_array_equal(top.rows, dense_order(got, 9))
    close(top.scores, np.take_along_axis(expected, top.rows, axis=1))
