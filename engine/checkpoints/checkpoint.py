"""Checkpoint: where a training run stood, as a user describes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor

from gradsift.engine.checkpoints.folder import rates, steps, trainer_folder
from gradsift.engine.checkpoints.moments import AdamMoments
from gradsift.kernels.errors import DataError

__all__ = ["Checkpoint", "learning_rates", "names"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Weights of one moment of a training run.

    Args:
        weights: {parameter name: tensor}, in any spelling that this model has for it, such as
            ``{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}``; or a .safetensors
            file, an adapter folder of PEFT, or a checkpoint folder of the Hugging Face Trainer. Captured parameters
            must all be there; what the checkpoint does not hold stays as the model has it.
        learning_rate: what this checkpoint's products weigh in sums over checkpoints. None takes it from a Trainer's
            folder: the mean of those logged since the checkpoint before it; where no checkpoint has one, all weigh 1.
        adam: moments (``adam_moments``), for rows of Adam's updates; None for plain gradients.
        name: what the store calls it; unless given, the name of the file or of the Trainer's folder, or its number.
    """

    weights: Mapping[str, Tensor] | str | PathLike[str]
    learning_rate: float | None = None
    adam: AdamMoments | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        rate = self.learning_rate
        if rate is not None and not 0 <= rate < float("inf"):
            raise DataError(f"the learning rate of a checkpoint is {rate}, expected a number from 0 on")
        if not isinstance(self.weights, Mapping | str | PathLike):
            raise DataError(
                f"the weights of a checkpoint are a {type(self.weights).__name__}, expected a mapping or a path"
            )

    @property
    def path(self) -> Path | None:
        """Where it lies, if it does."""
        return None if isinstance(self.weights, Mapping) else Path(self.weights)


def names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """One for each, none twice.

    Raises:
        DataError: two have the same.
    """
    found: list[str] = []
    for number, checkpoint in enumerate(checkpoints):
        path = checkpoint.path
        name = checkpoint.name or (trainer_folder(path).resolve().name if path is not None else str(number))
        if name in found:
            raise DataError(f"two checkpoints are called {name!r}: give each its own Checkpoint(..., name=...)")
        found.append(name)
    return found


def learning_rates(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """What each weighs.

    Raises:
        DataError: some have one and some have none.
    """
    made = [steps(c.path) if c.path is not None else None for c in checkpoints]
    found: list[float | None] = []
    for checkpoint, step in zip(checkpoints, made, strict=True):
        rate = checkpoint.learning_rate
        if rate is None and checkpoint.path is not None and step is not None:
            rate = rates(checkpoint.path, max((s for s in made if s is not None and s < step), default=0))
        found.append(rate)
    known = [rate for rate in found if rate is not None]
    if known and len(known) < len(found):
        number = found.index(None)
        raise DataError(
            f"checkpoint {names(checkpoints)[number]!r} has no learning rate and others have one: "
            "give Checkpoint(..., learning_rate=...) for it"
        )
    if not known and sum(checkpoint.path is not None for checkpoint in checkpoints) > 1:
        logger.warning("no checkpoint says its learning rate, so all weigh 1: give Checkpoint(..., learning_rate=...)")
    return known or [1.0] * len(found)
