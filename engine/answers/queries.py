"""Queries as directions: checked against a store, then ready to be multiplied by its rows."""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.capture.features import Features, table_difference
from gradsift.engine.curvature.fisher import Fisher
from gradsift.kernels.errors import ShapeError, SpecError, StoreError

__all__ = ["Prepared", "Scorer", "prepare"]

logger = logging.getLogger(__name__)

Scorer = Literal["fisher", "dot", "cosine"] | Fisher


class Prepared(NamedTuple):
    """Queries that fit the store, as directions to multiply its rows by.

    Attributes:
        directions: float64 (q, dim), or (q, parts, dim): a row's score is its product with one, for "cosine" after each
            of its parts was divided by its norm.
        lengths: float64 (q,), or (q, parts): what products with the queries' gradients are divided by; ones unless the
            scorer is "cosine".
        norms: float32 (n,), or (n, parts): exact norms of the store's rows.
        scorer: the one that is used.
    """

    directions: Tensor
    lengths: np.ndarray
    norms: np.ndarray
    scorer: str


def prepare(
    store: RowStore,
    queries: Features | Tensor,
    scorer: Scorer,
    *,
    as_set: bool = False,
    damping: float = 1.0,
) -> Prepared:
    """Check queries against the store and turn them into directions; arguments and errors as of ``topk``."""
    if not len(store):
        raise StoreError(f"{_name(store)} holds no rows: extract something first")
    norms = np.asarray(store.grad_norm, dtype=np.float32)
    parts = norms.shape[1] if norms.ndim == 2 else 1
    values, lengths = _values(store, queries, parts)
    if as_set:
        values = values.mean(dim=0, keepdim=True)
        lengths = torch.linalg.vector_norm(values, dim=-1)
    if scorer != "cosine" and values.ndim == 3:
        values = values.sum(dim=1)
    empty = (values.flatten(1) == 0).all(dim=1).nonzero()
    if len(empty):
        raise ShapeError(f"query {int(empty[0])} has a zero gradient, which ranks nothing: look at its loss")
    fisher = scorer if isinstance(scorer, Fisher) else None
    if scorer == "fisher":
        fisher = _fit(store, damping)
    if fisher is not None:
        if fisher.dim != values.shape[1]:
            raise SpecError(
                f"the Fisher has dim {fisher.dim} but the queries have dim {values.shape[1]}: fit it to this store"
            )
        values = fisher.solve(values)
    name = "fisher" if fisher is not None else "dot" if isinstance(scorer, Fisher) or scorer == "fisher" else scorer
    if name == "cosine":
        return Prepared(*_cosines(store, values, lengths, norms), norms, name)
    if name not in ("fisher", "dot"):
        raise SpecError(f"scorer is {scorer!r}, expected 'fisher', 'dot', 'cosine' or a fitted Fisher")
    directions = values if parts == 1 else values[:, None].expand(-1, parts, -1)
    return Prepared(directions, np.ones(len(values)), norms, name)


def _cosines(store: RowStore, values: Tensor, lengths: Tensor, norms: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Directions whose products with unit rows are cosines, and what the queries were divided by."""
    unknown = np.isnan(norms).reshape(len(norms), -1).any(axis=1)
    if unknown.any():
        row = int(unknown.argmax())
        raise StoreError(
            f"row {row} (id {store.ids[row]!r}) has no exact norm, which a cosine divides by: use scorer='dot'"
        )
    if values.ndim == 3:
        lengths = lengths * values.shape[1]  # the mean over the parts
    unit = torch.where(lengths > 0, 1 / lengths, 0.0)
    return values * unit[..., None], lengths.numpy()


def _values(store: RowStore, queries: Features | Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The queries' rows and their norms in float64, with an axis of parts if the store has one; all was compared."""
    spec = getattr(store, "spec", None)
    values = queries.values if isinstance(queries, Features) else queries
    expected = "(q, dim)" if parts == 1 else f"(q, {parts}, dim)"
    if values.ndim < 2 or not len(values):
        raise ShapeError(f"queries have shape {tuple(values.shape)}, expected {expected} with q >= 1")
    dim = spec.dim if spec is not None else next(iter(store.blocks()))[1].shape[-1]
    if values.shape[-1] != dim:
        raise SpecError(
            f"features have dim {values.shape[-1]} but {_name(store)} holds dim {dim}: "
            "open it with the spec that built it (store.spec)"
        )
    if isinstance(queries, Features):
        if spec is not None and queries.spec != spec:
            raise SpecError(
                f"features were drawn by {queries.spec.to_json()} but {_name(store)} by {spec.to_json()}: "
                "capture them with the spec that built it (store.spec)"
            )
        if _same_loss(store, queries) and values.ndim == 2:
            queries = queries.fold(parts)
            values = queries.values
    if values.shape[1:-1] != (() if parts == 1 else (parts,)):
        raise ShapeError(
            f"queries have shape {tuple(values.shape)}, expected {expected}: capture them with the loss that built "
            f"{_name(store)}" + (" and fold its parts (features.fold)" if parts > 1 else "")
        )
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0])
        raise ShapeError(f"query {row} holds NaN or infinite features: expected finite gradients, look at its loss")
    values = values.detach().cpu().to(torch.float64)
    lengths = torch.linalg.vector_norm(values, dim=-1)
    if isinstance(queries, Features):
        exact = queries.grad_norm.cpu().to(torch.float64)
        lengths = torch.where(exact.isnan(), lengths, exact)
    return values, lengths


def _same_loss(store: RowStore, queries: Features) -> bool:
    """Contract of names: rows of one table, one loss and no preconditioner, or their products mean nothing.

    Returns:
        whether both losses are known, and so the same.
    """
    table = getattr(store, "table", None)
    difference = table_difference(queries.table, table) if table else None
    if difference is not None:
        raise SpecError(
            f"features are gradients of other parameters than {_name(store)} holds: {difference}; "
            "capture them with the same model, adapter and modules"
        )
    loss = getattr(store, "metadata", {}).get("loss", {}).get("kind")
    if None not in (loss, queries.loss_kind) and loss != queries.loss_kind:
        raise SpecError(
            f"features are gradients of the loss {queries.loss_kind!r} but {_name(store)} holds those of {loss!r}: "
            "capture them with the loss that built it"
        )
    return None not in (loss, queries.loss_kind)


def _fit(store: RowStore, damping: float) -> Fisher | None:
    rows = getattr(store, "curvature", None)
    if rows is None or not len(rows):
        logger.warning(
            "%s holds no curvature sample, so scores are plain inner products (scorer 'dot'): "
            "extract with curvature=2000 for 'fisher'",
            _name(store),
        )
        return None
    return Fisher(rows, damping, len(store))


def _name(store: RowStore) -> str:
    path = getattr(store, "path", None)
    return "the store" if path is None else repr(str(path))
