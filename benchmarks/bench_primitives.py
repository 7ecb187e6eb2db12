"""The choices that the CPU paths rest on, each against what was not chosen; a new torch may turn one round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paired import FULL, paired

EXAMPLES, TOKENS, WIDTH = (8, 256, 256) if FULL else (2, 8, 32)
SCORES = 100_000 if FULL else 1_000
ROUNDS = 25 if FULL else 2
REPEAT = 20 if FULL else 1


def repeated(work: Callable[[], object]) -> Callable[[], None]:
    """A call takes microseconds: so many together that a clock can tell."""

    def run() -> None:
        for _ in range(REPEAT):
            work()

    return run


def compare(benchmark: Any, case: str, chosen: Callable[[], object], others: dict[str, Callable[[], object]]) -> None:
    """Time alternatives of one primitive against the one that is used."""
    providers = {"chosen": repeated(chosen), **{name: repeated(work) for name, work in others.items()}}
    paired(benchmark, f"primitive: {case}", providers, "chosen", ROUNDS)


def test_index_add(benchmark: Any) -> None:
    size = 16 * WIDTH
    rows, out = torch.randn(EXAMPLES, size), torch.zeros(EXAMPLES, 4096)
    long = torch.randint(0, 4096, (size,))
    short = long.int()
    assert torch.equal(out.index_add(1, long, rows), out.index_add(1, short, rows))
    compare(
        benchmark,
        "index_add_ of int64 buckets",
        lambda: out.index_add_(1, long, rows),
        {"int32 buckets": lambda: out.index_add_(1, short, rows)},
    )


@pytest.mark.parametrize("rank", [4, 8, 16])
def test_orientation_of_products(benchmark: Any, rank: int) -> None:
    thin, long = torch.randn(EXAMPLES, TOKENS, rank), torch.randn(EXAMPLES, TOKENS, WIDTH)
    torch.testing.assert_close(torch.bmm(thin.mT, long).mT, torch.bmm(long.mT, thin), rtol=1e-4, atol=1e-4)
    compare(
        benchmark,
        f"per-example products thin^T long, rank {rank}",
        lambda: torch.bmm(thin.mT, long),
        {"long^T thin": lambda: torch.bmm(long.mT, thin)},
    )


def test_products_of_siblings(benchmark: Any) -> None:
    """q, k and v read one x: whether one wide product beats three."""
    x = torch.randn(EXAMPLES, TOKENS, WIDTH)
    siblings = [torch.randn(EXAMPLES, TOKENS, 16) for _ in range(3)]
    apart = [torch.bmm(u.mT, x) for u in siblings]
    torch.testing.assert_close(
        torch.cat(apart, 1), torch.bmm(torch.cat(siblings, 2).mT, x), rtol=1e-4, atol=1e-4 * TOKENS
    )
    compare(
        benchmark,
        "three products of maps that read one x",
        lambda: [torch.bmm(u.mT, x) for u in siblings],
        {"one joined product": lambda: torch.bmm(torch.cat(siblings, 2).mT, x)},
    )


def test_extremes(benchmark: Any) -> None:
    scores = torch.randn(1, SCORES)
    assert torch.equal(torch.stack(torch.aminmax(scores, dim=1)), torch.stack([scores.amin(1), scores.amax(1)]))
    compare(
        benchmark,
        "amin and amax of scores",
        lambda: (scores.amin(dim=1), scores.amax(dim=1)),
        {"aminmax": lambda: torch.aminmax(scores, dim=1)},
    )
