"""Queries and a scorer made ready for one store: both checked, the scorer prepared."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsift.engine.answers.given import Given, checked
from gradsift.engine.answers.scan import RowStore
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.scorers.protocol import LinearScorer, Queries, Rows, Scorer, name_of, product
from gradsift.engine.scorers.registry import scorer_of
from gradsift.engine.scorers.stores import blocks_of, empty_blocks, name
from gradsift.kernels.errors import ShapeError, SpecError, StoreError

__all__ = ["AnyScorer", "Prepared", "prepare"]

_PREPARED_ON = "_gradsift_prepared_on"

AnyScorer = str | Fisher | Scorer | LinearScorer
"""What users give: a name of ``SCORERS``, a fitted ``Fisher``, or an instance of their own class or of a built-in."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Queries that fit a store, with the scorer that compares them with its rows.

    Attributes:
        queries: None for a scorer that needs none.
        name: of the scorer that is used.
        norms: float32 (n,), or (n, parts): exact norms of the store's rows; NaN where not known.
        directions: float64 (q, dim), or (q, parts, dim), none of them 0; None unless the scorer is linear.
        weights: float64 (n,), or (n, parts), of a linear scorer, None where all are 1.
    """

    store: RowStore
    scorer: Scorer | LinearScorer
    queries: Queries | None
    name: str
    norms: np.ndarray
    directions: Tensor | None
    weights: np.ndarray | None

    def stream(self) -> Iterator[tuple[int, np.ndarray]]:
        """First row and float64 (q, rows): scores of all rows, block by block in one pass.

        Scores agree to rounding however the store is cut; those of ``topk`` agree to the bit.

        Raises:
            StoreError: a score is not finite, or the store is compacted and holds no rows.
            ShapeError: a scorer of one's own returns another shape.
        """
        loss = getattr(self.store, "loss", None)
        reads = getattr(self.scorer, "reads_features", True)
        for first, values in blocks_of(self.store, self.name) if reads else empty_blocks(self.store):
            inside = slice(first, first + len(values))
            rows = Rows(
                first,
                values,
                torch.from_numpy(self.norms[inside]),
                None if loss is None else torch.from_numpy(np.asarray(loss[inside])),
            )
            if self.directions is not None:
                scores = product(self.directions, self.weights, rows)
            else:
                scores = _scores(self.scorer, self.queries, rows)
            broken = (~torch.isfinite(scores)).any(dim=0)
            if bool(broken.any()):
                row = first + int(broken.nonzero()[0])
                raise StoreError(
                    f"row {row} (id {self.store.ids[row]!r}) gives a score that is not finite, "
                    "expected finite features: extract it again"
                )
            yield first, scores.numpy()


def prepare(
    store: RowStore,
    queries: Given | None,
    scorer: AnyScorer,
    *,
    as_set: bool = False,
    damping: float | None = None,
) -> Prepared:
    """Check queries against the store and prepare the scorer; arguments and errors as of ``topk``."""
    if not len(store):
        raise StoreError(f"{name(store)} holds no rows: extract something first")
    chosen = scorer_of(scorer, damping)
    called = name_of(chosen)
    adam = getattr(store, "metadata", {}).get("preconditioner")
    if adam and not getattr(chosen, "accepts_preconditioned", False):
        raise SpecError(
            f"{name(store)} holds gradients after {str(adam.get('kind', adam)).capitalize()}, which {called!r} would "
            "take for plain ones: use scorer='less', or extract without Adam moments"
        )
    asked = None
    if getattr(chosen, "needs_queries", True):
        if queries is None:
            raise ShapeError(f"there are no queries, which the scorer {called!r} compares rows with: give some")
        asked = checked(store, queries)
        if as_set:
            asked = asked.mean()
    elif queries is not None:
        raise SpecError(
            f"the scorer {called!r} scores rows alone and compares no queries: give None instead of them, or call "
            "select without targets"
        )
    _prepare_once(chosen, store)
    directions = weights = None
    if isinstance(chosen, LinearScorer) and asked is not None:
        directions, weights = chosen.directions(asked), chosen.weights()
        empty = (directions.flatten(1) == 0).all(dim=1).nonzero()
        if len(empty):
            raise ShapeError(f"query {int(empty[0])} has a zero gradient, which ranks nothing: look at its loss")
    norms = np.asarray(store.grad_norm, dtype=np.float32)
    return Prepared(store, chosen, asked, name_of(chosen), norms, directions, weights)


def _prepare_once(scorer: Scorer | LinearScorer, store: RowStore) -> None:
    """Prepare a scorer unless this very store was the last that it was prepared on: it may cost O(n dim^2)."""
    last = getattr(scorer, _PREPARED_ON, None)
    if last is not None and last() is store:
        return
    if last is not None:
        setattr(scorer, _PREPARED_ON, None)  # where prepare fails half-way, the scorer is ready for no store
    scorer.prepare(store)
    with suppress(AttributeError, TypeError):  # a class with slots, or a store that cannot be referred to weakly
        setattr(scorer, _PREPARED_ON, weakref.ref(store))


def _scores(scorer: Scorer | LinearScorer, queries: Queries | None, rows: Rows) -> Tensor:
    """What a scorer of one's own says, checked."""
    scores = torch.as_tensor(scorer.score(queries, rows)).detach().cpu().to(torch.float64)  # type: ignore[arg-type]
    expected = (1 if queries is None else len(queries.values), len(rows.values))
    if scores.shape != expected:
        raise ShapeError(
            f"the scorer {name_of(scorer)!r} returned shape {tuple(scores.shape)}, expected {expected}: one score "
            "for each query and row"
        )
    return scores
