"""Which batches give the curvature sample: spread evenly over the data, the same in every run, known in one pass."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["MOST_DRAWS", "CurvaturePlan", "Draws"]

MOST_DRAWS = 8
"""Label draws per example at most: predictions of retraining gain less with every doubling."""

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 times the golden ratio's fraction."""


class Draws(NamedTuple):
    """What one batch gives: ``full`` draws of all its rows, then one of its first ``extra`` rows.

    ``first`` is the batch's first row in the store, ``rows`` how many it has.
    """

    first: int
    rows: int
    full: int
    extra: int


class CurvaturePlan:
    """Chooses whole batches, since a batch of any user's shape cannot be cut.

    Batch b has the key b * golden ratio + offset(seed) mod 1; the batches with the smallest keys are taken until the
    wanted rows are there. Any prefix of that order is spread evenly over the data (three-gap theorem), so the
    number of batches need not be known beforehand. With fewer examples than wanted rows every example is drawn
    several times, eight at most. Memory: the chosen batches.

    Args:
        wanted: rows of the sample, at least 1.
        seed: the sketch's.
    """

    def __init__(self, wanted: int, seed: int) -> None:
        self._wanted = wanted
        digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8, person=b"gradsift.curvat1")
        self._offset = int.from_bytes(digest.digest(), "little")
        self._heap: list[tuple[int, int, int, int]] = []  # (-key, batch, first, rows): the largest key on top
        self._held = 0
        self._total = 0

    def add(self, batch: int, rows: int) -> None:
        """Tell of the next batch."""
        key = (batch * _GOLDEN + self._offset) % (1 << 64)
        heapq.heappush(self._heap, (-key, batch, self._total, rows))
        self._total += rows
        self._held += rows
        while self._held - self._heap[0][3] >= self._wanted:
            self._held -= heapq.heappop(self._heap)[3]

    def finish(self) -> Mapping[int, Draws]:
        """The draws of every chosen batch, by batch number in rising order."""
        full = min(MOST_DRAWS, self._wanted // self._total)
        missing = 0 if full == MOST_DRAWS else self._wanted - full * self._total
        draws: dict[int, Draws] = {}
        for _, batch, first, rows in sorted(self._heap, reverse=True):
            extra = min(missing, rows)
            missing -= extra
            if full or extra:
                draws[batch] = Draws(first, rows, full, extra)
        return dict(sorted(draws.items()))
