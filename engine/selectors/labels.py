"""Labels, such as the classes of rows or the tasks of targets: one each, checked."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gradsift.kernels.errors import DataError

__all__ = ["grouped", "labelled"]


def labelled(
    labels: Sequence[Any] | None, count: int, what: str, of: str = "row"
) -> tuple[tuple[Any, ...], np.ndarray]:
    """The distinct labels in order of appearance, and int64 (n,) which of them each row (or target) has.

    Args:
        labels: one each; None gives all the same.
        count: n.
        what: the option's name, for errors. of: what is labelled.

    Raises:
        DataError: there are more or fewer labels than rows, or one is empty or a list.
    """
    if labels is None:
        return (None,), np.zeros(count, dtype=np.int64)
    given = [label.item() if isinstance(label, np.generic | Tensor) else label for label in labels]
    if len(given) != count:
        raise DataError(f"{what} has {len(given)} labels for {count} {of}s: give one per {of}, in their order")
    for place, label in enumerate(given):
        if not isinstance(label, Hashable):
            raise DataError(f"{of} {place} has a {type(label).__name__} in {what}, expected text or a number")
        if label is None or label == "" or label != label:
            raise DataError(f"{of} {place} has no label in {what}, it is {label!r}: give every {of} one")
    names = tuple(dict.fromkeys(given))
    number = {name: i for i, name in enumerate(names)}
    return names, np.fromiter((number[label] for label in given), dtype=np.int64, count=count)


def grouped(rows: np.ndarray, index: np.ndarray, count: int) -> list[np.ndarray]:
    """The rows of each group, ascending.

    Args:
        rows: int64 (m,), ascending. index: int64 (m,), the group of each, 0 to count - 1.
    """
    order = np.argsort(index, kind="stable")
    return np.split(rows[order], np.searchsorted(index[order], np.arange(1, count)))
