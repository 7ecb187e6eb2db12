"""Retrieval: which rows of a store pull a query's loss down most; the sketch finds, exact gradients may decide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.fisher import Fisher
from gradsift.engine.answers.rescore import Exact, Rescorer
from gradsift.engine.answers.scan import RowStore, scan
from gradsift.engine.capture.features import Features, table_difference
from gradsift.kernels.errors import ShapeError, SpecError, StoreError

__all__ = ["MEMORY", "SIGN", "Prepared", "Rescorer", "Scorer", "TopK", "ids_of", "prepare", "topk"]

logger = logging.getLogger(__name__)

SIGN = "positive = training on it lowers the query's loss"
"""What the sign of every score means."""

MEMORY = 256 << 20
"""Bytes that a search may take unless told otherwise, beside the queries and the answer."""

Scorer = Literal["fisher", "dot", "cosine"] | Fisher
ExactScores = Callable[[int, np.ndarray], Exact]


@dataclass(frozen=True, slots=True)
class TopK:
    """The answer to q queries, best first.

    Attributes:
        ids: object array (q, k), the store's ids; k is the number of rows in the store when it holds fewer.
        scores: float64 (q, k); exact ones after re-scoring, sketched ones otherwise.
        rows: int64 (q, k), row numbers in the store.
        scorer: "fisher", "dot" or "cosine": the one that was used.
        largest: False when these are the rows that push the query's loss up most, most harmful first.
        tokens: float64 (q, k, T) after re-scoring: the share of each token, 0 beyond an example's own tokens. For
            "cosine" divided like the scores; it adds up to them.
        sketched: float64 (q, k) after re-scoring: the sketch's scores of the same rows.
        sign: what the sign of a score means.
    """

    ids: np.ndarray
    scores: np.ndarray
    rows: np.ndarray
    scorer: str
    largest: bool = True
    tokens: np.ndarray | None = None
    sketched: np.ndarray | None = None
    sign: str = SIGN


class Prepared(NamedTuple):
    """Queries that fit the store, as directions to multiply its rows by.

    Attributes:
        directions: float64 (q, dim).
        lengths: float64 (q,): what scores are divided by; ones unless the scorer is "cosine".
        norms: float32 (n,), exact norms of the store's rows.
        scorer: the one that is used.
    """

    directions: Tensor
    lengths: np.ndarray
    norms: np.ndarray
    scorer: str


def topk(
    store: RowStore,
    queries: Features | Tensor,
    k: int = 10,
    scorer: Scorer = "fisher",
    largest: bool = True,
    *,
    as_set: bool = False,
    damping: float = 1.0,
    rescore: ExactScores | None = None,
    shortlist: int | None = None,
    memory: int = MEMORY,
) -> TopK:
    """The k rows of a store that help each query most.

    Scores are inner products with the query's gradient ("dot"), these divided by both exact norms ("cosine"), or
    inner products with the query after the damped true Fisher of the store's curvature sample ("fisher"). They are
    float64 and, like the ids, do not depend on how the store is cut into blocks; equal scores go to the lower row.

    Args:
        store: a ``FeatureStore``, or anything like it.
        queries: features of q queries; or a tensor (q, dim), of which only ``dim`` can be compared with the store and
            whose own lengths stand in for exact norms.
        k: answers per query; all rows when the store holds fewer.
        scorer: one of the three, or a fitted ``Fisher`` to use again. A store without a curvature sample answers
            "fisher" with "dot" and a warning; the result says which it was.
        largest: False for the rows that raise the query's loss most.
        as_set: one query instead of q: the mean of their gradients.
        damping: of "fisher", see ``Fisher``.
        rescore: exact scores of a short list, ``rescore(query, rows) -> Exact`` for rows in this order: a
            ``Rescorer``. The sketch then only finds ``shortlist`` rows per query, and these scores decide.
        shortlist: rows per query that are scored exactly; the larger of 100 and 10 k unless given, which at dim
            1024 found .99 of the exact top 10 on a language model.
        memory: bytes to work in, beside queries and answer.

    Raises:
        SpecError: the queries were drawn by another sketch, from other parameters or another loss.
        ShapeError: k, the queries' shape or numbers are unusable.
        StoreError: the store holds no rows or a row that is not finite.
    """
    if k < 1:
        raise ShapeError(f"k is {k}, expected at least 1")
    if shortlist is not None and (rescore is None or shortlist < k):
        raise ShapeError(f"shortlist is {shortlist} for k = {k}: give rescore= and a list of at least k rows")
    prepared = prepare(store, queries, scorer, as_set=as_set, damping=damping)
    length = k if rescore is None else shortlist or max(100, 10 * k)
    sign = 1.0 if largest else -1.0
    best = scan(
        store,
        sign * prepared.directions,
        min(length, len(store)),
        norms=prepared.norms,
        unit=prepared.scorer == "cosine",
        memory=memory,
    )
    scores, rows = sign * best.scores / prepared.lengths[:, None], best.rows
    if rescore is None:
        return TopK(ids_of(store, rows), scores, rows, prepared.scorer, largest)
    return _decide(store, prepared, rescore, rows, scores, k, largest)


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
    values = _values(store, queries)
    lengths = torch.linalg.vector_norm(values, dim=1)
    if isinstance(queries, Features):
        lengths = torch.where(queries.grad_norm.cpu().isnan(), lengths, queries.grad_norm.cpu().to(torch.float64))
    if as_set:
        values = values.mean(dim=0, keepdim=True)
        lengths = torch.linalg.vector_norm(values, dim=1)
    empty = (torch.linalg.vector_norm(values, dim=1) == 0).nonzero()
    if len(empty):
        raise ShapeError(
            f"query {int(empty[0])} has a zero gradient, which ranks nothing: expected at least one token with loss"
        )
    norms = np.asarray(store.grad_norm, dtype=np.float32)
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
    if name not in ("fisher", "dot", "cosine"):
        raise SpecError(f"scorer is {scorer!r}, expected 'fisher', 'dot', 'cosine' or a fitted Fisher")
    if name == "cosine" and np.isnan(norms).any():
        row = int(np.isnan(norms).argmax())
        raise StoreError(
            f"row {row} (id {store.ids[row]!r}) has no exact norm, which a cosine divides by: use scorer='dot'"
        )
    divide = lengths.numpy() if name == "cosine" else np.ones(len(values))
    return Prepared(values, divide, norms, name)


def _values(store: RowStore, queries: Features | Tensor) -> Tensor:
    """The queries' rows in float64, after everything that can be compared was."""
    spec = getattr(store, "spec", None)
    values = queries.values if isinstance(queries, Features) else queries
    if values.ndim != 2 or not len(values):
        raise ShapeError(f"queries have shape {tuple(values.shape)}, expected (q, dim) with q >= 1")
    dim = spec.dim if spec is not None else next(iter(store.blocks()))[1].shape[1]
    if values.shape[1] != dim:
        raise SpecError(
            f"features have dim {values.shape[1]} but {_name(store)} holds dim {dim}: "
            "open it with the spec that built it (store.spec)"
        )
    if isinstance(queries, Features):
        if spec is not None and queries.spec != spec:
            raise SpecError(
                f"features were drawn by {queries.spec.to_json()} but {_name(store)} by {spec.to_json()}: "
                "capture them with the spec that built it (store.spec)"
            )
        _same_rows(store, queries)
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).any(dim=1).nonzero()[0])
        raise ShapeError(f"query {row} holds NaN or infinite features: expected finite gradients, look at its loss")
    return values.detach().cpu().to(torch.float64)


def _same_rows(store: RowStore, queries: Features) -> None:
    """Contract of names: rows of one table, one loss and no preconditioner, or their products mean nothing."""
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


def _decide(
    store: RowStore,
    prepared: Prepared,
    rescore: ExactScores,
    rows: np.ndarray,
    sketched: np.ndarray,
    k: int,
    largest: bool,
) -> TopK:
    """Order each short list by exact scores."""
    k = min(k, rows.shape[1])
    chosen, tokens = [], []
    for query, listed in enumerate(rows):
        exact = rescore(query, listed)
        if len(exact.scores) != len(listed):
            raise ShapeError(
                f"re-scoring returned {len(exact.scores)} scores for {len(listed)} rows: expected one per row, in order"
            )
        divide = prepared.lengths[query] * np.ones(len(listed))
        if prepared.scorer == "cosine":
            divide = divide * prepared.norms[listed]
        weight = np.divide(1.0, divide, out=np.zeros(len(listed)), where=divide > 0)
        scores = exact.scores.numpy() * weight
        order = np.lexsort((listed, -scores if largest else scores))[:k]
        chosen.append((order, scores[order]))
        tokens.append(exact.tokens.numpy()[order] * weight[order, None])
    width = max(t.shape[1] for t in tokens)
    orders = np.stack([order for order, _ in chosen])
    rows = np.take_along_axis(rows, orders, axis=1)
    return TopK(
        ids_of(store, rows),
        np.stack([scores for _, scores in chosen]),
        rows,
        prepared.scorer,
        largest,
        np.stack([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in tokens]),
        np.take_along_axis(sketched, orders, axis=1),
    )


def ids_of(store: RowStore, rows: np.ndarray) -> np.ndarray:
    """The store's ids at these rows, an object array of their shape."""
    ids = np.empty(rows.shape, dtype=object)
    for place, row in np.ndenumerate(rows):
        ids[place] = store.ids[int(row)]
    return ids


def _name(store: RowStore) -> str:
    path = getattr(store, "path", None)
    return "the store" if path is None else repr(str(path))
