"""What is evaluated: a training that can be repeated, its examples, and queries whose losses are to be predicted."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.capture.capture import LossFunction
from gradsift.engine.capture.maps import Modules
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.extraction.fingerprints import batch_hash, loss_kind
from gradsift.kernels.errors import DataError, ShapeError

__all__ = ["Batch", "FidelityCase"]

Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityCase:
    """A training of your own, as ``evaluate`` needs it; the first five are enough.

    Attributes:
        examples: how many training examples there are.
        retrain: ``retrain(rows, seed) -> model``: trains from the start on these examples, numbers ascending from 0,
            in the order of ``batches``. The same arguments must give the same model, as near as you can.
        batches: re-iterable; the training examples in order. queries: re-iterable; the queries.
        loss: ``loss(model, batch) -> (n,)``, what the model was trained on; with ``sampled``, the true Fisher can be
            measured too.
        name: what the case is called in tables.
        key: whatever ``retrain`` and ``outputs`` depend on beside the data and their own code, such as a model's
            version or a hash of modules that they import: kept outcomes of another key are not used.
        modules: whose gradients are taken, as of ``Capture``.
        outputs: ``outputs(model) -> (q,)``, the losses that are to be predicted, one per query in their order; ``loss``
            of the queries unless given.
        model: the model whose gradients are taken; ``retrain`` on everything with seed 0 unless given.
        measures: other losses of the same examples, whose gradients some methods compare: "timesteps" with each kept
            apart (DMin), "squared_prediction" (D-TRAK).
        checkpoints: gives those of the run that trained ``model``, with learning rates and Adam's moments, for methods
            that follow training.
        before: the model before training, for the baseline that compares activations.
        texts, query_texts: what BM25 reads.
        states: ``states(model, batch) -> (n, d)``, such as mean hidden states, for neighbours in the model's eyes.
        inputs: ``inputs(batch) -> (n, d)``, such as pixels, for neighbours in nobody's eyes.
        labels, query_labels: (n,) and (q,), classes: how many of the best are of the query's class?
        wrong: bool (n,), examples known to be mislabelled: how well are they found?
    """

    examples: int
    retrain: Callable[[Sequence[int], int], Any]
    batches: Iterable[Batch]
    queries: Iterable[Batch]
    loss: LossFunction
    name: str = "own"
    key: str = ""
    modules: Modules = "lora"
    outputs: Callable[[Any], Any] | None = None
    model: nn.Module | None = None
    measures: Mapping[str, LossFunction] = field(default_factory=dict)
    checkpoints: Callable[[], Sequence[Checkpoint]] | None = None
    before: nn.Module | None = None
    texts: Sequence[str] | None = None
    query_texts: Sequence[str] | None = None
    states: Callable[[nn.Module, Batch], Tensor] | None = None
    inputs: Callable[[Batch], Tensor] | None = None
    labels: np.ndarray | None = None
    query_labels: np.ndarray | None = None
    wrong: np.ndarray | None = None

    def fingerprint(self) -> str:
        """What outcomes depend on: key, examples, queries, loss, and the code of ``retrain`` and ``outputs``."""
        digest = hashlib.blake2b(digest_size=16)
        code = [_source(self.retrain), _source(self.outputs)]
        about = [self.name, self.key, self.examples, loss_kind(self.loss), *code]
        digest.update(json.dumps(about).encode())
        for batch in self.batches:
            digest.update(batch_hash(batch))
        digest.update(b"queries")
        for batch in self.queries:
            digest.update(batch_hash(batch))
        return digest.hexdigest()

    def trained(self) -> nn.Module:
        """The model whose gradients are taken."""
        model = self.model if self.model is not None else self.retrain(range(self.examples), 0)
        if not isinstance(model, nn.Module):
            raise DataError(
                f"retrain returned a {type(model).__name__}: give a torch module, or model= to take gradients of"
            )
        return model

    def measured(self, rows: Sequence[int], seed: int) -> np.ndarray:
        """Losses of the queries after training on these examples, float64 (q,)."""
        model = self.retrain(rows, seed)
        if self.outputs is not None:
            return _numbers(self.outputs(model))
        if not isinstance(model, nn.Module):
            raise DataError(
                f"retrain returned a {type(model).__name__}: give a torch module, or outputs= that measures it"
            )
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                losses = [_numbers(self.loss(model, batch)) for batch in self.queries]
        finally:
            model.train(was_training)
        return np.concatenate(losses)

    def check(self) -> None:
        """Refuse labels that do not fit.

        Raises:
            ShapeError: something that is told per example is not told once for each.
        """
        per_example = {"texts": self.texts, "labels": self.labels, "wrong": self.wrong}
        for name, values in per_example.items():
            if values is not None and len(values) != self.examples:
                raise ShapeError(f"{len(values)} {name} for {self.examples} examples: give one for each")


def _source(function: Any) -> str:
    """A function's text; "" of one that was not written in a file."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
