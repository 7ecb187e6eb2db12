"""A case made ready for scoring: its trained model, and stores of its gradients, made when a method first asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.extraction.extract import extract
from gradsift.engine.extraction.fingerprints import adapter_fingerprint
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.fidelity.exact import ExactFisher
from gradsift.engine.scorers.scores import stream_scores
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError, ShapeError
from gradsift.kernels.spec import SketchSpec

__all__ = ["EXACT", "LABELS", "Bench"]

EXACT = SketchSpec(kind="identity")
"""No sketch: whole gradients."""

LABELS = 8
"""Labels drawn per example for the Fisher, while there are few examples."""

_CURVATURE_ROWS = 4000
"""Rows of the Fisher's sample at most."""

_EXACT_BYTES = 3 << 30
"""Exact gradients that are kept at most."""


class Bench:
    """What methods score with.

    Args:
        case: what is evaluated.
        folder: where the stores go; they are used again when the model is the same.
    """

    def __init__(self, case: FidelityCase, folder: Path) -> None:
        self.case = case
        self._folder = folder
        self._stores: dict[tuple[str, bool, str], FeatureStore] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model whose gradients are taken."""
        return self.case.trained()

    @cached_property
    def parameters(self) -> int:
        """Numbers in one gradient."""
        return sum(p.numel() for p in parameters_of(self.model, self.case.modules).values())

    @cached_property
    def curvature(self) -> int:
        """Rows of the Fisher's sample; 0 where the loss cannot draw labels."""
        return min(LABELS * self.case.examples, _CURVATURE_ROWS) if hasattr(self.case.loss, "sampled") else 0

    def store(self, spec: SketchSpec, queries: bool = False, **options: Any) -> FeatureStore:
        """Gradients of all examples, or of all queries.

        Args:
            spec: the sketch, or ``EXACT``.
            options: further ones of ``extract``.

        Raises:
            DataError: exact gradients of so many examples would not fit.
        """
        rows = self.case.examples + self.curvature
        if spec.kind == "identity" and 4 * rows * self.parameters > _EXACT_BYTES:
            raise DataError(
                f"exact gradients of {rows:,} rows of {self.parameters:,} numbers take "
                f"{4 * rows * self.parameters / 1e9:.1f} GB, expected at most {_EXACT_BYTES / 1e9:.1f}"
            )
        key = (spec.to_json(), queries, repr(sorted(options.items())))
        if key not in self._stores:
            self._stores[key] = self._extract(spec, queries, key, options)
        return self._stores[key]

    def scores(self, scorer: Any, spec: SketchSpec, damping: float | None = None, **options: Any) -> np.ndarray:
        """Scores of all examples for all queries, float64 (q, n)."""
        blocks = stream_scores(
            self.store(spec, **options), self.store(spec, queries=True, **options), scorer, damping=damping
        )
        return np.concatenate([block for _, block in blocks], axis=1)

    @property
    def any_store(self) -> FeatureStore:
        """A store of all examples, for what every one of them holds: losses and exact norms."""
        made = [store for (_, queries, _), store in self._stores.items() if not queries]
        return made[0] if made else self.store(SketchSpec(dim=1024))

    @cached_property
    def queries(self) -> int:
        """How many queries there are."""
        return len(self.store(self.any_store.spec, queries=True))

    @cached_property
    def exact_fisher(self) -> ExactFisher:
        """The true Fisher by exact gradients."""
        if not self.curvature:
            raise DataError("the loss cannot draw labels (it has no .sampled), so there is no true Fisher")
        return ExactFisher(self.store(EXACT), self.store(EXACT, queries=True))

    def embedded(self, embed: Callable[[nn.Module, Any], Any], model: nn.Module | None = None) -> tuple[Any, Any]:
        """What a function gives for all queries and for all examples: float64 (q, d) and (n, d)."""
        model = self.model if model is None else model
        with evaluating(model), torch.no_grad():
            asked, known = (
                torch.cat([embed(model, batch).detach().to("cpu", torch.float64) for batch in batches])
                for batches in (self.case.queries, self.case.batches)
            )
        return asked, known

    def _extract(self, spec: SketchSpec, queries: bool, key: Any, options: Any) -> FeatureStore:
        case = self.case
        made_from = f"{key}{adapter_fingerprint(parameters_of(self.model, case.modules))}{self.curvature}"
        name = hashlib.blake2b(made_from.encode(), digest_size=8).hexdigest()
        store = extract(
            self.model,
            _Numbered(case.queries if queries else case.batches),
            case.loss,
            self._folder / f"{name}.zarr",
            spec=spec,
            modules=case.modules,
            curvature=0 if queries else self.curvature,
            progress=False,
            **options,
        )
        if not queries and len(store) != case.examples:
            raise ShapeError(
                f"the batches hold {len(store)} examples but the case says {case.examples}: give every example that "
                "retrain can be asked for, in the order of its numbers"
            )
        return store


class _Numbered:
    """Batches without their ids, so that rows are called by their numbers."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        for batch in self._batches:
            yield {name: value for name, value in batch.items() if name != "ids"}
