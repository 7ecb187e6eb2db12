"""DataInf: for each group of parameters the mean of inverses in place of the inverse of the mean."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.capture.features import TableRow
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import Parts, parts_of
from gradsift.engine.scorers.protocol import LinearScorer, Queries
from gradsift.engine.scorers.stores import blocks_of, known_norms, name
from gradsift.kernels.errors import SpecError, StoreError

__all__ = ["DataInf", "group_sizes"]


class DataInf(LinearScorer):
    """``sum_l <r_l(v), g_l,i>`` with ``r_l(v) = (1/n) sum_k (g_l,k g_l,k' + lambda_l I)^-1 v_l``, in closed form.

    ``lambda_l = damping * mean of |g_l,k|^2 / d_l``: ``d_l`` is the number of parameters of the group, not of numbers
    in its sketch. Norms are the exact ones; inner products are the sketch's, so that their products are biased by
    O(1/dim). The authors' code reports the opposite sign, which is positive for harm.

    Args:
        damping: 0.1 as the authors have it.
    """

    about = Method(
        name="datainf",
        formula="sum_l <r_l, g_l,i>, r_l = (v_l - mean_k <v_l, g_l,k> g_l,k / (lambda_l + |g_l,k|^2)) / lambda_l, "
        "lambda_l = .1 mean |g_l|^2 / d_l",
        needs="one part per parameter (extract with groups='parameter')",
        cost="2 passes, O(q L dim)",
        source="DataInf, arXiv 2310.00902 (ykwon0407/DataInf)",
        published="no table of AUC found in text; LDS of plain dot in our own softmax regression",
    )

    _store: RowStore
    _parts: Parts
    _squares: np.ndarray
    _damping: np.ndarray

    def __init__(self, damping: float = 0.1) -> None:
        if not damping > 0:
            raise SpecError(f"damping is {damping}, expected a positive multiple of the mean squared entry such as 0.1")
        self._relative = damping

    def prepare(self, store: RowStore) -> None:
        """As of ``Scorer``; only norms are read.

        Raises:
            StoreError: groups are not kept apart, or are not those of its table; a norm is not known.
        """
        self._store, self._parts = store, parts_of(store)
        if self._parts.units > 1:
            raise StoreError(
                f"{name(store)} keeps {self._parts.units} timesteps or checkpoints apart but 'datainf' takes one "
                "gradient in groups: extract it with groups='parameter' at one checkpoint, parts of the loss summed"
            )
        sizes = self._sizes(store)
        norms = known_norms(store, "'datainf' damps by: extract the store again with one backward pass per example")
        self._squares = norms.reshape(len(norms), -1) ** 2
        self._damping = self._relative * self._squares.mean(axis=0) / sizes

    def directions(self, queries: Queries) -> Tensor:
        """As of ``LinearScorer``; one pass over the rows."""
        asked = queries.values.reshape(len(queries.values), len(self._parts), -1).transpose(0, 1)  # (groups, q, dim)
        total = torch.zeros_like(asked)
        for first, block in blocks_of(self._store, "datainf"):
            rows = block.to(torch.float64).reshape(len(block), len(self._parts), -1).transpose(0, 1)
            divisor = torch.from_numpy(self._damping + self._squares[first : first + len(block)]).T
            share = torch.where(divisor > 0, 1 / divisor, 0.0)
            total += (asked @ rows.transpose(1, 2) * share[:, None]) @ rows
        damping = torch.from_numpy(self._damping)[:, None, None]
        # A group without any gradient has no damping and no score.
        solved = torch.where(damping > 0, (asked - total / len(self._store)) / damping, 0.0)
        return solved.transpose(0, 1).reshape(queries.values.shape)

    def _sizes(self, store: RowStore) -> np.ndarray:
        """Parameters of each group, d_l."""
        table = getattr(store, "table", ())
        joint = self._parts.groups == (None,)
        if None in self._parts.groups and not (joint and len(table) == 1):
            raise StoreError(
                f"{name(store)} holds joint rows of {len(table)} parameters but 'datainf' needs a row of each: "
                "extract it with groups='parameter'"
            )
        try:
            return group_sizes(table, self._parts.groups)
        except KeyError as error:
            raise StoreError(
                f"{name(store)} has a group {error.args[0]!r} without parameters in its table: extract it again"
            ) from None


def group_sizes(table: Sequence[TableRow], groups: Sequence[str | None]) -> np.ndarray:
    """Parameters of each group, float64: a parameter, all parameters of a map, or, for None, all.

    Raises:
        KeyError: a group has none.
    """
    sizes = []
    for group in groups:
        own = [row for row in table if group is None or row.name == group or row.name.startswith(f"{group}.")]
        if not own:
            raise KeyError(group)
        sizes.append(sum(prod(row.shape) for row in own))
    return np.array(sizes, dtype=np.float64)
