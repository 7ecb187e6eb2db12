"""Features: the rows that capture returns, with the table that says what they are rows of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from gradsift.kernels.errors import ShapeError
from gradsift.kernels.spec import SketchSpec

__all__ = ["Features", "TableRow", "table_difference"]


class TableRow(NamedTuple):
    """One captured parameter: its canonical name, its full shape, and the scale of its map (LoRA's alpha / r)."""

    name: str
    shape: tuple[int, ...]
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Features:
    """Sketched gradients of a batch.

    Attributes:
        values: float32, shape (n, dim); (n, groups, dim) of a capture with groups; (n, parts, dim) after ``fold``.
        loss: float32, shape (n,); None under a tap, which does not see losses.
        grad_norm: float32, shape (n,), or (n, parts): the exact norm of each gradient before sketching; NaN where it
            is not known (a parameter used in several backward passes). With a preconditioner, the norm of what it made
            of the gradient.
        spec: the projection.
        table: the captured parameters.
        loss_kind: the ``kind`` that the loss declares, compared with a store's; None when it declares none or is not
            seen (under a tap).
        preconditioner: what was applied to each gradient before the sketch, such as ``{"kind": "adam", ...}``; None
            for plain gradients.
        groups: names along the second axis of rows that are kept apart by group; empty otherwise, and after ``fold``.
    """

    values: Tensor
    loss: Tensor | None
    grad_norm: Tensor
    spec: SketchSpec
    table: tuple[TableRow, ...]
    loss_kind: str | None = None
    preconditioner: dict[str, Any] | None = None
    groups: tuple[str, ...] = ()

    def fold(self, parts: int) -> Features:
        """One row per example, as a store with parts holds it, of a loss that gives one row per example and part.

        Args:
            parts: how many the loss keeps apart, ``len(loss.parts)``; rows lie example by example.

        Returns:
            values (n, parts, dim) and grad_norm (n, parts), or with groups (n, parts * groups, dim) and (n, parts *
            groups), the groups of the first part first; losses are summed over the parts. With one part nothing
            changes.

        Raises:
            ShapeError: the rows are not that many per example.
        """
        if parts == 1:
            return self
        if self.values.ndim != (3 if self.groups else 2) or parts < 1 or len(self.values) % parts:
            raise ShapeError(
                f"features have shape {tuple(self.values.shape)}, expected {parts} rows per example: "
                "capture them with the loss that keeps its parts apart"
            )
        return replace(
            self,
            values=self.values.reshape(len(self.values) // parts, -1, self.values.shape[-1]),
            grad_norm=self.grad_norm.reshape(len(self.values) // parts, -1),
            loss=None if self.loss is None else self.loss.unflatten(0, (-1, parts)).sum(dim=1),
            groups=(),
        )


def table_difference(got: Sequence[TableRow], expected: Sequence[TableRow]) -> str | None:
    """The first row in which two tables differ, in words; None when they agree."""
    for i, (a, b) in enumerate(zip(got, expected, strict=False)):
        if a != b:
            return f"row {i} is {_words(a)}, expected {_words(b)}"
    if len(got) != len(expected):
        longer, which = (got, "has") if len(got) > len(expected) else (expected, "lacks")
        return f"it {which} {_words(longer[min(len(got), len(expected))])}"
    return None


def _words(row: TableRow) -> str:
    return f"{row.name} {tuple(row.shape)} x {row.scale:g}"
