"""Queries as they are given, compared with a store: same sketch, parameters, loss, parts; finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.capture.features import Features, table_difference
from gradsift.engine.scorers.protocol import Queries
from gradsift.engine.scorers.stores import losses, name
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import ShapeError, SpecError, StoreError

__all__ = ["Given", "checked"]

Given = Features | FeatureStore | Tensor
"""Queries: features of some examples; a store of them, with the parts of the store that is asked; or a tensor."""


def checked(store: RowStore, given: Given) -> Queries:
    """Queries that fit the store.

    Raises:
        SpecError: they were drawn by another sketch, from other parameters, another loss, model or other parts.
        ShapeError: their shape or numbers are unusable.
        StoreError: the store of queries holds no rows.
    """
    adam = given.metadata.get("preconditioner") if isinstance(given, FeatureStore) else None
    if adam or (isinstance(given, Features) and given.preconditioner):
        raise SpecError(
            "the queries are gradients after Adam, expected plain ones: capture them without adam, or extract them "
            "with checkpoints that have adam=None"
        )
    if isinstance(given, FeatureStore):
        given = _features(store, given)
    parts = np.shape(store.grad_norm)[1] if len(np.shape(store.grad_norm)) == 2 else 1
    spec = getattr(store, "spec", None)
    values = given.values if isinstance(given, Features) else given
    expected = "(q, dim)" if parts == 1 else f"(q, {parts}, dim)"
    if values.ndim < 2 or not len(values):
        raise ShapeError(f"queries have shape {tuple(values.shape)}, expected {expected} with q >= 1")
    dim = spec.dim if spec is not None else next(iter(store.blocks()))[1].shape[-1]
    if values.shape[-1] != dim:
        raise SpecError(
            f"features have dim {values.shape[-1]} but {name(store)} holds dim {dim}: "
            "open it with the spec that built it (store.spec)"
        )
    if isinstance(given, Features):
        if spec is not None and given.spec != spec:
            raise SpecError(
                f"features were drawn by {given.spec.to_json()} but {name(store)} by {spec.to_json()}: "
                "capture them with the spec that built it (store.spec)"
            )
        if _same_loss(store, given) and _as_captured(store, given):
            given = given.fold(parts // max(1, len(given.groups)))
        if parts == 1 and given.values.shape[1:-1] == (1,):  # the only group of a capture with groups is the whole row
            given = replace(given, values=given.values[:, 0], grad_norm=given.grad_norm[:, 0], groups=())
        values = given.values
    if values.shape[1:-1] != (() if parts == 1 else (parts,)):
        raise ShapeError(f"queries have shape {tuple(values.shape)}, expected {expected}: {_remedy(store, parts)}")
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0])
        raise ShapeError(f"query {row} holds NaN or infinite features: expected finite gradients, look at its loss")
    values = values.detach().cpu().to(torch.float64)
    norms = torch.linalg.vector_norm(values, dim=-1)
    loss = None
    if isinstance(given, Features):
        exact = given.grad_norm.cpu().to(torch.float64)
        norms = torch.where(exact.isnan(), norms, exact)
        loss = None if given.loss is None else given.loss.detach().cpu().to(torch.float64)
    return Queries(values, norms, loss)


def _as_captured(store: RowStore, given: Features) -> bool:
    """Whether the queries are rows as capture gives them, one per example and part of the loss, to be folded."""
    groups = {part.get("group") for part in getattr(store, "parts", ())} - {None}
    return _one_checkpoint(store) and given.values.ndim == (3 if groups else 2) and len(given.groups) == len(groups)


def _one_checkpoint(store: RowStore) -> bool:
    """Whether the rows are of one checkpoint, so that a capture of the same loss has all their parts."""
    return len({part.get("checkpoint") for part in getattr(store, "parts", ())}) <= 1


def _remedy(store: RowStore, parts: int) -> str:
    """What to do about queries of another number of parts."""
    table = getattr(store, "parts", ())
    if not _one_checkpoint(store):
        count = len({part.get("checkpoint") for part in table})
        return (
            f"{name(store)} holds {count} checkpoints, so extract the queries to a store of their own with the same "
            "checkpoints, and give that"
        )
    if any(part.get("group") is not None for part in table):
        return f"{name(store)} holds {len(table)} groups, so capture the queries with the same groups"
    return f"capture them with the loss that built {name(store)}" + (
        " and fold its parts (features.fold)" if parts > 1 else ""
    )


def _same_loss(store: RowStore, queries: Features) -> bool:
    """Contract of names: rows of one table and one loss, or their products mean nothing.

    Returns:
        whether both losses are known, and so the same.
    """
    table = getattr(store, "table", None)
    difference = table_difference(queries.table, table) if table else None
    if difference is not None:
        raise SpecError(
            f"features are gradients of other parameters than {name(store)} holds: {difference}; "
            "capture them with the same model, adapter and modules"
        )
    loss = getattr(store, "metadata", {}).get("loss", {}).get("kind")
    if None not in (loss, queries.loss_kind) and loss != queries.loss_kind:
        raise SpecError(
            f"features are gradients of the loss {queries.loss_kind!r} but {name(store)} holds those of {loss!r}: "
            "capture them with the loss that built it"
        )
    return None not in (loss, queries.loss_kind)


def _features(store: RowStore, queries: FeatureStore) -> Features:
    """All rows of a store of queries, in memory."""
    if not len(queries):
        raise StoreError(f"{name(queries)} holds no rows: extract the queries first")
    _same_parts(store, queries)
    for mine, other in zip(_weights(getattr(store, "metadata", {})), _weights(queries.metadata), strict=False):
        for what in ("model", "adapter"):
            if None not in (mine.get(what), other.get(what)) and mine[what] != other[what]:
                raise SpecError(
                    f"{name(queries)} was extracted from another {what} than {name(store)}: extract the queries again "
                    "with the weights that the store was extracted from"
                )
    loss = losses(queries)
    return Features(
        torch.from_numpy(queries.features[:]),
        None if loss is None else torch.from_numpy(loss if loss.shape[1] > 1 else loss[:, 0]),
        torch.from_numpy(queries.grad_norm),
        queries.spec,
        queries.table,
        queries.metadata["loss"]["kind"],
    )


def _weights(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Fingerprints of the model at each checkpoint."""
    checkpoints = metadata.get("checkpoints") or [metadata]
    return [checkpoint.get("fingerprints") or {} for checkpoint in checkpoints]


def _same_parts(store: RowStore, queries: FeatureStore) -> None:
    """The queries' parts are those of the store, in the same order."""
    table = getattr(store, "parts", None)
    if table is None:
        return
    kept = [
        [{k: v for k, v in part.items() if k not in _MAY_DIFFER} for part in parts] for parts in (queries.parts, table)
    ]
    if len(queries.parts) != len(table):
        raise SpecError(
            f"{name(queries)} holds {_words(queries.parts)} but {name(store)} holds {_words(table)}: extract the "
            "queries with the same checkpoints, groups and loss"
        )
    for place, (got, expected) in enumerate(zip(*kept, strict=True)):
        if got != expected:
            raise SpecError(
                f"part {place} of {name(queries)} is {got} but {expected} in {name(store)}: extract the queries with "
                "the same checkpoints, groups and loss, in the same order"
            )


_MAY_DIFFER = ("learning_rate", "norm")


def _words(table: Any) -> str:
    """How many parts of which kind."""
    count = len({part.get("checkpoint") for part in table})
    rest = len(table) // max(count, 1)
    return f"{count} checkpoint{'s' * (count > 1)}" + (f" of {rest} parts" if rest > 1 else "")
