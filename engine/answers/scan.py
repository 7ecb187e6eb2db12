"""The best rows of a store for each direction, in one streamed pass: float32 finds, float64 decides.

A float32 product of a row and a direction is off by at most gamma |row| |direction|, gamma = d u / (1 - d u) for d
terms and u = 2**-24. Every row whose score may be among the k best by that bound is scored again in float64, one row
at a time in a fixed order of summation, and ties go to the lower row. So rows and scores are the same for any block
size and number of threads.

A row of several parts is one long row here: the product with the parts of a direction is the sum over the parts.
Weights multiply rows, or parts of rows, and with them the bound.

Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradsift.kernels.errors import StoreError

__all__ = ["Best", "RowStore", "best_streamed", "scan"]

_BLOCK_ROWS = 2048
"""Rows of one product at most: enough for full speed."""

_GROUP_SCORES = 1 << 20
"""Scores that are looked at together at most: so many that looking costs little beside the products."""

_PEAKS = 64
"""Runs of rows per answer wanted, whose best rows bound the k-th best from below: few share a run."""

_EXACT_NUMBERS = 1 << 17
"""Numbers of candidates that are held in float64 at a time: 1 MiB, which stays in cache."""

_OPERAND_ROUNDING = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
"""What torch's float32 matmul precision may do to an operand before it multiplies."""


class RowStore(Protocol):
    """What retrieval needs of a store; ``FeatureStore`` is one.

    A store whose blocks take no memory of their own may say so by an attribute ``mapped = True``.
    """

    @property
    def ids(self) -> Any:
        """n ids, indexable by row."""

    @property
    def grad_norm(self) -> Any:
        """Array-like (n,), or (n, parts): exact gradient norms, NaN where not known."""

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 features (rows, dim) or (rows, parts, dim)), in order, covering every row."""


class Best(NamedTuple):
    """The best rows of each direction, best first: scores float64 and rows int64, each (g, m)."""

    scores: np.ndarray
    rows: np.ndarray


def scan(
    store: RowStore,
    directions: Tensor,
    k: int,
    *,
    norms: np.ndarray,
    weights: np.ndarray | None = None,
    together: bool = False,
    skip: np.ndarray | None = None,
    memory: int,
) -> Best:
    """The k rows of largest inner product with each direction.

    Args:
        directions: float64, shape (q, dim), or (q, parts, dim) for rows of several parts; none of length 0.
        norms: float32 (n,), or (n, parts): exact gradient norms of the rows; NaN where not known.
        weights: float64 (n,), or (n, parts): what each row, or each of its parts, is multiplied by; finite.
        together: one answer instead of q: a row's score is its largest over the directions.
        skip: bool (n,), rows that are left out.
        memory: bytes that products and candidates may take; at least one row is worked on at a time.

    Returns:
        (q, m) or, together, (1, m), m = min(k, rows that are not left out).

    Raises:
        StoreError: a score is not finite.
    """
    directions = directions.flatten(1)
    search = _Search(directions, k, norms, weights, skip, together=together)
    # Six float32 and two 8-byte numbers per score, and the rows themselves where the store copies them.
    copied = 0 if getattr(store, "mapped", False) else 4 * directions.shape[1]
    at_once = min(memory // (copied + 40 * len(directions)), _GROUP_SCORES // len(directions))
    for start, blocks in _groups(store, max(1, at_once)):
        broken = search.add(start, blocks)
        if broken is not None:
            raise StoreError(
                f"row {broken} (id {store.ids[broken]!r}) gives a score that is not finite, "
                "expected finite features: extract it again"
            )
    return Best(np.stack([p.scores for p in search.pools]), np.stack([p.rows for p in search.pools]))


def best_streamed(
    stream: Iterable[tuple[int, np.ndarray]],
    k: int,
    *,
    sign: float = 1.0,
    together: bool = False,
    skip: np.ndarray | None = None,
) -> Best:
    """The k rows of largest ``sign`` times score, from streamed scores of any kind: first row and float64 (q, rows).

    Args:
        together, skip: as of ``scan``.

    Returns:
        scores times the sign, otherwise as of ``scan``.
    """
    pool: Best | None = None
    for first, block in stream:
        scores = sign * block
        rows = np.arange(first, first + scores.shape[1])
        if together:
            scores = scores.max(axis=0, keepdims=True)
        if skip is not None:
            scores, rows = scores[:, ~skip[rows]], rows[~skip[rows]]
        every = np.broadcast_to(rows, scores.shape)
        if pool is not None:
            scores, every = np.hstack([pool.scores, scores]), np.hstack([pool.rows, every])
        order = np.lexsort((every, -scores))[:, :k]
        pool = Best(np.take_along_axis(scores, order, axis=1), np.take_along_axis(every, order, axis=1))
    if pool is None:
        raise StoreError("the store holds no rows: extract something first")
    return pool


def _groups(store: RowStore, rows: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Neighbouring blocks, cut to products of a good size, until they hold about this many rows."""
    group: list[Tensor] = []
    start = held = 0
    size = min(rows, _BLOCK_ROWS)
    for _, parted in store.blocks():
        whole = parted.flatten(1)
        for block in [whole] if whole.shape[0] <= size else whole.split(size):
            if group and held + block.shape[0] > rows:
                yield start, group
                start, held, group = start + held, 0, []
            group.append(block)
            held += block.shape[0]
    if group:
        yield start, group


class _Search:
    """The best rows so far, one pool per answer, with exact scores."""

    def __init__(
        self,
        directions: Tensor,
        k: int,
        norms: np.ndarray,
        weights: np.ndarray | None,
        skip: np.ndarray | None,
        *,
        together: bool,
    ):
        count, dim = directions.shape
        self.k, self.together, self.weights = k, together, weights
        self.allowed = None if skip is None else torch.from_numpy(~skip)
        self.exact = directions.numpy()
        length = torch.linalg.vector_norm(directions, dim=1)
        # Unit directions keep float32 products away from underflow and the bound free of |direction|.
        self.fast = (directions / length[:, None]).to(torch.float32)
        # Together, directions of different length compete, so they keep their relative lengths.
        self.relative = (length / length.max()).to(torch.float32)[:, None] if together else None
        self.scale = length.max().view(1) if together else length
        roundoff = dim * 2.0**-24
        operands = 2 * _OPERAND_ROUNDING[torch.get_float32_matmul_precision()]
        # 2**-22 covers the float32 rounding of directions, scales and thresholds.
        self.gamma = roundoff / (1 - roundoff) + operands + 2.0**-22
        # Twice the exact norm bounds the length of a sketched row with all the room that its own noise needs.
        self.slack = 2 * self.gamma * _whole(norms, weights)
        self.unknown = bool(self.slack.isnan().any())
        weight = None if weights is None else torch.from_numpy(weights).to(torch.float32)
        self.weight = weight if weight is None or weight.ndim == 1 else weight.T.contiguous()
        answers = 1 if together else count
        self.pools = [Best(np.empty(0), np.empty(0, np.int64)) for _ in range(answers)]
        self.floor = torch.full((answers,), -torch.inf)

    def add(self, start: int, blocks: list[Tensor]) -> int | None:
        """Take in neighbouring blocks; the first row whose score is not finite, if there is one.

        Most hold nothing new, so what all of them cost is kept to a few operations.
        """
        sizes = [block.shape[0] for block in blocks]
        inside = slice(start, start + sum(sizes))
        weight = None if self.weight is None else self.weight[..., inside]
        score = self._scores(blocks, sizes, weight)
        slack = self.slack[inside]
        if self.unknown:
            slack = torch.where(slack.isnan(), self.gamma * self._lengths(blocks, inside), slack)
        if self.relative is not None:
            score, slack = score * self.relative, slack * self.relative
        each = score + slack
        bottom, top = each.amin(dim=1), each.amax(dim=1)  # faster than aminmax along a dimension
        if not bool(torch.isfinite(top - bottom).all()):
            return start + int((~torch.isfinite(each)).any(dim=0).nonzero()[0])
        if self.together:
            top = top.amax(dim=0, keepdim=True)
        for g in (top >= self.floor).nonzero()[:, 0].tolist():
            self._candidates(start, blocks, g, each, slack)
        return None

    def _lengths(self, blocks: list[Tensor], inside: slice) -> Tensor:
        """Lengths of the weighted rows as they are, for rows without an exact norm."""
        weights = None if self.weights is None else self.weights[inside]
        parts = 1 if weights is None or weights.ndim == 1 else weights.shape[1]
        sizes = [torch.linalg.vector_norm(block.unflatten(1, (parts, -1)), dim=2) for block in blocks]
        return _whole(torch.cat(sizes).numpy(), weights)

    def _scores(self, blocks: list[Tensor], sizes: list[int], weight: Tensor | None) -> Tensor:
        """Float32 products (q, rows), weighted: ``weight`` is (rows,), or (parts, rows)."""
        score = torch.empty(len(self.fast), sum(sizes))
        places = score.split(sizes, dim=1)
        if weight is None or weight.ndim == 1:
            for block, place in zip(blocks, places, strict=True):
                torch.mm(self.fast, block.T, out=place)
            return score if weight is None else score.mul_(weight)
        parts = len(weight)
        fast = self.fast.chunk(parts, dim=1)
        score.zero_()
        for block, place, weights in zip(blocks, places, weight.split(sizes, dim=1), strict=True):
            for direction, part, by in zip(fast, block.chunk(parts, dim=1), weights, strict=True):
                place.addcmul_(direction @ part.T, by)
        return score

    def _candidates(self, start: int, blocks: list[Tensor], g: int, each: Tensor, slack: Tensor) -> None:
        """Score exactly what may be among the k best of this answer; ``each`` are the scores plus their slack."""
        high = each.amax(dim=0) if self.together else each[g]
        low = (each - 2 * slack).amax(dim=0) if self.together else high - 2 * slack
        if self.allowed is not None:
            low = low.where(self.allowed[start : start + len(low)], -torch.inf)
        floor = self.floor[g]
        if len(low) >= self.k:  # the k-th best of some rows is at most the k-th best of all
            width = max(1, len(low) // (_PEAKS * self.k))
            peaks = low[: len(low) // width * width].view(-1, width).amax(dim=1)
            floor = torch.maximum(floor, peaks.topk(self.k).values[-1])
        chosen = high >= floor
        local = (chosen if self.allowed is None else chosen & low.isfinite()).nonzero()[:, 0]
        if not len(local):
            return
        rows = start + local.numpy()
        if self.together:
            pair, query = (each[:, local] >= low[local]).T.nonzero(as_tuple=True)
            exact = np.full(len(local), -np.inf)
            np.maximum.at(exact, pair.numpy(), self._exactly(start, blocks, local[pair], query.numpy()))
        else:
            exact = self._exactly(start, blocks, local, np.full(len(local), g))
        self._merge(g, exact, rows)

    def _exactly(self, start: int, blocks: list[Tensor], rows: Tensor, queries: np.ndarray) -> np.ndarray:
        """Float64 scores of (row, query) pairs; each is summed alone, so its bits depend on nothing else."""
        parts = self.weights.shape[1] if self.weights is not None and self.weights.ndim == 2 else 1
        out = np.empty((len(rows), parts))
        step = max(1, _EXACT_NUMBERS // self.exact.shape[1])
        ends = np.cumsum([len(block) for block in blocks])
        which = np.searchsorted(ends, rows.numpy(), side="right")
        place = rows.numpy() - (ends - [len(block) for block in blocks])[which]
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            picked = zip(which[part].tolist(), place[part].tolist(), strict=True)
            x = torch.stack([blocks[b][i] for b, i in picked]).to(torch.float64).numpy()
            x *= self.exact[queries[part]]
            out[part] = x.reshape(len(x), parts, -1).sum(axis=2)
        if self.weights is not None:
            out *= self.weights[start + rows.numpy()].reshape(out.shape)
        return np.asarray(out.sum(axis=1))

    def _merge(self, g: int, scores: np.ndarray, rows: np.ndarray) -> None:
        pool = self.pools[g]
        scores, rows = np.concatenate([pool.scores, scores]), np.concatenate([pool.rows, rows])
        order = np.lexsort((rows, -scores))[: self.k]
        self.pools[g] = Best(scores[order], rows[order])
        if len(order) == self.k:
            self.floor[g] = scores[order[-1]] / float(self.scale[g])


def _whole(norms: np.ndarray, weights: np.ndarray | None) -> Tensor:
    """Float32 norms (n,) of weighted rows, from those of rows or of their parts."""
    if weights is not None:
        size = np.abs(weights)
        norms = norms * (size[:, None] if norms.ndim > size.ndim else size)
    sizes = torch.from_numpy(norms).to(torch.float32)
    return sizes if sizes.ndim == 1 else torch.linalg.vector_norm(sizes, dim=1)
