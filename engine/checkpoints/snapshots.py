"""Snapshots: several checkpoints of one model, put into it one after another, and its own weights put back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.checkpoints.checkpoint import Checkpoint, learning_rates, names
from gradsift.engine.checkpoints.folder import weights_in
from gradsift.engine.checkpoints.moments import AdamMoments
from gradsift.engine.checkpoints.spellings import matched, spellings
from gradsift.kernels.errors import DataError

__all__ = ["Snapshots"]

logger = logging.getLogger(__name__)


class Snapshots:
    """Checkpoints that fit a model.

    Weights stay on the CPU and are copied into the model's own tensors, so that whatever shares them (tied weights, an
    optimizer) goes on doing so. Memory: every checkpoint, and the model's own weights once while they are away.

    Args:
        model: whose parameters they are.
        checkpoints: at least one.
        captured: canonical name -> parameter.

    Attributes:
        names, learning_rates, adam: of each.
        preconditioner: what was applied to gradients at all of them; None for plain gradients.

    Raises:
        DataError: a checkpoint does not fit the model, or the others; the text names the first tensor.
    """

    def __init__(self, model: nn.Module, checkpoints: Sequence[Checkpoint], captured: Mapping[str, nn.Parameter]):
        if not checkpoints:
            raise DataError("checkpoints is empty: give at least one Checkpoint, or leave it out")
        self.names = names(checkpoints)
        self.preconditioner = _preconditioner(checkpoints, self.names)
        self._weights = [
            self._read(model, checkpoint, name, captured)
            for checkpoint, name in zip(checkpoints, self.names, strict=True)
        ]
        self.learning_rates = learning_rates(checkpoints)
        device = next(iter(captured.values())).device
        self.adam: list[AdamMoments | None] = [
            None if checkpoint.adam is None else checkpoint.adam.to(device) for checkpoint in checkpoints
        ]
        self._names = {id(t): name for name, t in reversed(spellings(model).items())}
        self._refuse_differing()
        self._warn_of_what_stays(model)
        self._loaded: int | None = None

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Whatever is loaded inside, the model has its own weights again afterwards, bit for bit."""
        own = [(t, t.detach().to("cpu", copy=True)) for t, _ in self._weights[0].values()]
        try:
            yield
        finally:
            self._loaded = None
            _copy(own)

    def load(self, number: int) -> None:
        """Put a checkpoint's weights into the model; nothing is copied where they are already."""
        if self._loaded != number:
            _copy(self._weights[number].values())
            self._loaded = number

    def _read(
        self, model: nn.Module, checkpoint: Checkpoint, name: str, captured: Mapping[str, nn.Parameter]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        tensors = checkpoint.weights if isinstance(checkpoint.weights, Mapping) else weights_in(checkpoint.path)  # type: ignore[arg-type]
        where = f"checkpoint {name!r}"
        pairs = {
            id(t): (t, value.detach().to("cpu", t.dtype, copy=True)) for t, value in matched(model, tensors, where)
        }
        missing = [key for key, parameter in captured.items() if id(parameter) not in pairs]
        if missing:
            raise DataError(
                f"{where} lacks {len(missing)} of {len(captured)} captured parameters, such as {missing[0]}: "
                "give the whole checkpoint, or capture less (modules=[...])"
            )
        if checkpoint.adam is not None:
            for key, parameter in captured.items():
                if tuple(checkpoint.adam.step(key).first.shape) != tuple(parameter.shape):
                    raise DataError(f"{where} has Adam moments of another shape for {key}: read them for this model")
        return pairs

    def _refuse_differing(self) -> None:
        """All hold the same tensors, or what one does not hold would be left from another."""
        for number, pairs in enumerate(self._weights):
            for one, other, a, b in ((pairs, self._weights[0], number, 0), (self._weights[0], pairs, 0, number)):
                odd = next((key for key in one if key not in other), None)
                if odd is not None:
                    raise DataError(
                        f"checkpoint {self.names[a]!r} holds {self._names[odd]} and checkpoint {self.names[b]!r} does "
                        "not: give checkpoints of one run"
                    )

    def _warn_of_what_stays(self, model: nn.Module) -> None:
        staying = [p for p in model.parameters() if p.requires_grad and id(p) not in self._weights[0]]
        if staying:
            logger.warning(
                "%d trainable parameters are not in the checkpoints, such as %s: they stay as the model has them",
                len(staying),
                self._names[id(staying[0])],
            )


def _copy(pairs: Any) -> None:
    with torch.no_grad():
        for target, value in pairs:
            target.copy_(value)


def _preconditioner(checkpoints: Sequence[Checkpoint], called: Sequence[str]) -> dict[str, Any] | None:
    """One for all: rows of gradients and rows of updates have nothing to do with each other."""
    found = [None if c.adam is None else c.adam.preconditioner for c in checkpoints]
    for name, other in zip(called, found, strict=True):
        if other != found[0]:
            raise DataError(
                f"checkpoint {name!r} has Adam {other} and checkpoint {called[0]!r} has {found[0]}: "
                "give all of them moments of one kind, or none"
            )
    return found[0]
