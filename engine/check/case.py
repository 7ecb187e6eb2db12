"""What all checks of one model read: the examples, the maps, and rows that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradsift.engine.answers.gradient import gradient
from gradsift.engine.capture.capture import LossFunction
from gradsift.engine.capture.maps import Map, Modules
from gradsift.engine.check.batches import Batch, segments_of
from gradsift.engine.check.parts import PartCapture, Parts, kind_of, repeatable, sketched, trainable
from gradsift.kernels.spec import SketchSpec

__all__ = ["BlockedError", "Case"]

T = TypeVar("T")


class BlockedError(Exception):
    """A check needs what another one has failed to compute."""


@dataclass
class Case:
    """One model with a few examples.

    Attributes:
        modules: the selection, less what is refused.
        maps: what it selects.
        batch: a few examples in one batch, as the user made it.
        singles: the same examples one by one, without padding.
        pool: more examples, for rankings: batches, with the number of examples in each.
        names: the examples' ids.
    """

    model: nn.Module
    loss_fn: LossFunction
    spec: SketchSpec
    modules: Modules
    maps: list[Map]
    batch: Batch
    singles: list[Batch]
    pool: list[tuple[Batch, int]]
    names: list[str | int]
    batch_axis: int = 0
    backend: str = "auto"
    allow_idle: Sequence[str] = ()
    seconds: float = 60.0
    _known: dict[str, Any] = field(default_factory=dict)

    @property
    def low_precision(self) -> bool:
        """Whether any weight or the surrounding autocast is below float32."""
        low = any(
            p.is_floating_point() and p.dtype not in (torch.float32, torch.float64) for p in self.model.parameters()
        )
        return low or torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")

    @property
    def alone(self) -> dict[str, Tensor]:
        """Rows of every example captured by itself: {parameter: (n, dim)}."""
        return self._once("alone", self._alone)

    @property
    def oracle(self) -> dict[str, Tensor]:
        """S times autograd's gradient of every example by itself: {parameter: (n, dim)}."""
        return self._once("oracle", lambda: _stack([self.autograd(single) for single in self.singles]))

    @property
    def together(self) -> Parts:
        """Rows of the examples in one batch, by parameter."""
        return self._once("together", lambda: self.parts(self.batch))

    @property
    def capture(self) -> PartCapture:
        """Reads the rows of the maps."""
        return self._once("capture", lambda: PartCapture(self.model, self.spec, self.modules, self.backend))

    def ranked(self, index: int) -> Parts:
        """Rows of one batch of the pool, by kind of map."""

        def compute() -> Parts:
            with repeatable(self.model):
                return self.parts(self.pool[index][0], by_kind=True)

        return self._once(f"pool {index}", compute)

    def parts(self, batch: Batch, by_kind: bool = False) -> Parts:
        """Rows of any batch, by parameter or by kind of map."""
        key = (lambda found, _: kind_of(found.name)) if by_kind else (lambda _, parameter: parameter)
        return self.capture.parts(batch, self.loss_fn, key, segments_of(batch), self.batch_axis)

    def autograd(self, batch: Batch) -> dict[str, Tensor]:
        """S times autograd's gradient of the batch's summed loss: {parameter: (dim,)}."""
        captured = [parameter for found in self.maps for parameter in found.parameters.values()]
        with trainable(self.model, captured):
            return sketched(gradient(self.model, batch, self.loss_fn, self.modules), self.spec)

    def kinds(self, parameters: dict[str, float], reduce: Callable[[list[float]], float] = max) -> dict[str, float]:
        """Numbers of parameters gathered by kind of map."""
        gathered: dict[str, list[float]] = {}
        for found in self.maps:
            values = [parameters[name] for name in found.parameters if name in parameters]
            gathered.setdefault(kind_of(found.name), []).extend(values)
        return {kind: reduce(values) for kind, values in gathered.items() if values}

    def unreported(self) -> list[Map]:
        """Maps that gave no gradient in any pass of one example; none where those passes failed."""
        rows = self._known.get("alone")
        if rows is None:
            return []
        return [found for found in self.maps if not any(name in rows for name in found.parameters)]

    def _alone(self) -> dict[str, Tensor]:
        rows = [self.parts(single).rows for single in self.singles]
        empty = torch.zeros(1, self.spec.dim)
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: torch.cat([row.get(name, empty) for row in rows]) for name in names}

    def forget(self) -> None:
        """Rows were computed in a mode that is left now."""
        self._known.clear()

    def ready(self, name: str) -> bool:
        """Whether a shared result is computed already, and holds rows."""
        return _holds(self._known.get(name))

    def _once(self, name: str, compute: Callable[[], T]) -> T:
        """Computed at the first use; when that failed, or gave no row, the later ones are blocked."""
        if name not in self._known:
            self._known[name] = None
            self._known[name] = compute()
        if not self.ready(name):
            raise BlockedError
        return self._known[name]  # type: ignore[no-any-return]


def _stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _holds(known: Any) -> bool:
    return bool(known.rows) if isinstance(known, Parts) else known is not None and known != {}
