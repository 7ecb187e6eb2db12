"""Run the benchmarks and print one table; at full size also keep it, as CSV and in the README.

    python benchmarks/run.py             # tiny sizes: every benchmark runs and agrees with its oracle
    python benchmarks/run.py --full      # the printed figures; give it an idle machine
    python benchmarks/run.py --full -k step

A row is keyed by case, provider and machine: a rerun replaces it.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "benchmarks.csv"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: written by `make bench` -->", "<!-- end of benchmarks -->"
KEY = ("case", "provider", "machine")
MEASURED = ("baseline", "median_ms", "ratio", "ratio_spread")
FIELDS = (*KEY, *MEASURED, "commit", "torch", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the printed figures")
    parser.add_argument("-k", default="", help="only benchmarks whose name matches, as in pytest")
    options = parser.parse_args()
    rows, facts, failed = run(options.full, options.k)
    print(table(rows, facts))
    if options.full and rows:
        keep(rows)
        write_readme(rows, facts)
    return failed


def run(full: bool, match: str) -> tuple[list[dict[str, Any]], list[str], int]:
    """Rows of all benchmarks, other figures in words, and pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", f"--benchmark-json={path}"]
        command += [
            "--benchmark-columns=median",
            "--rootdir",
            str(HERE.parent),
            *map(str, sorted(HERE.glob("bench_*.py"))),
        ]
        command += ["-k", match] if match else []
        environment = {**os.environ, "GRADSIFT_BENCH": "full" if full else "quick"}
        failed = subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode
        results = json.loads(path.read_text())["benchmarks"] if path.exists() and path.stat().st_size else []
    rows = [row for result in results for row in result["extra_info"].get("rows", [])]
    facts = [fact for result in results for fact in result["extra_info"].get("facts", [])]
    return rows, facts, failed


def table(rows: list[dict[str, Any]], facts: list[str]) -> str:
    """Markdown: a section per case, then the figures that are not times."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        lines += [f"**{case}**", "", f"| | median | over {group[0]['baseline']} |", "|---|---|---|"]
        for row in group:
            name = "the same again (A/A)" if row["provider"] == "A/A" else row["provider"]
            lines.append(f"| {name} | {_time(row['median_ms'])} | {row['ratio']:.2f} ± {row['ratio_spread']:.2f} |")
        lines.append("")
    lines += [f"- {fact}" for fact in facts]
    lines += [
        "",
        f"{machine()}; torch {_version('torch')}. Ratios are medians over rounds, ± half the interquartile range.",
    ]
    return "\n".join(lines)


def keep(rows: list[dict[str, Any]]) -> None:
    """Merge into the CSV: a rerun replaces its rows."""
    where = {"machine": machine(), "commit": commit(), "torch": _version("torch"), "triton": _version("triton")}
    fresh = [{**{k: _round(row[k]) for k in ("case", "provider", *MEASURED)}, **where} for row in rows]
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            known = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    known.update({tuple(str(row[k]) for k in KEY): row for row in fresh})
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())


def write_readme(rows: list[dict[str, Any]], facts: list[str]) -> None:
    """Replace the table between the markers; a partial run leaves it alone."""
    text = README.read_text()
    if BEGIN not in text or "-k" in sys.argv:
        return
    head, rest = text.split(BEGIN, 1)
    README.write_text(f"{head}{BEGIN}\n{table(rows, facts)}\n{END}{rest.split(END, 1)[1]}")


def machine() -> str:
    """Processor, cores and threads of this machine."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """Short hash of what is checked out, with a plus sign when files differ from it."""
    git = ["git", "-C", str(HERE)]
    name = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    ).stdout
    return name + ("+" if changed.strip() else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
