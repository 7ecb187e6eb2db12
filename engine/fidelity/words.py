"""The verdict in words: which method to use on this data, also when that is a word search, or nothing."""

from __future__ import annotations

import numpy as np

from gradsift.engine.fidelity.intervals import interval
from gradsift.engine.fidelity.result import Evaluation, Row

__all__ = ["advice"]

_USABLE = ("baseline", "sketch", "codes", "own")
"""What can be had at any size; exact gradients of everything only serve as a measure."""


def advice(found: Evaluation) -> list[str]:
    """Sentences, the one that matters first."""
    ranked = sorted((r for r in found.rows if r.lds and r.lds.mean == r.lds.mean), key=lambda r: -r.lds.mean)  # type: ignore[union-attr]
    usable = [row for row in ranked if row.family in _USABLE and row.name != "random"]
    if not usable:
        return ["No method was measured that can be used at any size."]
    best = usable[0]
    return [*_verdict(best, usable), *_limits(found, best, ranked), *_removal(found), *_mislabels(found)]


def _verdict(best: Row, usable: list[Row]) -> list[str]:
    assert best.lds is not None
    if best.lds.interval.low <= 0:
        return [
            f"Nothing here predicts retraining: the best, {best.name}, has an LDS of {_figure(best)}, which includes "
            "0. Do not rely on any of these answers for this model."
        ]
    sentences = [f"Use {best.name} on this data: it predicts retraining best, LDS {_figure(best)}."]
    rival = next((row for row in usable if row.family != best.family and _baseline(row) != _baseline(best)), None)
    if rival is not None and rival.lds is not None:
        gap = best.lds.mean - rival.lds.mean
        low, high = interval(gap, best.lds.draws - rival.lds.draws)
        kind = "baseline" if _baseline(rival) else "gradient method"
        sentences.append(
            f"The best {kind} is {rival.name} with {_figure(rival)}: {gap:.2f} less (95 % {low:+.2f} to {high:+.2f})"
            + (
                ", which is no clear difference" + ("; it needs no gradients, so take it." if _baseline(rival) else ".")
                if low <= 0
                else "."
            )
        )
    if _baseline(best):
        sentences.append("Gradients are not worth their cost here.")
    return sentences


def _limits(found: Evaluation, best: Row, ranked: list[Row]) -> list[str]:
    assert best.lds is not None
    sentences = []
    if found.ceiling == found.ceiling:
        sentences.append(
            f"Retraining with another seed allows an LDS of {found.ceiling:.2f} at most, so {best.name} reaches "
            f"{best.lds.mean / found.ceiling:.0%} of what can be predicted."
            if found.ceiling > 0
            else "Retraining with another seed changes the order of everything: train longer, or with more seeds."
        )
    exact = next((row for row in ranked if row.family == "exact"), None)
    if exact is not None and exact.lds is not None:
        lost = exact.lds.mean - best.lds.mean
        if lost > 0:
            sentences.append(
                f"Exact gradients would give {_figure(exact)} ({exact.name}): {lost:.2f} are lost by compression."
            )
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


def _baseline(row: Row) -> bool:
    return row.family == "baseline"


def _figure(row: Row) -> str:
    assert row.lds is not None
    half = float(np.ptp(row.lds.interval)) / 2
    return f"{row.lds.mean:.2f} ± {half:.2f}"
