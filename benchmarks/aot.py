"""Compile every kernel variant for sm_80, sm_90, sm_100 and gfx942; exit 1 on a spill or a missing matrix path.

    python benchmarks/aot.py [--target sm_90]

Writes benchmarks/results/aot.csv when all targets run.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gradsift.kernels.aot import TARGETS, Compiled, compile_variant, variants

RESULTS = Path(__file__).parent / "results" / "aot.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    targets = parser.parse_args().target or list(TARGETS)
    start = time.perf_counter()
    wanted = [(target, index) for target in targets for index, _ in enumerate(variants())]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_one, *zip(*wanted, strict=True))
        rows = list(track(compiled, "kernels", len(wanted), console=Console(stderr=True)))
    table = Table(title=f"triton {triton.__version__}, {time.perf_counter() - start:.0f} s")
    for field in Compiled._fields:
        table.add_column(field)
    for row in rows:
        table.add_row(*map(str, row), style="red" if row.problem else None)
    Console(width=140).print(table)
    if set(targets) == set(TARGETS):
        with RESULTS.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("triton", *Compiled._fields))
            writer.writerows((triton.__version__, *row) for row in rows)
    bad = [row for row in rows if row.problem]
    for row in bad:
        print(f"{row.target} {row.kernel} {row.dtypes} {row.alignment} {row.block_r}: {row.problem}", file=sys.stderr)
    return 1 if bad else 0


def compile_one(target: str, index: int) -> Compiled:
    """In a process of its own, to which a variant's function cannot be sent."""
    return compile_variant(list(variants())[index], target)


if __name__ == "__main__":
    sys.exit(main())
