"""Retrieval: which rows of a store pull a query's loss down most; the sketch finds, exact gradients may decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.queries import Prepared, Scorer, prepare
from gradsift.engine.answers.rescore import Exact, Rescorer, pad_alike
from gradsift.engine.answers.scan import RowStore, scan
from gradsift.engine.capture.features import Features
from gradsift.kernels.errors import ShapeError

__all__ = ["MEMORY", "SIGN", "Rescorer", "TopK", "ids_of", "topk"]

SIGN = "positive = training on it lowers the query's loss"
"""What the sign of every score means."""

MEMORY = 256 << 20
"""Bytes that a search may take unless told otherwise, beside the queries and the answer."""

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
        tokens: float64 (q, k, T), or (q, k, H, W) for images, after re-scoring: the share of each token or latent
            position, 0 beyond an example's own. For "cosine" divided like the scores; it adds up to them.
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
    Where the loss has several parts (timesteps of a diffusion loss), "dot" and "fisher" score the sums over them, and
    "cosine" is the mean over the parts of their cosines: no timestep outweighs another.

    Args:
        store: a ``FeatureStore``, or anything like it.
        queries: features of q queries; or a tensor (q, dim), for several parts (q, parts, dim), of which only its sizes
            can be compared with the store and whose own lengths stand in for exact norms.
        k: answers per query; all rows when the store holds fewer.
        scorer: one of the three, or a fitted ``Fisher`` to use again. A store without a curvature sample answers
            "fisher" with "dot" and a warning; the result says which it was.
        largest: False for the rows that raise the query's loss most.
        as_set: one query instead of q: the mean of their gradients.
        damping: of "fisher", see ``Fisher``.
        rescore: exact scores of a short list, ``rescore(query, rows) -> Exact`` for rows in this order: a
            ``Rescorer``, with losses and vectors per part for "cosine" over several parts. The sketch then only finds
            ``shortlist`` rows per query, and these scores decide.
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
    scores, rows = sign * best.scores, best.rows
    if rescore is None:
        return TopK(ids_of(store, rows), scores, rows, prepared.scorer, largest)
    return _decide(store, prepared, rescore, rows, scores, k, largest)


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
        divide = np.ones((len(listed), *prepared.lengths.shape[1:]))
        if prepared.scorer == "cosine":
            divide *= prepared.norms[listed] * _query_lengths(prepared.lengths[query], exact)
        weight = np.divide(1.0, divide, out=np.zeros_like(divide), where=divide > 0)
        _one_per_row(exact, weight)
        shares = exact.tokens * torch.from_numpy(weight).reshape(
            *weight.shape, *[1] * (exact.tokens.ndim - weight.ndim)
        )
        scores = exact.scores.numpy() * weight
        if weight.ndim == 2:
            scores, shares = scores.sum(axis=1), shares.sum(dim=1)
        order = np.lexsort((listed, -scores if largest else scores))[:k]
        chosen.append((order, scores[order]))
        tokens.append(shares[torch.from_numpy(order)])
    orders = np.stack([order for order, _ in chosen])
    rows = np.take_along_axis(rows, orders, axis=1)
    return TopK(
        ids_of(store, rows),
        np.stack([scores for _, scores in chosen]),
        rows,
        prepared.scorer,
        largest,
        torch.stack(pad_alike(tokens)).numpy(),
        np.take_along_axis(sketched, orders, axis=1),
    )


def _query_lengths(sketched: np.ndarray, exact: Exact) -> np.ndarray:
    """What a cosine divides by beside the rows' norms: the vector's own, which the mean of a set only has exactly."""
    return sketched if exact.lengths is None else exact.lengths.numpy() * max(1, sketched.size)


def _one_per_row(exact: Exact, weight: np.ndarray) -> None:
    """Exact scores fit the weights, (rows,) or (rows, parts)."""
    scores, rows = exact.scores, len(weight)
    if len(scores) != rows:
        raise ShapeError(f"re-scoring returned {len(scores)} scores for {rows} rows: expected one per row, in order")
    if scores.shape != weight.shape:
        wanted = "one token_losses and one vector per part" if weight.ndim == 2 else "the summed loss and one vector"
        raise ShapeError(
            f"re-scoring returned scores of shape {tuple(scores.shape)}, expected {weight.shape}: "
            f"give the Rescorer {wanted} for this scorer"
        )


def ids_of(store: RowStore, rows: np.ndarray) -> np.ndarray:
    """The store's ids at these rows, an object array of their shape."""
    ids = np.empty(rows.shape, dtype=object)
    for place, row in np.ndenumerate(rows):
        ids[place] = store.ids[int(row)]
    return ids
