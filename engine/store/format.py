"""What a store consists of: its columns, and the description in its root attributes.

zarr.json                   group; attributes["gradsift"] is the description below
features   (n, parts, dim)  float32 or float16        scale (n, parts)   float32, with float16 only
loss       (n,)  float32, summed over parts           grad_norm (n, parts)  float32
loss_tokens (n,) int64, when the loss counts them     ids   (n,)  string, or int64
checkpoint_loss (n, checkpoints)  float32, when rows were taken at several; loss is then that of the last
batch_hash (n, 16) uint8    content hash of the batch that a row came in
batch_rows (n,)  int32      rows of that batch
blocks     (blocks, 3) uint64   rows and content hash of a committed block
curvature/features, scale, ids, draw (int32), blocks    rows of gradients of labels sampled from the model
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsift.engine.capture.features import TableRow, table_difference
from gradsift.engine.store.block_writer import Group
from gradsift.engine.store.columns import Column, group_json, write_atomically
from gradsift.kernels.errors import SpecError, StoreError
from gradsift.kernels.spec import SketchSpec

__all__ = [
    "FORMAT",
    "SIGN",
    "curvature_columns",
    "difference",
    "example_columns",
    "read_description",
    "table_from",
    "write_description",
]

FORMAT = 1
"""Changes when an older gradsift could not read a store."""

SIGN = "positive: training on the example lowers the query's loss"

Description = dict[str, Any]


def example_columns(description: Mapping[str, Any]) -> Group:
    """Columns of the examples' rows."""
    block, parts = int(description["block"]), len(description["parts"])
    columns = [
        *_features("", description),
        Column("loss", "float32", block),
        Column("grad_norm", "float32", block, (parts,)),
        Column("ids", description["ids"], block),
        Column("batch_hash", "uint8", block, (16,)),
        Column("batch_rows", "int32", block),
    ]
    if description.get("checkpoints"):
        columns.append(Column("checkpoint_loss", "float32", block, (len(description["checkpoints"]),)))
    if description["loss"]["tokens"]:
        columns.append(Column("loss_tokens", "int64", block))
    return Group(tuple(columns), ("ids", "batch_hash", "batch_rows"), Column("blocks", "uint64", 1, (3,)))


def curvature_columns(description: Mapping[str, Any]) -> Group:
    """Columns of the curvature sample."""
    block = int(description["block"])
    columns = (
        *_features("curvature/", description),
        Column("curvature/ids", description["ids"], block),
        Column("curvature/draw", "int32", block),
    )
    return Group(columns, ("curvature/ids", "curvature/draw"), Column("curvature/blocks", "uint64", 1, (3,)))


def _features(prefix: str, description: Mapping[str, Any]) -> list[Column]:
    block, parts = int(description["block"]), description["parts"]
    columns = [Column(f"{prefix}features", description["dtype"], block, (len(parts), int(parts[0]["dim"])))]
    if description["dtype"] == "float16":
        columns.append(Column(f"{prefix}scale", "float32", block, (len(parts),)))
    return columns


def write_description(root: Path, description: Mapping[str, Any]) -> None:
    """Replace the root's attributes in one step."""
    write_atomically(root / "zarr.json", group_json({"gradsift": dict(description)}))


def read_description(root: Path) -> Description | None:
    """The description of the store at ``root``; None when nothing is there yet (no folder, or an empty one).

    Raises:
        StoreError: what is there is no store, or one of a later format.
    """
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(
            f"{root} is not a folder that can be read ({error.strerror}): give the path of a store"
        ) from None
    if all(name == "zarr.json.tmp" for name in names):
        return None
    foreign = f"{root} holds something that is no gradsift store ({', '.join(names[:3])}): give another path"
    try:
        attributes = json.loads((root / "zarr.json").read_text(encoding="utf-8"))["attributes"]["gradsift"]
        known = int(attributes["format"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(foreign) from None
    if known != FORMAT:
        raise StoreError(
            f"{root} has store format {known} and this gradsift reads format {FORMAT}: "
            "install the release that wrote it"
        )
    return dict(attributes)


def table_from(rows: Sequence[Mapping[str, Any]]) -> tuple[TableRow, ...]:
    """The maps table of a description."""
    return tuple(TableRow(row["name"], tuple(row["shape"]), row["scale"]) for row in rows)


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing in which a store and an extraction that would continue it differ, in words."""
    if old.get("compacted") and not new.get("compacted"):
        return "it is compacted, and rows of other stores are all that can be added to it"
    if old["spec"] != new["spec"]:
        return _values("the sketch", _spec(old["spec"]), _spec(new["spec"]))
    table = table_difference(table_from(new["table"]), table_from(old["table"]))
    if table is not None:
        return f"the captured parameters differ: {table}"
    checkpoints = _checkpoints(old.get("checkpoints") or [], new.get("checkpoints") or [])
    if checkpoints is not None:
        return checkpoints
    # The loss says which parts there are, in words of its own.
    return _first(old, new, (_LOSS,)) or _parts(old["parts"], new["parts"]) or _first(old, new, _COMPARED)


def _first(
    old: Mapping[str, Any], new: Mapping[str, Any], compared: Sequence[tuple[str, tuple[str, ...]]]
) -> str | None:
    """The first entry that differs."""
    for what, path in compared:
        before, after = _at(old, path), _at(new, path)
        if before != after:
            return _values(what, before, after)
    return None


_LOSS = ("the loss", ("loss", "kind"))

_COMPARED = (
    ("loss_tokens", ("loss", "tokens")),
    ("the base model's fingerprint", ("fingerprints", "model")),
    ("the adapter's fingerprint", ("fingerprints", "adapter")),
    ("what was applied to gradients", ("preconditioner",)),
    ("dtype", ("dtype",)),
    ("block", ("block",)),
    ("the ids' type", ("ids",)),
    ("the number of curvature rows", ("curvature", "requested")),
)


def _checkpoints(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str | None:
    """The first checkpoint that differs."""
    if len(old) != len(new):
        return _values("the number of checkpoints", len(old), len(new))
    for before, after in zip(old, new, strict=True):
        for key in (key for key in before if before[key] != after.get(key)):
            what = "name" if key == "name" else f"{key.replace('_', ' ')} of checkpoint {before['name']!r}"
            return _values(f"the {what}", before[key], after.get(key))
    return None


def _parts(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str | None:
    """The first part that differs; what is not known is the same as what is not said."""
    if len(old) != len(new):
        return _values("the number of parts", len(old), len(new))
    for number, pair in enumerate(zip(old, new, strict=True)):
        before, after = ({key: value for key, value in part.items() if value is not None} for part in pair)
        if before != after:
            return _values(f"part {number}", before, after)
    return None


def _values(what: str, before: object, after: object) -> str:
    return f"{what} was {before} and is now {after}"


def _at(description: Mapping[str, Any], path: Sequence[str]) -> object:
    value: Any = description
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _spec(fields: Mapping[str, Any]) -> str:
    try:
        spec = SketchSpec.from_json(json.dumps(fields))
    except SpecError:
        return str(dict(fields))
    projected = "" if spec.project is None else f", gradients projected to {spec.project}"
    return f"{spec.kind} of dim {spec.dim}, seed {spec.seed}{projected}"
