"""What a compacted store consists of, beside what it shares with the store it was made of.

zarr.json           attributes["gradsift"]: the description of that store, and "compacted", see ``About``
codes (n, bytes)    uint8                  scale (n,)  float32
axes/encode, axes/decode (checkpoints * dim, axes)  float32
loss, loss_tokens, checkpoint_loss, grad_norm, ids, blocks, curvature/: as there; features are not there
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gradsift.engine.compaction.codes import code_bytes
from gradsift.engine.store.block_writer import Group
from gradsift.engine.store.columns import Column
from gradsift.engine.store.format import example_columns

__all__ = ["SCALE_BYTES", "About", "axes_columns", "group"]

SCALE_BYTES = 4
"""What a row's scale takes of its bytes."""

_LEFT_OUT = ("features", "scale", "batch_hash", "batch_rows")


@dataclass(frozen=True, slots=True)
class About:
    """What a compacted store says of its making, in ``metadata["compacted"]``.

    Attributes:
        source: the store it was made of, an absolute path.
        bytes: of a row, its scale included.
        axes, bits: how many numbers are coded, in how many bits each.
        metric: "fisher" or "rows": whose principal axes these are.
        scorer: whose answers were to survive.
        block: rows per chunk.
        width: numbers of a row that the axes were taken of: checkpoints times dim.
        held: rows that the axes behind ``recall`` were not taken of; of few rows, those that are kept were.
        outside: the share of the held rows' squared length that lies outside axes without them.
        recall: what was measured before writing, see ``Recall``.
    """

    source: str
    bytes: int
    axes: int
    bits: int
    metric: str
    scorer: str
    block: int
    width: int
    held: list[int]
    outside: float
    recall: dict[str, Any]


def group(description: Mapping[str, Any]) -> Group:
    """Columns of the examples."""
    about = description["compacted"]
    block = int(about["block"])
    whole = example_columns(description)
    kept = [replace(column, block=block) for column in whole.columns if column.name not in _LEFT_OUT]
    coded = [
        Column("codes", "uint8", block, (code_bytes(about["axes"], about["bits"]),)),
        Column("scale", "float32", block),
    ]
    return Group((*coded, *kept), ("ids", "codes"), whole.marker)


def axes_columns(description: Mapping[str, Any]) -> tuple[Column, Column]:
    """The maps of the axes, one chunk each."""
    about = description["compacted"]
    width, tail = int(about["width"]), (int(about["axes"]),)
    return Column("axes/encode", "float32", width, tail), Column("axes/decode", "float32", width, tail)
