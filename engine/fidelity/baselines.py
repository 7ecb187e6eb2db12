"""What else could have told: words, neighbours in the model's eyes, what training changed, loss, norm and chance."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from gradsift.engine.extras import require
from gradsift.engine.fidelity.bench import Bench
from gradsift.engine.fidelity.candidates import Candidate
from gradsift.kernels.errors import DataError

__all__ = ["BASELINES", "bm25"]

_WORD = re.compile(r"[^\W_]+")
"""Underscores part the words of a name in code."""


def bm25(texts: Any, queries: Any) -> np.ndarray:
    """BM25 of every query with every text, (q, n): words and numbers of any script in lower case, Lucene's variant.

    Source: Robertson & Zaragoza 2009; bm25s.
    """
    split = [_WORD.findall(text.lower()) for text in texts]
    if not any(split):
        raise DataError("the texts hold no words, which BM25 compares")
    index = require("bm25s").BM25(method="lucene")
    index.index(split, show_progress=False)
    known = set(index.vocab_dict)
    scores = np.zeros((len(queries), len(split)))
    for row, query in zip(scores, queries, strict=True):
        words = [word for word in _WORD.findall(query.lower()) if word in known]
        if words:
            row[:] = index.get_scores(words)
    return scores


def _words(bench: Bench) -> np.ndarray:
    case = bench.case
    return bm25(*_given(case.texts, case.query_texts, names="texts and query_texts"))


def _states(bench: Bench) -> np.ndarray:
    (states,) = _given(bench.case.states, names="states")
    return _cosines(*bench.embedded(states))


def _changes(bench: Bench) -> np.ndarray:
    """What training changed in an example's states, and in a query's: are the two alike?"""
    states, before = _given(bench.case.states, bench.case.before, names="states and before")
    now, then = bench.embedded(states), bench.embedded(states, before)
    return _cosines(now[0] - then[0], now[1] - then[1])


def _inputs(bench: Bench) -> np.ndarray:
    (inputs,) = _given(bench.case.inputs, names="inputs")
    return _cosines(*bench.embedded(lambda _, batch: inputs(batch)))


def _cosines(queries: Tensor, rows: Tensor) -> np.ndarray:
    cosines: Tensor = normalize(queries) @ normalize(rows).T
    return np.asarray(cosines.numpy())


def _given(*values: Any, names: str) -> tuple[Any, ...]:
    if any(value is None for value in values):
        raise DataError(f"the case has no {names}")
    return values


def _column(name: str) -> Callable[[Bench], np.ndarray]:
    def read(bench: Bench) -> np.ndarray:
        values = getattr(bench.any_store, name)
        return np.asarray(np.asarray(values, dtype=np.float64).reshape(len(values), -1).sum(axis=1))

    return read


def _for_all(read: Callable[[Bench], np.ndarray]) -> Callable[[Bench], np.ndarray]:
    """The same scores for every query."""
    return lambda bench: np.tile(read(bench), (bench.queries, 1))


def _random(bench: Bench) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(bench.queries, bench.case.examples))


BASELINES = (
    Candidate("random", "baseline", _random),
    Candidate("loss", "baseline", _for_all(_column("loss")), suspicion=_column("loss")),
    Candidate("gradient norm", "baseline", _for_all(_column("grad_norm")), suspicion=_column("grad_norm")),
    Candidate("BM25", "baseline", _words),
    Candidate("nearest inputs", "baseline", _inputs),
    Candidate("hidden states", "baseline", _states),
    Candidate("activation difference", "baseline", _changes),
)
"""Always printed beside the others. The activation difference is our reading of arXiv 2602.11079, which compares the
activations of preferred and rejected answers: without pairs, it is the cosine of what training changed in two
examples' mean hidden states."""
