"""What a store of any kind needs to be asked: its model, its loss, and the examples behind its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradsift.engine.capture.capture import Capture
from gradsift.engine.capture.features import Features
from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.checkpoints.snapshots import Snapshots
from gradsift.engine.extraction.fingerprints import adapter_fingerprint, model_fingerprint
from gradsift.engine.extraction.passes import capture_parts, parts_of
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["Examples", "Loss", "Space", "absolute"]

_AT_ONCE = 8
"""Queries in a batch."""


class Examples(Protocol):
    """Examples that can be looked up by id, and read in batches."""

    def __len__(self) -> int: ...
    def id(self, index: int) -> str | int:
        """An example's id."""
        ...

    def record(self, index: int) -> dict[str, Any]:
        """The example as it was written."""
        ...

    def find(self, ids: Sequence[str | int]) -> list[int]:
        """Where examples stand."""
        ...

    def fetch(self, indices: Sequence[int]) -> dict[str, Any]:
        """One batch of these, in this order."""
        ...


class Loss(Protocol):
    """What a store's rows are gradients of, with everything that answers need of it."""

    @property
    def kind(self) -> str:
        """Its name."""
        ...

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One loss per example."""
        ...

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """The loss of each token or position."""
        ...

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with drawn targets."""
        ...


class Space:
    """A store with the model and the data it was made from.

    Args:
        store: the rows.
        model: whose gradients they are.
        loss: of what.
        modules: over which parameters.
        data: the examples.
        places: where "model" and "adapter" are, for what is said when they have changed.
        summed: the same loss where ``loss`` keeps parts apart: one number per example, the sum over its parts.
        checkpoints: at which the store's rows were taken, the last of which the model is at; queries are taken at all
            of them, as plain gradients.

    Raises:
        DataError: the model or the adapter is another one than the store was made with.
    """

    def __init__(
        self,
        store: FeatureStore,
        model: nn.Module,
        loss: Loss,
        modules: Modules,
        data: Examples,
        places: Mapping[str, str],
        summed: Loss | None = None,
        checkpoints: Sequence[Checkpoint] = (),
    ) -> None:
        self.store, self.model, self.loss, self.modules, self.data = store, model, loss, modules, data
        self.summed = summed or loss
        self.checkpoints = checkpoints
        self._compare(places)

    def _compare(self, places: Mapping[str, str]) -> None:
        """Refuse what has changed since: its gradients would have nothing to do with the rows."""
        captured = parameters_of(self.model, self.modules)
        now = {
            "adapter": adapter_fingerprint(captured),
            "model": model_fingerprint(self.model, list(captured.values())),
        }
        for what, before in self.store.metadata["fingerprints"].items():
            if now[what] != before:
                raise DataError(
                    f"the {what} '{places[what]}' is not the one that '{self.store.path}' was extracted with "
                    f"(fingerprint {before[:8]}, now {now[what][:8]}): give that one, or extract again"
                )

    def loss_for(self, questions: Examples) -> Loss:
        """The loss that is asked about: that of the rows, unless the queries are of another kind."""
        del questions
        return self.loss

    def capture(self, questions: Examples) -> Features:
        """Features of the queries, in their order."""
        loss = self.loss_for(questions)
        capture = Capture(self.model, self.store.spec, self.modules, groups=_groups(self.store))
        starts = range(0, len(questions), _AT_ONCE)
        groups = [range(start, min(start + _AT_ONCE, len(questions))) for start in starts]
        together = len(parts_of(loss))
        snapshots = None
        if self.checkpoints:
            snapshots = Snapshots(self.model, self.checkpoints, parameters_of(self.model, self.modules))
        with nullcontext() if snapshots is None else snapshots.mounted():
            parts = [
                capture_parts(capture, questions.fetch(group), loss, together, snapshots).features for group in groups
            ]
        values = torch.cat([part.values for part in parts])
        norms = torch.cat([part.grad_norm for part in parts])
        one = values.shape[1] == 1
        return Features(
            values[:, 0] if one else values,
            torch.cat([part.loss for part in parts if part.loss is not None]),
            norms[:, 0] if one else norms,
            parts[0].spec,
            parts[0].table,
            # Another loss than that of the rows is meant: which of them would lower it. No kind, no comparison.
            parts[0].loss_kind if loss is self.loss else None,
        )

    def index(self, row: int) -> int:
        """Where the example of a row of the store stands in the data."""
        return self.data.find([self.store.ids[row]])[0]

    def fetch(self, rows: Sequence[int]) -> dict[str, Any]:
        """The examples of these rows of the store, as one batch in their order."""
        return self.data.fetch(self.data.find([self.store.ids[row] for row in rows]))


def _groups(store: FeatureStore) -> str | None:
    """What the store was extracted with: each parameter apart, each map, or none."""
    groups = {part.get("group") for part in store.parts}
    if groups == {None}:
        return None
    return "parameter" if groups <= {row.name for row in store.table} else "map"


def absolute(place: str | None) -> str | None:
    """A local path that holds from any folder; a hub id as it is."""
    return str(Path(place).resolve()) if place is not None and Path(place).exists() else place
