"""Losses of a classifier: cross-entropy, and the margin that TRAK takes gradients of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.losses.counter import counter_uniform
from gradsift.engine.losses.inside import forward_arguments
from gradsift.engine.losses.softmax import bend, cross_entropy, draw, upcast
from gradsift.kernels.errors import DataError, ShapeError

__all__ = ["ClassificationLoss", "Margin", "classification"]

_NOT_FOR_THE_MODEL = frozenset({"ids", "labels"})


class ClassificationLoss:
    """Cross-entropy of each example's class.

    A batch holds ``labels``, integers (n,), and the inputs by the names that the model's forward takes. The model
    returns logits (n, classes): as a tensor, as ``.logits``, or first in a tuple. Losses are float32 (float64 for a
    float64 model). Both derivative modes work.
    """

    kind = "classification"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each example, (n,)."""
        logits, labels = _predictions(model, batch)
        return cross_entropy(logits, labels)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The same as one place per example, (n, 1): what exact scores ask for."""
        return self(model, batch)[:, None]

    def loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """One label per example: ones, int64 (n,), on the CPU."""
        return torch.ones(len(_labels(batch)), dtype=torch.int64)

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Loss of labels drawn from the model's own softmax: gradients whose second moment is the true Fisher.

        Args:
            seeds: n integers, one per example; the draw depends on the seed and the logits alone.

        Returns:
            shape (n,), differentiable through the loss and not through the draw.
        """
        logits, labels = _predictions(model, batch)
        return cross_entropy(logits, _drawn(logits.detach(), labels, seeds))

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the labels that ``sampled`` draws, to be kept: its plain loss is that of ``sampled``."""
        with torch.no_grad():
            logits, labels = _predictions(model, batch)
        return {**batch, "labels": _drawn(logits, labels, seeds).cpu()}

    def gauss_newton(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The outputs that the loss is a convex function of, and the product with its second derivative at them.

        Returns:
            logits (n, classes); and ``hessian(t)`` for t of their shape: see ``softmax.bend``.
        """
        logits, labels = _predictions(model, batch)
        return logits, lambda tangent: bend(logits, labels, tangent)


class Margin:
    """Minus the log odds of each example's class: ``logsumexp(z of the others) - z_y = -log(p / (1 - p))``.

    TRAK's model output f with the sign of a loss: lower is better, and an example that raises the margin scores
    positive. The batch is that of ``classification``. A store's ``loss`` column gives p back (``probability``), and
    with it TRAK's factor 1 - p. There is no ``sampled``: log odds are no likelihood, so no labels drawn from the model
    have gradients of theirs as a Fisher; methods for margins whiten by the rows themselves.

    Source: Park et al. 2023 (TRAK, arXiv 2303.14186).
    """

    kind = "margin"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Minus the log odds of each example, (n,)."""
        logits, labels = _predictions(model, batch)
        wide = upcast(logits)
        at = labels[:, None]
        others = wide.scatter(1, at, float("-inf")).logsumexp(dim=1)
        return others - wide.gather(1, at).squeeze(1)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The same as one place per example, (n, 1)."""
        return self(model, batch)[:, None]

    def loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """One label per example: ones, int64 (n,), on the CPU."""
        return torch.ones(len(_labels(batch)), dtype=torch.int64)

    @staticmethod
    def probability(loss: Tensor) -> Tensor:
        """The probability p of each example's class, float64, from losses of this kind."""
        return loss.to(torch.float64).neg().sigmoid()


classification = ClassificationLoss()
"""The loss to pass as ``loss_fn`` for any classifier."""


def _predictions(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) on their device."""
    labels = _labels(batch)
    logits = _logits(model(**_inputs(model, batch)))
    if logits.ndim != 2 or len(logits) != len(labels) or logits.shape[1] < 2:
        raise ShapeError(
            f"the model gave logits of shape {tuple(logits.shape)} for {len(labels)} labels, expected "
            "(examples, classes) with two classes or more"
        )
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        bad = int(((labels < 0) | (labels >= logits.shape[1])).nonzero()[0])
        raise DataError(
            f"example {bad} has label {int(labels[bad])}, expected 0 to {logits.shape[1] - 1}: the model knows "
            f"{logits.shape[1]} classes"
        )
    return logits, labels.to(logits.device)


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    known = forward_arguments(model)
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in _NOT_FOR_THE_MODEL
    }
    unknown = [name for name in inputs if known is not None and name not in known]
    if unknown:
        raise DataError(
            f"the batch has {unknown[0]!r}, which the forward of {type(model).__name__} does not take: name inputs as "
            f"it does ({', '.join(sorted(known or ()))})"
        )
    return inputs


def _labels(batch: Mapping[str, Any]) -> Tensor:
    if "labels" not in batch:
        raise DataError("the batch has no labels: give the class of each example as labels, integers (n,)")
    labels = torch.as_tensor(batch["labels"])
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(
            f"labels have shape {tuple(labels.shape)} and {labels.dtype}, expected the class of each example, "
            "integers (n,)"
        )
    return labels.to(torch.int64)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ShapeError(f"the model returned {type(output).__name__} without logits: expected a classifier's output")
    return logits


def _drawn(logits: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """A class for each example, int64 (n,)."""
    if len(seeds) != len(labels):
        raise ShapeError(f"got {len(seeds)} seeds for {len(labels)} examples: give one per example")
    seed = np.array([int(s) & (1 << 64) - 1 for s in seeds], dtype=np.uint64)
    uniform = torch.from_numpy(counter_uniform(seed, np.zeros(len(seed), dtype=np.int64)))
    return draw(logits, torch.ones_like(labels, dtype=torch.bool), uniform)
