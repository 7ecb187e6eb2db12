"""Codes searched by FAISS: it finds candidates, and what the codes stand for decides, in float64.

FAISS rounds a direction to 8 bits and sums tables of 8 bits, so its scores are off. The errors of both roundings are
known up to the signs with which the codes, after a random rotation, add them up; they exceed 8 standard deviations once
in 10^15 rows. Rows are taken until none that was left out can be among the k best by that bound, so the answer is that
of ``scan`` over what the codes stand for.

Source: FAISS, IndexRaBitQFastScan; Gao & Long 2024, RaBitQ, arXiv 2405.12497; Andre et al. 2015, fast scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradsift.engine.compaction.codes import expand, signs
from gradsift.engine.extras import require

__all__ = ["Finder"]

_PAD = np.array([1, -1, 1, -1], dtype=np.float32)
"""Signs of four more numbers of every row, which add nothing to products with four equal numbers of a direction."""

_LARGEST = 1e9
"""Length of the longest row in FAISS, which takes rows much shorter than 1 for rounding."""

_DEVIATIONS = 8.0
_FLOAT32 = 1e-5
"""Relative error of what FAISS computes in float32, and of rows too short for it over the longest one."""

_HEAD = 128
"""Longest rows that are candidates of every direction: what is left has a tighter bound."""


class Finder:
    """An index over the codes of a store, kept in memory: about 8 bytes per row more than the codes.

    Args:
        chunks: (first row, codes uint8 (m, bytes), scales float32 (m,)), in order; at least one.
        bits: per number.
        weights: float64 (n,), what rows are multiplied by; None where all are 1.
    """

    def __init__(
        self, chunks: Sequence[tuple[int, np.ndarray, np.ndarray]], bits: int, weights: np.ndarray | None
    ) -> None:
        faiss = require("faiss")
        self.weights, self._bits = weights, bits
        size = np.concatenate([scale for _, _, scale in chunks]).astype(np.float64)
        if weights is not None:
            size *= weights
        self._longest = float(np.abs(size).max(initial=0.0))
        order = np.argsort(-np.abs(size), kind="stable")
        self._head = np.sort(order[:_HEAD])
        self._rest = float(abs(size[order[_HEAD]])) if len(size) > _HEAD else 0.0
        dim = 8 * chunks[0][1].shape[1] + len(_PAD)
        self._unit = _LARGEST / dim**0.5
        index = faiss.IndexRaBitQFastScan(dim, faiss.METRIC_INNER_PRODUCT)
        index.qb = 8
        faiss.copy_array_to_vector(np.zeros(dim, dtype=np.float32), index.center)
        index.is_trained = True
        for first, codes, scale in chunks:
            factor = size[first : first + len(scale)] * (self._unit / self._longest if self._longest else 0.0)
            block = np.empty((len(codes), dim), dtype=np.float32)
            block[:, : -len(_PAD)] = signs(codes)
            block[:, -len(_PAD) :] = _PAD
            block *= factor.astype(np.float32)[:, None]
            index.add(block)
        self._index: Any = index

    def candidates(self, directions: np.ndarray, count: int) -> tuple[list[NDArray[np.int64]], np.ndarray]:
        """Rows that FAISS scores highest.

        Args:
            directions: float64 (q, k), none of them 0.
            count: rows per direction, fewer than all.

        Returns:
            for each direction row numbers, ascending; and float64 (q,), above which no row that is not among them
            can score.
        """
        asked = expand(directions, self._bits)
        length = np.linalg.norm(asked, axis=1)
        asked = asked / length[:, None]
        span = 2 * np.abs(asked).reshape(len(asked), -1, 4).sum(axis=2)
        # Sums of tables must stay below 2**16; the spans of all tables are scaled by the largest.
        padding = 255 * 1.1 * span.sum(axis=1) / 65535 / 8
        asked = np.concatenate([asked, np.repeat(padding[:, None], len(_PAD), axis=1)], axis=1).astype(np.float32)
        table = np.maximum(span.max(axis=1), 8 * padding) / 255
        low, high = asked.min(axis=1), asked.max(axis=1)
        grid = ((high - low) / 255)[:, None].astype(np.float64)
        rounded = low[:, None] + grid * np.round((asked - low[:, None]) / grid)
        noise = np.square(asked - rounded).sum(axis=1) + (span.shape[1] + 1) * table**2 / 12
        found, rows = self._index.search(asked, count)
        lowest = np.asarray(found[:, -1], dtype=np.float64)
        rest = self._rest / self._longest if self._longest else 0.0
        slack = rest * (_DEVIATIONS * np.sqrt(noise) + _FLOAT32 * np.abs(asked).sum(axis=1)) + 2 * _FLOAT32
        ceiling = (lowest / self._unit + slack) * self._longest * length
        return [np.union1d(some[some >= 0], self._head) for some in rows], ceiling
