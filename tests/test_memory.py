"""Memory that is freed stays with the process: the next pass does not fault it in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from gradsift.bindings.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()

def run():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 24) for _ in range(2)]  # larger than glibc ever keeps by itself
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([run() for _ in range(16)][-1])  # the heap settles after a few
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_later_passes_fault_no_page() -> None:
    faults = {
        keep: int(
            subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, check=True).stdout
        )
        for keep in (True, False)
    }
    assert faults[False] > 10 * (faults[True] + 1)
