"""Paired timing: every provider once per round, in turn, so that a ratio compares neighbours in time.

The baseline runs twice in each round; the ratio of the two is what the machine calls equal (A/A), and a ratio below
that spread says nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from gradsift.bindings.memory import keep_freed_memory

__all__ = ["FULL", "paired"]

FULL = os.environ.get("GRADSIFT_BENCH", "quick") == "full"
"""Whether sizes are those of the printed figures; otherwise tiny, to see that the benchmark runs."""

_AGAIN = "A/A"


def paired(
    benchmark: Any, case: str, providers: Mapping[str, Callable[[], object]], baseline: str, rounds: int = 7
) -> dict[str, float]:
    """Time providers side by side.

    Args:
        benchmark: the pytest-benchmark fixture; one of its rounds runs every provider once.
        case: what is timed, with its sizes; the key of the rows.
        providers: name -> what to call; the baseline among them.
        rounds: measured rounds, after one that warms up.

    Returns:
        name -> median over rounds of (its time / the baseline's time in the same round); "A/A" for the baseline
        against itself. Medians, ratios and spread go to ``benchmark.extra_info["rows"]``.
    """
    keep_freed_memory()  # as the command line does: otherwise page faults are what is compared
    calls = {**providers, _AGAIN: providers[baseline]}
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = iter(range(10**9))

    def one_round() -> None:
        names = list(calls)
        shift = next(turn) % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=1)
    times = {name: values[1:] for name, values in times.items()}
    ratios = {name: [t / b for t, b in zip(values, times[baseline], strict=True)] for name, values in times.items()}
    benchmark.extra_info["rows"] = [
        {
            "case": case,
            "provider": name,
            "baseline": baseline,
            "median_ms": 1e3 * statistics.median(times[name]),
            "ratio": statistics.median(ratios[name]),
            "ratio_spread": _spread(ratios[name]),
        }
        for name in calls
    ]
    return {name: statistics.median(values) for name, values in ratios.items()}


def _spread(values: list[float]) -> float:
    """Half the distance between the quartiles."""
    if len(values) < 4:
        return max(values) - min(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
