"""Retrieval: which rows of a store pull a query's loss down most; the sketch finds, exact gradients may decide."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from gradsift.engine.answers.given import Given
from gradsift.engine.answers.queries import AnyScorer, Prepared, prepare
from gradsift.engine.answers.rescore import Exact, Rescorer, pad_alike
from gradsift.engine.answers.scan import Best, RowStore, best_streamed, scan
from gradsift.engine.curvature.corrected import Corrected
from gradsift.engine.scorers.protocol import LinearScorer
from gradsift.kernels.errors import ShapeError, SpecError

__all__ = ["MEMORY", "SIGN", "Rescorer", "TopK", "find", "ids_of", "topk"]

SIGN = "positive = training on it lowers the query's loss"
"""What the sign of every score means."""

MEMORY = 256 << 20
"""Bytes that a search may take unless told otherwise, beside the queries and the answer."""

logger = logging.getLogger(__name__)

ExactScores = Callable[[int, np.ndarray], Exact]


@dataclass(frozen=True, slots=True)
class TopK:
    """The answer to q queries, best first.

    Attributes:
        ids: object array (q, k), the store's ids; k is the number of rows in the store when it holds fewer.
        scores: float64 (q, k); exact ones after re-scoring, sketched ones otherwise.
        rows: int64 (q, k), row numbers in the store.
        scorer: the name of the one that was used.
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
    queries: Given | None,
    k: int = 10,
    scorer: AnyScorer = "fisher",
    largest: bool = True,
    *,
    as_set: bool = False,
    damping: float | None = None,
    rescore: ExactScores | None = None,
    method: str | None = None,
    shortlist: int | Literal["all"] | None = None,
    memory: int = MEMORY,
) -> TopK:
    """The k rows of a store that help each query most.

    Scores are inner products with the query's gradient ("dot"), these divided by both exact norms ("cosine"), or
    inner products with the query after the damped true Fisher of the store's curvature sample ("fisher"); ``SCORERS``
    has more. They are float64 and, like the ids, do not depend on how the store is cut into blocks; equal scores go to
    the lower row. Where the loss has several parts (timesteps of a diffusion loss), "dot" and "fisher" score the sums
    over them, and "cosine" is the mean over the parts of their cosines: no timestep outweighs another. Parts that are
    groups of parameters are always summed; parts that are checkpoints are scored apart and the scores summed.

    Args:
        store: a ``FeatureStore``, a compacted one, or anything like it.
        queries: features of q queries; a ``FeatureStore`` of them, with the same checkpoints and groups; or a tensor
            (q, dim), for several parts (q, parts, dim), of which only its sizes can be compared with the store and
            whose own lengths stand in for exact norms. None for a scorer of rows alone, such as "self": one answer.
        k: answers per query; all rows when the store holds fewer.
        scorer: a name of ``SCORERS``, a fitted ``Fisher`` to use again, or an instance of a class with the two methods
            of ``Scorer``. A store without a curvature sample answers "fisher" with "dot" and a warning; the result
            says which it was.
        largest: False for the rows that raise the query's loss most.
        as_set: one query instead of q: the mean of their gradients.
        damping: k of a scorer that has one, such as "fisher" (see ``Fisher``), and of ``method``; their own defaults,
            1 and ``curvature.k``, unless given.
        rescore: exact scores of a short list, ``rescore(query, rows) -> Exact`` for rows in this order: a
            ``Rescorer``, with losses and vectors per part for "cosine" over several parts. The sketch then only finds
            ``shortlist`` rows per query, and these scores decide.
        method: correct the vectors of a ``Rescorer`` for curvature first, by ``Rescorer.corrected(method)``: such as
            "fisher" or "ekfac"; the short list stays the one of the scorer. "none" takes them as they are, and so
            does None, which warns where they are plain gradients and so undo the curvature of the scorer "fisher".
        shortlist: rows per query that are scored exactly; the larger of 100 and 10 k unless given, which at dim
            1024 found .99 of the exact top 10 on a language model. "all" scores every row exactly: a pass of the model
            over the whole data set per query.
        memory: bytes to work in, beside queries and answer.

    Raises:
        SpecError: the queries were drawn by another sketch, from other parameters or another loss; or the scorer does
            not fit the store or the other arguments.
        ShapeError: k, the queries' shape or numbers are unusable, or a ``Rescorer`` has not one vector per query.
        StoreError: the store holds no rows, a row that is not finite, or lacks what the scorer needs.
    """
    if k < 1:
        raise ShapeError(f"k is {k}, expected at least 1")
    if shortlist == "all":
        shortlist = max(k, len(store))
    if shortlist is not None and (rescore is None or shortlist < k):
        raise ShapeError(f"shortlist is {shortlist} for k = {k}: give rescore= and a list of at least k rows")
    if method is not None and not isinstance(rescore, Rescorer):
        raise SpecError(f"method is {method!r} without a Rescorer to correct: give rescore=Rescorer(...)")
    prepared = prepare(store, queries, scorer, as_set=as_set, damping=damping)
    if rescore is not None and not getattr(prepared.scorer, "decidable", False):
        raise SpecError(
            f"exact gradients of one model do not decide the scorer {prepared.name!r} on this store: leave rescore "
            "out, or use scorer='fisher', 'dot' or 'cosine' on a store of one checkpoint"
        )
    if isinstance(rescore, Rescorer):
        rescore = _corrected(rescore, prepared, method, damping)
    length = k if rescore is None else shortlist or max(100, 10 * k)
    best = find(prepared, min(length, len(store)), largest=largest, memory=memory)
    if rescore is None:
        return TopK(ids_of(store, best.rows), best.scores, best.rows, prepared.name, largest)
    return _decide(prepared, rescore, best, k, largest)


def find(
    prepared: Prepared,
    k: int,
    *,
    largest: bool = True,
    together: bool = False,
    skip: np.ndarray | None = None,
    memory: int = MEMORY,
) -> Best:
    """The k best rows by the stored features: of a compacted store's codes, by the exact scan, or scored one by one.

    Args:
        largest: False for the rows of lowest score, lowest first.
        together, skip, memory: as of ``scan``.

    Returns:
        (q, m) or, together, (1, m), m = min(k, rows that are not left out).
    """
    sign = 1.0 if largest else -1.0
    store, directions = prepared.store, prepared.directions
    if directions is None:
        best = best_streamed(prepared.stream(), k, sign=sign, together=together, skip=skip)
    elif hasattr(store, "search"):
        best = store.search(sign * directions, k, weights=prepared.weights, skip=skip, together=together)
    else:
        best = scan(
            store,
            sign * directions,
            k,
            norms=prepared.norms,
            weights=prepared.weights,
            together=together,
            skip=skip,
            memory=memory,
        )
    return Best(sign * best.scores, best.rows)


def _corrected(rescore: Rescorer, prepared: Prepared, method: str | None, damping: float | None) -> Rescorer:
    """A Rescorer with a vector for each query, after the correction that was asked for."""
    assert prepared.queries is not None
    given, asked = len(rescore.vectors), len(prepared.queries.values)
    if given != asked:
        raise ShapeError(
            f"the Rescorer has {given} vectors for {asked} queries: give one for each, and with as_set=True the one "
            "mean of their gradients"
        )
    if method is not None:
        return rescore.corrected(method, k=damping)
    if prepared.name == "fisher" and not all(isinstance(v, Corrected) for v in rescore.vectors):
        logger.warning(
            "the scorer 'fisher' finds the short list, but exact scores along plain gradients decide it, without any "
            "curvature: give method='fisher' to correct them, or scorer='dot' if plain products are meant"
        )
    return rescore


def _decide(prepared: Prepared, rescore: ExactScores, found: Best, k: int, largest: bool) -> TopK:
    """Order each short list by exact scores."""
    scorer, queries = prepared.scorer, prepared.queries
    assert isinstance(scorer, LinearScorer)
    assert queries is not None
    rows, sketched = found.rows, found.scores
    k = min(k, rows.shape[1])
    chosen, tokens = [], []
    for query, listed in enumerate(rows):
        exact = rescore(query, listed)
        length = None if exact.lengths is None else exact.lengths.numpy()
        weight = scorer.exact_weights(queries, query, listed, length)
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
        ids_of(prepared.store, rows),
        np.stack([scores for _, scores in chosen]),
        rows,
        prepared.name,
        largest,
        torch.stack(pad_alike(tokens)).numpy(),
        np.take_along_axis(sketched, orders, axis=1),
    )


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
