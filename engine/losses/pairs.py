"""Pairs of a chosen and a rejected answer, as the rows that a model sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.engine.losses.language import counted_labels
from gradsift.engine.losses.softmax import IGNORE
from gradsift.kernels.errors import DataError, ShapeError

__all__ = ["STORED", "counted_in", "rows_of"]

STORED = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns of reference log-probabilities."""

_SIDES = ("chosen", "rejected")
_NOT_PAIRED = frozenset({"ids", "held", "drawn", *STORED})


def rows_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The 2 n rows that the model sees: chosen and rejected in turn, padded to one length."""
    for side in _SIDES:
        for column in ("input_ids", "labels"):
            if batch.get(f"{side}_{column}") is None:
                raise DataError(
                    f"the batch has no {side}_{column}: a pair is chosen_input_ids and chosen_labels (-100 at the "
                    "prompt) with rejected_input_ids and rejected_labels"
                )
    odd = [name for name in batch if name not in _NOT_PAIRED and name.partition("_")[0] not in _SIDES]
    if odd:
        raise DataError(
            f"the batch has {odd[0]!r}, which no answer of a pair has: name the model's inputs chosen_... and "
            "rejected_..."
        )
    inputs = {f"{side}_attention_mask": torch.ones_like(batch[f"{side}_input_ids"]) for side in _SIDES} | {
        name: value for name, value in batch.items() if name not in _NOT_PAIRED and value is not None
    }
    columns = dict.fromkeys(name.partition("_")[2] for name in inputs)
    rows = {c: _in_turn(inputs.get(f"chosen_{c}"), inputs.get(f"rejected_{c}"), c) for c in columns}
    empty = (rows["labels"] == IGNORE).all(dim=1).nonzero()
    if len(empty):
        pair, place = divmod(int(empty[0]), 2)
        raise DataError(f"the {_SIDES[place]} answer of pair {pair} has no label that counts: leave the pair out")
    return rows


def _in_turn(chosen: Tensor | None, rejected: Tensor | None, name: str) -> Tensor:
    """Rows of both in turn, (2 n, T), the shorter ones filled up on the right."""
    shapes = [None if t is None else tuple(t.shape) for t in (chosen, rejected)]
    if chosen is None or rejected is None or chosen.ndim != 2 or rejected.ndim != 2 or len(chosen) != len(rejected):
        raise ShapeError(
            f"chosen_{name} has shape {shapes[0]} and rejected_{name} {shapes[1]}, expected (pairs, tokens) of both "
            "for the same pairs"
        )
    fill = IGNORE if name == "labels" else 0
    longest = max(chosen.shape[1], rejected.shape[1])
    padded = [functional.pad(t, (0, longest - t.shape[1]), value=fill) for t in (chosen, rejected)]
    return torch.stack(padded, dim=1).flatten(0, 1)


def counted_in(batch: Mapping[str, Any], model: nn.Module) -> Tensor:
    """Which labels carry loss for a model, at their own place: bool (n, 2, T)."""
    counted = counted_labels(rows_of(batch), model)
    return counted.view(-1, 2, counted.shape[1])
