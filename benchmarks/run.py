"""Run the benchmarks and print one table; at full size also keep it, as CSV and in the README.

    python benchmarks/run.py             # tiny sizes: every benchmark runs and agrees with its oracle
    python benchmarks/run.py --full      # the printed figures; give it an idle machine
    python benchmarks/run.py --full -k step

A row is keyed by case, provider and machine: a rerun replaces it, so the full table may be made in parts.
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
FACTS = HERE / "results" / "facts.csv"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- benchmarks: written by `make bench` -->", "<!-- end of benchmarks -->"
KEY = ("case", "provider", "machine")
MEASURED = ("baseline", "median_ms", "ratio", "ratio_spread")
FIELDS = (*KEY, *MEASURED, "commit", "torch", "triton")
FACT_KEY = ("benchmark", "number", "machine")
FACT_FIELDS = (*FACT_KEY, "fact", "commit", "torch", "triton")
NOT_IN_README = ("primitive: ", "scorer ", "select ", "recall@10 of the sketch's own ", "inverted file ")
"""Beginnings of cases and facts that only docs/performance.md and docs/compaction.md speak of."""

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the printed figures")
    parser.add_argument("-k", default="", help="only benchmarks whose name matches, as in pytest")
    options = parser.parse_args()
    rows, facts, failed = run(options.full, options.k)
    print(table(rows, [fact["fact"] for fact in facts]))
    if options.full and rows + facts:
        where = {"machine": machine(), "commit": commit(), "torch": _version("torch"), "triton": _version("triton")}
        write_readme(keep(RESULTS, FIELDS, KEY, rows, where), keep(FACTS, FACT_FIELDS, FACT_KEY, facts, where))
    return failed


def run(full: bool, match: str) -> tuple[list[Row], list[Row], int]:
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
    facts = [
        {"benchmark": result["name"], "number": number, "fact": fact}
        for result in results
        for number, fact in enumerate(result["extra_info"].get("facts", []))
    ]
    return rows, facts, failed


def table(rows: list[Row], facts: list[str]) -> str:
    """Markdown: a section per case, then the figures that are not times."""
    lines: list[str] = []
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in rows if row["case"] == case]
        lines += [f"**{case}**", "", f"| | median | over {group[0]['baseline']} |", "|---|---|---|"]
        for row in group:
            name = "the same again (A/A)" if row["provider"] == "A/A" else row["provider"]
            median, ratio, spread = (float(row[k]) for k in ("median_ms", "ratio", "ratio_spread"))
            lines.append(f"| {name} | {_time(median)} | {ratio:.2f} ± {spread:.2f} |")
        lines.append("")
    lines += [f"- {fact}" for fact in facts]
    lines += [
        "",
        f"{machine()}; torch {_version('torch')}. Ratios are medians over rounds, ± half the interquartile range.",
    ]
    return "\n".join(lines)


def keep(path: Path, fields: tuple[str, ...], key: tuple[str, ...], rows: list[Row], where: Row) -> list[Row]:
    """Merge into a CSV, where a rerun replaces its rows; returns all rows of this machine."""
    known: dict[tuple[str, ...], Row] = {}
    if path.exists():
        with path.open(newline="") as file:
            known = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
    for row in rows:
        fresh = {k: _round(v) for k, v in {**row, **where}.items()}
        known[tuple(str(fresh[k]) for k in key)] = fresh
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())
    return [row for row in known.values() if row["machine"] == where["machine"]]


def write_readme(rows: list[Row], facts: list[Row]) -> None:
    """Replace the table between the markers by what was kept of this machine."""
    text = README.read_text()
    if BEGIN not in text:
        return
    shown = [row for row in rows if not row["case"].startswith(NOT_IN_README)]
    head, rest = text.split(BEGIN, 1)
    body = table(shown, [fact["fact"] for fact in facts if not fact["fact"].startswith(NOT_IN_README)])
    README.write_text(f"{head}{BEGIN}\n{body}\n{END}{rest.split(END, 1)[1]}")


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
