"""What else could have found the records: the baselines that the demo prints beside gradsift."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["bm25", "mean_hidden_states", "neighbours", "precision", "words"]

_K1, _B = 1.2, 0.75
"""BM25's usual constants: how soon a repeated word stops counting, and how much long documents pay."""

_FUNCTION_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "all",
        "am",
        "an",
        "and",
        "any",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "him",
        "his",
        "how",
        "i",
        "if",
        "in",
        "into",
        "is",
        "it",
        "its",
        "me",
        "my",
        "no",
        "not",
        "of",
        "on",
        "one",
        "or",
        "our",
        "out",
        "she",
        "so",
        "some",
        "than",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "this",
        "those",
        "to",
        "too",
        "up",
        "us",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "why",
        "will",
        "with",
        "would",
        "you",
        "your",
    ]
)


def words(text: str, content: bool = False) -> list[str]:
    """Lower-case words and numbers of a text; with ``content``, those that are not function words."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [word for word in found if word not in _FUNCTION_WORDS] if content else found


def bm25(documents: Sequence[str], query: str) -> np.ndarray:
    """Scores of documents for a query, shape (n,).

    Source: Robertson & Zaragoza 2009, with Lucene's non-negative idf.
    """
    bags = [Counter(words(document)) for document in documents]
    lengths = np.array([bag.total() for bag in bags], dtype=float)
    damped = _K1 * (1 - _B + _B * lengths / lengths.mean())
    scores = np.zeros(len(bags))
    for word in words(query):
        counts = np.array([bag[word] for bag in bags], dtype=float)
        holding = int((counts > 0).sum())
        idf = math.log1p((len(bags) - holding + 0.5) / (holding + 0.5))
        scores += idf * counts * (_K1 + 1) / (counts + damped)
    return scores


def mean_hidden_states(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Last hidden state of each example, averaged over its tokens: float32 of shape (n, hidden), in batch order."""
    means = []
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            means.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(means)


def neighbours(rows: Tensor, queries: Tensor) -> np.ndarray:
    """Cosine of every query with every row, shape (q, n)."""
    return (normalize(queries) @ normalize(rows).T).numpy()


def precision(scores: np.ndarray, planted: np.ndarray, k: int = 10) -> float:
    """Share of planted rows among the k best of each query, averaged over queries; equal scores go to the lower row.

    Args:
        scores: shape (q, n). planted: bool, shape (n,).
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(planted[best].mean())
