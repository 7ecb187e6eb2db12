"""LoBaSS: what a reference model learnt of an example, relative to what there was to learn.

Source: arXiv 2310.13008 (later DavIR).
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.scorers.stores import summed_tokens
from gradsift.engine.selectors.protocol import Choice, Targets, wanted
from gradsift.engine.selectors.rows import best_first, empty_rows
from gradsift.kernels.errors import DataError, StoreError

__all__ = ["LoBaSS"]

logger = logging.getLogger(__name__)

_LEAST = 1e-6
"""Mean loss per token, in nats, below which nothing was left to learn and the quotient is noise."""


class LoBaSS:
    """Rows by ``(L_base - L_reference) / L_base``, mean losses per token from two stores of the same data.

    Args:
        reference: store of the same examples under the reference model, tuned on all of them; matched by id.
    """

    about = Method(
        name="lobass",
        formula="(L_base - L_ref) / L_base, mean loss per token",
        needs="a second store of the same data under a reference model",
        cost="no pass, two loss columns",
        source="LoBaSS, arXiv 2310.13008",
        published="6 % of the data beats all of it on the paper's win-rate test",
    )

    needs_targets: ClassVar[bool] = False

    def __init__(self, reference: Any = None) -> None:
        if reference is None:
            raise StoreError(
                "method 'lobass' compares the losses of two models but was given one store: extract the same data "
                "with the reference model as well and give that store as reference="
            )
        self.reference = reference

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Match the two loss columns; targets and scorer have no part in it."""
        kinds = [getattr(s, "metadata", {}).get("loss", {}).get("kind") for s in (store, self.reference)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise StoreError(f"the store holds the loss {kinds[0]!r} but the reference {kinds[1]!r}: extract one alike")
        place = {key: row for row, key in enumerate(self.reference.ids)}
        ids = list(store.ids)
        missing = next((key for key in ids if key not in place), None)
        if missing is not None:
            raise StoreError(f"the reference store lacks the example {missing!r}: extract the same data for it")
        base = _per_token(store)
        self.base, self.reference_loss = base, _per_token(self.reference)[[place[key] for key in ids]]
        known = base >= _LEAST
        if not known.all():
            row = int(np.argmin(known))
            logger.warning(
                "%d rows, such as row %d (id %r), have a loss below %g per token, where nothing was left to learn: "
                "they are left out",
                int((~known).sum()),
                row,
                ids[row],
                _LEAST,
            )
        self._allowed = np.flatnonzero(known & ~empty_rows(store))
        if not len(self._allowed):
            raise DataError(f"no row has a gradient and a loss of at least {_LEAST:g} per token: nothing can be ranked")

    def choose(self, budget: int | None) -> Choice:
        """The rows that the reference learnt most of."""
        base, reference = self.base[self._allowed], self.reference_loss[self._allowed]
        scores = (base - reference) / base
        order = best_first(scores, self._allowed)[: wanted(budget, "lobass")]
        reasons = [f"loss per token {base[i]:.4g}, after tuning {reference[i]:.4g}" for i in order]
        return Choice(self._allowed[order], scores[order], reasons)


def _per_token(store: Any) -> np.ndarray:
    """Mean loss per token, float64 (n,); of the whole example where losses are no sums over tokens."""
    loss = np.asarray(store.loss, dtype=np.float64)
    tokens = summed_tokens(store)
    return loss if tokens is None else loss / np.maximum(tokens, 1)
