"""Peak memory of capture against that of the step: one process per provider, so that nothing is left of another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paired import FULL

PROVIDERS = ("step", "extraction", "tap")


def peak_bytes(provider: str) -> int:
    """Bytes that the provider's second run adds at its peak to the resident memory before it."""
    command = [sys.executable, str(Path(__file__)), provider]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed goes back
    environment = {**os.environ, **returned}
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def measure(provider: str) -> int:
    from bench_step import Setup

    setup = Setup()
    getattr(setup, provider)()  # caches of kernels, buckets and probes are made once
    for parameter in setup.trainable.values():
        parameter.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
    before = _status("VmRSS")
    getattr(setup, provider)()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_peak_memory(benchmark: Any) -> None:
    rounds = 5 if FULL else 1
    peaks: dict[str, list[int]] = {provider: [] for provider in PROVIDERS}

    def one_round() -> None:
        for provider in PROVIDERS:
            peaks[provider].append(peak_bytes(provider))

    benchmark.pedantic(one_round, rounds=rounds, iterations=1)
    median = {provider: sorted(values)[len(values) // 2] for provider, values in peaks.items()}
    if not FULL:
        return  # a tiny pass may need no page that the process does not have
    assert all(value > 0 for value in median.values())
    benchmark.extra_info["facts"] = [
        f"peak memory over the step's ({median['step'] / 2**20:.0f} MiB): "
        + ", ".join(f"{p} {median[p] / median['step']:.2f}" for p in PROVIDERS[1:])
        + f"; medians of {rounds} processes each"
    ]


if __name__ == "__main__":
    sys.stdout.write(str(measure(sys.argv[1])))
