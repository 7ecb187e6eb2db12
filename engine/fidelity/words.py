"""The verdict in words: which method to use on this data, also when that is a word search, or nothing."""

from __future__ import annotations

import numpy as np

from gradsift.engine.fidelity.intervals import interval
from gradsift.engine.fidelity.result import Evaluation, Row

__all__ = ["advice"]

_USABLE = ("baseline", "sketch", "codes", "own")
"""What can be had at any size; exact gradients of everything only serve as a measure."""


_FEWEST = 8
"""Subsets below which resamples of them say nothing of the next ones."""

_MATTERS = 0.1
"""A difference in LDS that gradients would be worth."""


def advice(found: Evaluation) -> list[str]:
    """Sentences, the one that matters first."""
    if found.subsets < _FEWEST:
        few = f"{found.subsets} random subsets are too few to tell methods apart: take at least {_FEWEST}, better 60."
        return [few, *_removal(found), *_mislabels(found)]
    ranked = [row for row in found.ranked if row.lds and row.lds.mean == row.lds.mean]
    usable = [row for row in ranked if row.family in _USABLE and row.name != "random"]
    if not usable:
        return ["No method was measured that can be used at any size."]
    equal = [row for row in usable if _no_worse(row, usable[0])]
    best = min(equal, key=lambda row: row.bytes or 0) if equal else usable[0]
    return [*_verdict(best, usable), *_limits(found, best, ranked), *_removal(found), *_mislabels(found)]


def _verdict(best: Row, usable: list[Row]) -> list[str]:
    assert best.lds is not None
    if best.lds.interval.low <= 0:
        return [
            f"Nothing here predicts retraining: {best.name} has an LDS of {_figure(best)}, which includes 0. Do not "
            "rely on any of these answers for this model."
        ]
    first = usable[0]
    rival = next((row for row in usable if _baseline(row) != _baseline(best)), None)
    if rival is None or rival.lds is None:
        return [f"Use {best.name} on this data: LDS {_figure(best)}, and {_why(best, first)}."]
    gap = best.lds.mean - rival.lds.mean
    low, high = interval(gap, best.lds.draws - rival.lds.draws)
    difference = f"a difference of {gap:+.2f} (95 %: {low:+.2f} to {high:+.2f})"
    if _baseline(best) and low < -_MATTERS:
        return [
            f"These trainings cannot tell {best.name}, LDS {_figure(best)}, from {rival.name}, {_figure(rival)}: "
            f"{difference}. Take more subsets or seeds."
        ]
    kind = "baseline without gradients" if _baseline(rival) else "method with gradients"
    sentences = [
        f"Use {best.name} on this data: LDS {_figure(best)}, and {_why(best, first)}.",
        f"The best {kind}, {rival.name}, has {_figure(rival)}: {difference}.",
    ]
    if _baseline(best):
        sentences.append("Gradients are not worth their cost on this data.")
    return sentences


def _why(best: Row, first: Row) -> str:
    if best is first:
        return "it predicts retraining best"
    return f"nothing does clearly better ({first.name}: {_lds(first):.2f})"


def _no_worse(row: Row, best: Row) -> bool:
    """Whether a row predicts something, and its difference from the best may be chance."""
    assert row.lds is not None and best.lds is not None
    return row.lds.interval.low > 0 and interval(best.lds.mean - row.lds.mean, best.lds.draws - row.lds.draws).low <= 0


def _limits(found: Evaluation, best: Row, ranked: list[Row]) -> list[str]:
    assert best.lds is not None
    sentences = []
    if found.ceiling == found.ceiling:
        sentences.append(
            f"Trainings that differ in their seed alone allow an LDS of {found.ceiling:.2f} at most."
            if found.ceiling > 0
            else "Trainings that differ in their seed alone agree in nothing: more seeds may show something."
        )
    exact = next((row for row in ranked if row.family == "exact"), None)
    if exact is not None and exact.lds is not None:
        more = exact.lds.mean - best.lds.mean
        if more > 0:
            how = "more than it" if _baseline(best) else "are lost by compression"
            sentences.append(f"Exact gradients would give {_figure(exact)} ({exact.name}): {more:.2f} {how}.")
    return sentences


def _removal(found: Evaluation) -> list[str]:
    rows = sorted((row for row in found.rows if row.qld), key=lambda row: -row.qld.mean)  # type: ignore[union-attr]
    if len(rows) < 2:
        return []
    told = ", ".join(f"{row.name} {row.qld.mean:+.3f}" for row in rows if row.qld)
    return [f"Removing each query's best examples and training again raises its loss by: {told}."]


def _mislabels(found: Evaluation) -> list[str]:
    rows = sorted((row for row in found.rows if row.auc), key=lambda row: -row.auc.value)  # type: ignore[union-attr]
    if not rows or rows[0].auc is None:
        return []
    return [f"Mislabelled examples are found best by {rows[0].name}, AUC {rows[0].auc.value:.3f}."]


def _lds(row: Row) -> float:
    return row.lds.mean if row.lds is not None else float("nan")


def _baseline(row: Row) -> bool:
    return row.family == "baseline"


def _figure(row: Row) -> str:
    assert row.lds is not None
    half = float(np.ptp(row.lds.interval)) / 2
    return f"{row.lds.mean:.2f} ± {half:.2f}"
