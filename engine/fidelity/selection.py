"""What selectors are worth: the loss of held-out targets after training on what each chose."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch

from gradsift.engine.answers.select import select
from gradsift.engine.fidelity.bench import Bench, Rows
from gradsift.engine.fidelity.cache import Run
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.fidelity.evaluate import outcomes_of
from gradsift.engine.fidelity.intervals import Interval, bootstrap, interval
from gradsift.engine.fidelity.stores import own_folder
from gradsift.engine.selectors.registry import SELECTORS
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import GradsiftError
from gradsift.kernels.spec import SketchSpec

__all__ = ["Chosen", "compare"]

logger = logging.getLogger(__name__)

_DIM = 1024


@dataclass(frozen=True, slots=True)
class Chosen:
    """One selector.

    Attributes:
        name: "random" and "everything" stand beside the selectors.
        mean: loss of a held-out target after training on the choice, over targets and seeds.
        interval: of the mean, over seeds.
        queries, seeds: how many of each.
    """

    name: str
    mean: float
    interval: Interval
    queries: int
    seeds: int


def compare(case: FidelityCase, cache: str | PathLike[str], budget: float = 0.2, seeds: int = 5) -> list[Chosen]:
    """Choose a share of the examples for one half of the queries, train on it, and measure the other half.

    Selectors that the case cannot serve are left out, and logged.
    """
    outcomes = outcomes_of(case, cache)
    with own_folder(outcomes.folder) as stores:
        picks = _choices(Bench(case, stores), budget)
    rng = np.random.default_rng(0)
    n, count = case.examples, int(budget * case.examples)
    runs: dict[str, list[Run]] = {
        "everything": [(tuple(range(n)), seed) for seed in range(seeds)],
        "random": [(tuple(sorted(rng.choice(n, count, replace=False).tolist())), seed) for seed in range(seeds)],
    }
    runs |= {name: [(tuple(sorted(rows.tolist())), seed) for seed in range(seeds)] for name, rows in picks.items()}
    losses = outcomes.get([run for some in runs.values() for run in some])
    by_seed = losses[:, losses.shape[1] // 2 :].mean(axis=1).reshape(len(runs), seeds)
    return [
        _chosen(name, some, losses.shape[1] - losses.shape[1] // 2) for name, some in zip(runs, by_seed, strict=True)
    ]


def _choices(bench: Bench, budget: float) -> dict[str, np.ndarray]:
    """Rows that each selector takes for the first half of the queries."""
    rows = Rows(SketchSpec(dim=_DIM))
    asked = bench.store(rows, queries=True)
    targets = torch.from_numpy(asked.features[: len(asked) // 2])
    found: dict[str, np.ndarray] = {}
    for name in SELECTORS:
        try:
            store, options = _store(bench, name), _options(bench, name)
            alone = not getattr(SELECTORS[name], "needs_targets", True)
            found[name] = select(store, None if alone else targets, budget, name, **options).rows
        except GradsiftError as error:
            logger.warning("selector %r is left out: %s", name, error)
    return found


def _store(bench: Bench, name: str) -> FeatureStore:
    """What a selector reads: for "vog" several checkpoints, for "lobass" the loss early in training."""
    if name == "vog":
        return bench.store(Rows(SketchSpec(dim=_DIM), along="plain", curvature=False))
    if name == "lobass":
        return bench.store(Rows(SketchSpec(dim=_DIM), along="first", curvature=False))
    return bench.store(Rows(SketchSpec(dim=_DIM)))


def _options(bench: Bench, name: str) -> Mapping[str, Any]:
    labels = bench.case.labels
    if name == "groups":
        return {"groups": None if labels is None else labels.tolist()}
    if name == "vog":
        return {"classes": None if labels is None else labels.tolist()}
    if name == "lobass":
        return {"reference": bench.store(Rows(SketchSpec(dim=_DIM)))}
    return {}


def _chosen(name: str, losses: np.ndarray, queries: int) -> Chosen:
    mean = float(losses.mean())
    draws = bootstrap(len(losses), lambda rows: float(losses[rows].mean()))
    return Chosen(name, mean, interval(mean, draws), queries, len(losses))
