"""Top-k over a store against torch.matmul and torch.topk on a matrix that fits in memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paired import FULL, paired
from torch import Tensor

import gradsift as gs
from gradsift.engine.answers.search import MEMORY

ROWS, DIM, BLOCK = (100_000, 4096, 1024) if FULL else (2_000, 256, 256)
ROUNDS = 9 if FULL else 2
K = 10


class Setup:
    """Rows in a file that is mapped, as a store's are; both providers read the same pages."""

    mapped = True

    def __init__(self, folder: Path) -> None:
        path = folder / "rows.npy"
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, (ROWS, DIM))
        generator = np.random.default_rng(0)
        for start in range(0, ROWS, BLOCK):
            part = mapped[start : start + BLOCK]
            part[:] = generator.standard_normal(part.shape, np.float32)
        mapped.flush()
        del mapped
        # Copy on write: torch wants memory that may be written to, and nothing here writes.
        self.rows = torch.from_numpy(np.load(path, mmap_mode="c"))
        self.grad_norm = torch.linalg.vector_norm(self.rows, dim=1).numpy()
        self.ids = range(ROWS)

    def __len__(self) -> int:
        return ROWS

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, ROWS, BLOCK):
            yield start, self.rows[start : start + BLOCK]


def anonymous_peak(work: Callable[[], object]) -> int:
    """Bytes of memory of its own, beside mapped files, that work takes at most; sampled every millisecond."""

    def now() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed would be taken again without being seen
    before, samples, done = now(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            samples.append(now() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(samples)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("search"))


@pytest.mark.parametrize("queries", [1, 8, 64])
def test_topk(benchmark: Any, setup: Setup, queries: int) -> None:
    asked = torch.randn(queries, DIM, generator=torch.Generator().manual_seed(1))

    def plain() -> Tensor:
        return torch.topk(torch.matmul(asked, setup.rows.T), K).indices

    def streamed() -> np.ndarray:
        return gs.topk(setup, asked, K, "dot").rows

    assert (streamed() == plain().numpy()).mean() >= 0.99  # float32 may exchange neighbours
    peak = anonymous_peak(streamed)
    assert peak <= MEMORY + 8 * queries * (DIM + 2 * K)
    case = f"top-{K} of {ROWS:,} x {DIM}, {queries} queries"
    benchmark.extra_info["facts"] = [f"{case}: {peak / 2**20:.0f} MiB of memory beside the mapped rows"]
    paired(benchmark, case, {"matmul + topk": plain, "gradsift": streamed}, "matmul + topk", ROUNDS)
