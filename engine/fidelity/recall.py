"""How much of an answer survives: the share of the true best that is found, and of answers of the query's class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradsift.engine.fidelity.intervals import Interval, bootstrap, interval
from gradsift.engine.fidelity.lds import spearman
from gradsift.kernels.errors import ShapeError

__all__ = ["Agreement", "Share", "agreement", "best_rows", "class_recall"]


@dataclass(frozen=True, slots=True)
class Share:
    """A share, averaged over queries.

    Attributes:
        value: the mean. chance: what random scores would give.
        interval: of the mean, by a bootstrap over queries.
    """

    value: float
    chance: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Agreement:
    """How scores agree with exact ones of the same formula; no retraining is needed for this.

    Attributes:
        recall: of the exact top k among the top k.
        listed: of the exact top k among a short list; re-scoring that list exactly finds so much.
        spearman: rank correlation over all examples, mean over queries.
    """

    recall: Share
    listed: Share
    spearman: float


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k highest scores of each query, int64 (q, k); equal scores: the lower row first."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def agreement(scores: np.ndarray, exact: np.ndarray, k: int = 10, shortlist: int = 100) -> Agreement:
    """Compare scores with exact ones.

    Args:
        scores, exact: (q, n). k: of the top k. shortlist: rows that would be scored exactly.

    Raises:
        ShapeError: shapes differ or k exceeds n.
    """
    n = scores.shape[1]
    if scores.shape != exact.shape or not 0 < k <= n:
        raise ShapeError(
            f"scores {scores.shape} and exact ones {exact.shape} with k = {k}: expected equal (q, n), n >= k"
        )
    shortlist = min(shortlist, n)
    wanted = best_rows(exact, k)
    return Agreement(
        _share(_found(wanted, best_rows(scores, k)), k / n),
        _share(_found(wanted, best_rows(scores, shortlist)), shortlist / n),
        float(np.nanmean(spearman(scores.T, exact.T))),
    )


def class_recall(scores: np.ndarray, labels: np.ndarray, query_labels: np.ndarray, k: int = 10) -> Share:
    """Share of each query's top k that is of its class; not proof of influence, for looks alone find this too.

    Args:
        scores: (q, n). labels: (n,). query_labels: (q,).
    """
    labels, query_labels = np.asarray(labels), np.asarray(query_labels)
    if scores.shape != (len(query_labels), len(labels)) or not 0 < k <= len(labels):
        raise ShapeError(
            f"scores {scores.shape}, {len(labels)} labels and {len(query_labels)} labels of queries with k = {k}: "
            "expected one label per row and column"
        )
    same = labels[best_rows(scores, k)] == query_labels[:, None]
    return _share(same.mean(axis=1), float((labels == query_labels[:, None]).mean()))


def _found(wanted: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Share of each row of ``wanted`` that is in the same row of ``listed``, (q,)."""
    return np.array([np.isin(w, found).mean() for w, found in zip(wanted, listed, strict=True)])


def _share(per_query: np.ndarray, chance: float) -> Share:
    draws = bootstrap(len(per_query), lambda rows: float(per_query[rows].mean()))
    value = float(per_query.mean())
    return Share(value, chance, interval(value, draws, 0.0, 1.0))
