"""A case made ready for scoring: its trained model, and stores of its gradients, made when a method first asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from gradsift.engine.answers.search import topk
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.compaction.compact import compact
from gradsift.engine.compaction.store import CompactStore
from gradsift.engine.curvature.curvature import Curvature
from gradsift.engine.extraction.extract import extract
from gradsift.engine.extraction.fingerprints import adapter_fingerprint
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.fidelity.exact import By, ExactFisher
from gradsift.engine.scorers.scores import stream_scores
from gradsift.engine.store.ids import seed_of
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError, ShapeError
from gradsift.kernels.spec import SketchSpec

__all__ = ["EXACT", "Bench", "Rows"]

EXACT = SketchSpec(kind="identity")
"""No sketch: whole gradients."""

_LABELS = 8
"""Labels drawn per example for the Fisher, while there are few examples."""

_CURVATURE_ROWS = 4000
"""Rows of the Fisher's sample at most."""

_EXACT_BYTES = 3 << 30
"""Exact gradients that are kept at most."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Which gradients a store holds.

    Attributes:
        spec: the sketch, or ``EXACT``.
        grouped: each parameter's apart.
        along: None for the trained model, "plain" for its checkpoints, "adam" for Adam's updates at them, "first"
            for the first of them alone.
        curvature: with gradients of drawn labels, where the loss can draw them.
        measure: of another loss, a name among the case's ``measures``.
    """

    spec: SketchSpec
    grouped: bool = False
    along: str | None = None
    curvature: bool = True
    measure: str | None = None

    @property
    def plain(self) -> bool:
        """Whether each is the whole gradient of the case's own loss for the trained model."""
        return not self.grouped and self.along is None and self.measure is None


class Scoring(Protocol):
    """What has a name and scores."""

    @property
    def name(self) -> str:
        """Of this method alone."""
        ...

    @property
    def scores(self) -> Callable[[Bench], np.ndarray] | None:
        """Gives (q, n); None for a method that scores examples alone."""
        ...


class Bench:
    """What methods score with.

    Args:
        case: what is evaluated.
        folder: where the stores go; they are used again when the model is the same.
    """

    def __init__(self, case: FidelityCase, folder: Path) -> None:
        self.case = case
        self._folder = folder
        self._stores: dict[tuple[Rows, bool], FeatureStore] = {}
        self._again: dict[int, Bench] = {}
        self._scores: dict[str, np.ndarray] = {}
        self._fishers: dict[By, ExactFisher] = {}
        self._curvatures: dict[int, Curvature] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model whose gradients are taken."""
        return self.case.trained()

    @cached_property
    def parameters(self) -> int:
        """Numbers in one gradient."""
        return sum(p.numel() for p in parameters_of(self.model, self.case.modules).values())

    @cached_property
    def labels(self) -> int:
        """Gradients of drawn labels that the Fisher is made of; 0 where the loss cannot draw any."""
        return min(_LABELS * self.case.examples, _CURVATURE_ROWS) if hasattr(self.case.loss, "sampled") else 0

    @cached_property
    def checkpoints(self) -> Sequence[Checkpoint]:
        """Of the run that trained the model."""
        if self.case.checkpoints is None:
            raise DataError("the case has no checkpoints")
        return self.case.checkpoints()

    def store(self, rows: Rows, queries: bool = False) -> FeatureStore:
        """Gradients of all examples, or of all queries.

        Raises:
            DataError: exact gradients of so many examples would not fit, or the case has no checkpoints.
        """
        count = self.case.examples + self.labels * rows.curvature
        if rows.spec.kind == "identity" and 4 * count * self.parameters > _EXACT_BYTES:
            raise DataError(
                f"exact gradients of {count:,} rows of {self.parameters:,} numbers take "
                f"{4 * count * self.parameters / 1e9:.1f} GB, expected at most {_EXACT_BYTES / 1e9:.1f}"
            )
        if queries:
            rows = replace(rows, curvature=False, along=rows.along and "plain")
        if (rows, queries) not in self._stores:
            self._stores[rows, queries] = self._extract(rows, queries)
        return self._stores[rows, queries]

    def scores(self, scorer: Any, rows: Rows, damping: float | None = None) -> np.ndarray:
        """Scores of all examples for all queries, float64 (q, n); ``damping`` is of a Fisher."""
        if damping is not None:
            self._need_labels()
        blocks = stream_scores(self.store(rows), self.store(rows, queries=True), scorer, damping=damping)
        return np.concatenate([block for _, block in blocks], axis=1)

    def coded(self, scorer: str, rows: Rows, size: int) -> CompactStore:
        """All examples in a compacted store of so many bytes per example at most."""
        whole = self.store(rows)
        path = whole.path.with_suffix(f".{scorer}.{size}")
        return CompactStore.open(path) if path.exists() else compact(whole, path, size, scorer=scorer, progress=False)

    def coded_scores(self, scorer: str, rows: Rows, size: int, damping: float | None = None) -> np.ndarray:
        """Scores of all examples by that store, float64 (q, n)."""
        if damping is not None:
            self._need_labels()
        store = self.coded(scorer, rows, size)
        top = topk(store, self.store(rows, queries=True), len(store), scorer, damping=damping)
        scores = np.empty(top.rows.shape)
        np.put_along_axis(scores, top.rows, top.scores, axis=1)
        return scores

    def remembered(self, candidate: Scoring) -> np.ndarray | None:
        """A candidate's scores, worked out once; None where it has none."""
        if candidate.name not in self._scores and candidate.scores is not None:
            self._scores[candidate.name] = candidate.scores(self)
        return self._scores.get(candidate.name)

    def own(self, scorer: Any, rows: Rows) -> np.ndarray:
        """Scores of all examples by a scorer that compares no queries, float64 (n,)."""
        return np.concatenate([block[0] for _, block in stream_scores(self.store(rows), None, scorer)])

    def again(self, seed: int) -> Bench:
        """The same with a model trained on everything under another seed."""
        if seed not in self._again:
            model = self.case.retrain(range(self.case.examples), seed)
            self._again[seed] = Bench(replace(self.case, model=model), self._folder)
        return self._again[seed]

    @property
    def any_store(self) -> FeatureStore:
        """A store of all examples by the case's own loss, for what each of them holds: losses and exact norms."""
        made = [store for (rows, queries), store in self._stores.items() if not queries and rows.plain]
        return made[0] if made else self.store(Rows(SketchSpec(dim=1024)))

    @cached_property
    def queries(self) -> int:
        """How many queries there are."""
        return self._count(self.case.queries)

    def check(self) -> None:
        """Refuse batches that do not hold the case's examples, or queries that are not those which it describes.

        Raises:
            ShapeError: there are more, or fewer.
        """
        count = self._count(self.case.batches)
        if count != self.case.examples:
            raise ShapeError(
                f"the batches hold {count} examples but the case says {self.case.examples}: give every example that "
                "retrain can be asked for, in the order of its numbers"
            )
        for name in ("query_texts", "query_labels"):
            values = getattr(self.case, name)
            if values is not None and len(values) != self.queries:
                raise ShapeError(f"{len(values)} {name} for {self.queries} queries: give one for each")

    def _count(self, batches: Iterable[Mapping[str, Any]]) -> int:
        with evaluating(self.model), torch.no_grad():
            return sum(len(self.case.loss(self.model, batch)) for batch in batches)

    def exact_fisher(self, by: By = "all") -> ExactFisher:
        """The true Fisher by exact gradients; ``by`` as of ``ExactFisher``."""
        self._need_labels()
        if by not in self._fishers:
            self._fishers[by] = ExactFisher(*self.whole(labels=True), by)
        return self._fishers[by]

    def curvature(self, labels: int) -> Curvature:
        """A sample of all examples with so many drawn labels each, and what is fitted to it."""
        loss: Any = self.case.loss
        if not hasattr(loss, "sampled_batch"):
            raise DataError("the loss cannot draw labels that are kept (it has no .sampled_batch)")
        if labels not in self._curvatures:
            batches, first = [], 0
            with evaluating(self.model):
                for batch in self.case.batches:
                    numbers = range(first, first + len(loss(self.model, batch)))
                    first = numbers.stop
                    seeds = [[seed_of(0, number, draw) for number in numbers] for draw in range(labels)]
                    batches += [loss.sampled_batch(self.model, batch, some) for some in seeds]
            self._curvatures[labels] = Curvature(
                self.model, batches, loss, modules=self.case.modules, examples=self.case.examples
            )
        return self._curvatures[labels]

    def whole(self, labels: bool = False) -> tuple[FeatureStore, FeatureStore]:
        """Whole gradients of all examples and of all queries.

        Args:
            labels: with those of drawn labels, which are many more: what needs none of them may fit where they do not.
        """
        rows = Rows(EXACT, curvature=labels)
        return self.store(rows), self.store(rows, queries=True)

    def embedded(self, embed: Callable[[nn.Module, Any], Any], model: nn.Module | None = None) -> tuple[Any, Any]:
        """What a function gives for all queries and for all examples: float64 (q, d) and (n, d)."""
        model = self.model if model is None else model
        with evaluating(model), torch.no_grad():
            asked, known = (
                torch.cat([embed(model, batch).detach().to("cpu", torch.float64) for batch in batches])
                for batches in (self.case.queries, self.case.batches)
            )
        return asked, known

    def _need_labels(self) -> None:
        """Without labels the scorer "fisher" gives plain products, under a name that is not theirs."""
        if not self.labels:
            raise DataError("the loss cannot draw labels (it has no .sampled), so there is no true Fisher")

    def _extract(self, rows: Rows, queries: bool) -> FeatureStore:
        case = self.case
        model = adapter_fingerprint(parameters_of(self.model, case.modules))
        name = hashlib.blake2b(f"{rows}{queries}{self.labels}{model}".encode(), digest_size=8).hexdigest()
        along: list[Checkpoint] | None = None
        if rows.along is not None:
            along = [c if rows.along == "adam" else replace(c, adam=None) for c in self.checkpoints]
            along = along[:1] if rows.along == "first" else along
        return extract(
            self.model,
            _Numbered(case.queries if queries else case.batches),
            case.loss if rows.measure is None else case.measures[rows.measure],
            self._folder / f"{name}.zarr",
            spec=rows.spec,
            modules=case.modules,
            groups="parameter" if rows.grouped else None,
            checkpoints=along,
            curvature=self.labels if rows.curvature and not queries else 0,
            progress=False,
        )


class _Numbered:
    """Batches without their ids, so that rows are called by their numbers."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Any:
        for batch in self._batches:
            yield {name: value for name, value in batch.items() if name != "ids"}
