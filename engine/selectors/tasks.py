"""Which target belongs to which task, from explicit labels; tasks may have any number of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.selectors.labels import labelled

__all__ = ["Tasks"]


@dataclass(frozen=True, slots=True)
class Tasks:
    """Targets in tasks, in the order in which the tasks first appear.

    Attributes:
        names: what each task is called; the targets' numbers when every target is a task of its own.
        index: int64 (q,), the place in ``names`` of each target's task.
        named: whether somebody gave labels.
    """

    names: tuple[Any, ...]
    index: np.ndarray
    named: bool

    @classmethod
    def of(cls, labels: Sequence[Any] | None, count: int) -> Tasks:
        """Tasks of ``count`` targets.

        Args:
            labels: one per target: text or numbers; None makes every target a task of its own.

        Raises:
            DataError: there are more or fewer labels than targets, or one is empty.
        """
        if labels is None:
            return cls(tuple(range(count)), np.arange(count), named=False)
        names, index = labelled(labels, count, "tasks", "target")
        return cls(names, index, named=True)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> np.ndarray:
        """Targets of each task, int64 (T,)."""
        return np.bincount(self.index, minlength=len(self))

    def mean(self, values: Tensor) -> Tensor:
        """Means over the targets of each task: (q, ...) -> (T, ...)."""
        out = torch.zeros(len(self), *values.shape[1:], dtype=values.dtype)
        out.index_add_(0, torch.from_numpy(self.index), values)
        return out / torch.from_numpy(self.sizes).to(values.dtype).view(-1, *[1] * (values.ndim - 1))

    def text(self, place: int) -> str:
        """A task in words: ``task 'maths'``, or ``target 3`` where targets are tasks of their own."""
        return f"task {self.names[place]!r}" if self.named else f"target {self.names[place]}"
