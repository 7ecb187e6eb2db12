"""Scorers on stores that `extract` wrote: several checkpoints with Adam, groups, a classifier's losses."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import CLASSES, batch, close, cross_entropy, margin, net, per_example, solve, streamed
from torch import Tensor

import gradsift as gs

logging.getLogger("gradsift.engine.capture.capture").setLevel(logging.ERROR)

RATES = (3e-2, 1e-2)
TRAIN, ASKED = batch(40, 20), batch(3, 21)


class Run:
    """A model that is trained with Adam for a while, and what it was at two moments."""

    def __init__(self) -> None:
        self.model = net(4)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATES[0])
        self.checkpoints, self.states, self.models = [], [], []
        for rate in RATES:
            for _ in range(3):
                optimizer.zero_grad()
                cross_entropy(self.model, TRAIN).mean().backward()
                optimizer.step()
            weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            adam = gs.adam_moments(copy.deepcopy(optimizer.state_dict()), self.model, "*")
            self.checkpoints.append(gs.Checkpoint(weights, rate, adam, name=f"rate {rate}"))
            self.states.append([copy.deepcopy(optimizer.state[p]) for p in self.model.parameters()])
            self.models.append(copy.deepcopy(self.model))
        self.plain = [gs.Checkpoint(c.weights, c.learning_rate, None, c.name) for c in self.checkpoints]

    def extract(self, path: Path, examples: dict[str, Tensor], **options: Any) -> gs.FeatureStore:
        settings = {"spec": gs.SketchSpec(kind="identity"), "modules": "*", "curvature": 0, "progress": False}
        return gs.extract(self.model, [examples], cross_entropy, path, **{**settings, **options})  # type: ignore[arg-type]

    def exact(self, examples: dict[str, Tensor], function: Any = cross_entropy) -> list[np.ndarray]:
        return [per_example(model, examples, function).numpy() for model in self.models]


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def adam_update(gradients: np.ndarray, states: list[dict[str, Tensor]]) -> np.ndarray:
    """m' / sqrt(v' + 1e-8), as the authors of LESS have it."""
    first, second = (
        torch.cat([state[key].flatten() for state in states]).double().numpy() for key in ("exp_avg", "exp_avg_sq")
    )
    return (0.9 * first + 0.1 * gradients) / np.sqrt(0.999 * second + 0.001 * gradients**2 + 1e-8)


def test_less_end_to_end(run: Run, tmp_path: Path) -> None:
    store = run.extract(tmp_path / "train.zarr", TRAIN, checkpoints=run.checkpoints)
    targets = run.extract(tmp_path / "targets.zarr", ASKED, checkpoints=run.plain)
    expected = np.zeros((3, 40))
    for weight, states, x, y in zip((0.75, 0.25), run.states, run.exact(TRAIN), run.exact(ASKED), strict=True):
        update = adam_update(x, states)
        update /= np.linalg.norm(update, axis=1, keepdims=True)
        expected += weight * (y / np.linalg.norm(y, axis=1, keepdims=True)) @ update.T
    close(streamed(store, targets, "less"), expected)
    chosen = gs.select(store, targets, 5, reduce="mean", scorer="less")
    np.testing.assert_array_equal(chosen.rows, np.argsort(-expected.mean(axis=0), kind="stable")[:5])
    with pytest.raises(gs.SpecError, match=r"holds gradients after Adam, .* use scorer='less'"):
        gs.topk(store, targets, 3, "dot")
    with pytest.raises(gs.SpecError, match="the queries are gradients after Adam"):
        gs.topk(store, store, 3, "less")
    one = run.extract(tmp_path / "one.zarr", ASKED, checkpoints=run.plain[:1])
    with pytest.raises(gs.SpecError, match=r"one\.zarr' holds 1 checkpoint but .*train\.zarr' holds 2 checkpoints"):
        gs.topk(store, one, 3, "less")
    swapped = run.extract(tmp_path / "swapped.zarr", ASKED, checkpoints=run.plain[::-1])
    with pytest.raises(gs.SpecError, match=r"part 0 of .*swapped\.zarr' is .*rate 0\.01"):
        gs.topk(store, swapped, 3, "less")
    renamed = [gs.Checkpoint(run.plain[1 - c].weights, name=run.plain[c].name) for c in range(2)]
    moved = run.extract(tmp_path / "moved.zarr", ASKED, checkpoints=renamed)
    with pytest.raises(gs.SpecError, match=r"moved\.zarr' was extracted from another adapter than"):
        gs.topk(store, moved, 3, "less")


def test_trak_over_a_classifier_s_checkpoints(run: Run, tmp_path: Path) -> None:
    store = run.extract(tmp_path / "train.zarr", TRAIN, checkpoints=run.plain)
    targets = run.extract(tmp_path / "targets.zarr", ASKED, checkpoints=run.plain)
    products, doubt = [], []
    for model, x, y in zip(run.models, run.exact(TRAIN, margin), run.exact(ASKED, margin), strict=True):
        moment = x.T @ x + (x**2).sum(axis=1).mean() * np.eye(x.shape[1])
        products.append(solve(moment, y) @ x.T)
        doubt.append(1 - torch.exp(-cross_entropy(model, TRAIN).detach().double()).numpy())
    close(streamed(store, targets, "trak"), np.mean(products, axis=0) * np.mean(doubt, axis=0))


@pytest.mark.parametrize("groups", ["parameter", "map"])
def test_datainf_takes_the_groups_of_an_extraction(run: Run, tmp_path: Path, groups: str) -> None:
    store = run.extract(tmp_path / "train.zarr", TRAIN, groups=groups)
    sizes = [6 * 8, CLASSES * 6]
    expected = np.zeros((3, 40))
    x, y, start = run.exact(TRAIN)[-1], run.exact(ASKED)[-1], 0
    for size in sizes:
        rows, asked = x[:, start : start + size], y[:, start : start + size]
        damping = 0.1 * (rows**2).mean()
        inverses = [np.linalg.inv(np.outer(g, g) + damping * np.eye(size)) for g in rows]
        expected += asked @ np.mean(inverses, axis=0) @ rows.T
        start += size
    captured = gs.Capture(run.model, store.spec, "*", groups=groups)(ASKED, cross_entropy)
    close(streamed(store, captured, "datainf"), expected)
    close(streamed(store, run.extract(tmp_path / "asked.zarr", ASKED, groups=groups), "datainf"), expected)
    joint = gs.Capture(run.model, store.spec, "*")(ASKED, cross_entropy)
    with pytest.raises(gs.ShapeError, match="holds 2 groups, so capture the queries with the same groups"):
        gs.topk(store, joint, 3, "datainf")


def test_lora_maps_hold_the_parameters_that_a_group_counts() -> None:
    """A group of a map is A and B together; its size is what lambda divides by."""
    from models import llama, with_lora

    from gradsift.engine.scorers.datainf import group_sizes

    for groups, expected in (("map", 3 * (32 + 32)), ("parameter", 3 * 32)):
        capture = gs.Capture(with_lora(llama()), gs.SketchSpec(dim=64), "*q_proj", groups=groups)
        assert group_sizes(capture.table, capture.group_names).tolist()[0] == expected
