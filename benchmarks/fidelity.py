"""Who predicts retraining: every method on the built-in cases of `gradsift eval`, as a CSV and pictures.

    python benchmarks/fidelity.py                              # digits and lm: what `make fidelity` runs
    python benchmarks/fidelity.py --case diffusion smollm2     # longer
    python benchmarks/fidelity.py --quick            # few retrainings, nothing written: does it run?

Retrainings are kept in .fidelity/ and shared by two processes; a killed run goes on where it was. A row is keyed
by case and method: a rerun replaces the rows of its case. docs/methods.md is made from them by methods_page.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from methods_page import RESULTS, write_page
from rich.console import Console

import gradsift as gs
from gradsift.bindings.eval.cases.diffusion import diffusion_case
from gradsift.bindings.eval.cases.digits import digits_case
from gradsift.bindings.eval.cases.lm import lm_case
from gradsift.bindings.eval.cases.smollm2 import smollm2_case
from gradsift.bindings.eval.plot import draw
from gradsift.bindings.eval.render import print_evaluation
from gradsift.engine.fidelity.baselines import BASELINES
from gradsift.engine.fidelity.evaluate import REMOVED, outcomes_of
from gradsift.engine.fidelity.result import Evaluation, Row
from gradsift.engine.fidelity.selection import compare

CACHE = Path(__file__).parent.parent / ".fidelity"
CASES = {
    "digits": digits_case,
    "lm": lambda: lm_case(CACHE),
    "diffusion": lambda: diffusion_case(CACHE),
    "smollm2": smollm2_case,
}
NAMING = tuple(name for name in REMOVED if name != "fisher, k 1, 256 B")
"""Whose best examples are removed. What exact scores decide after codes is nearly what they decide alone and shares its
trainings; codes alone would take as many as another method."""

SIZES = {
    "digits": {"count": 60, "seeds": 2, "removed": NAMING, "remove_queries": 40},
    "lm": {"count": 50, "seeds": 2, "removed": NAMING, "remove_queries": 8},
    "diffusion": {"count": 24, "seeds": 2, "remove_queries": 4},
    "smollm2": {
        "count": 16,
        "seeds": 1,
        "removed": (),
        "methods": ("*dim 4096", "*B", "exact dot", "exact cosine", *(baseline.name for baseline in BASELINES)),
    },
}
"""Of each case: random halves, trainings of each, queries whose best examples are removed, if any, and which rows
unless all: a gradient of SmolLM2 takes a third of a second."""

FIELDS = (
    *("case", "name", "family", "method", "bytes", "lds", "lds_low", "lds_high", "qld", "qld_low", "qld_high"),
    *("auc", "auc_low", "auc_high", "class_recall", "recall_of_exact", "in_list_of_100", "spearman_of_exact"),
    *("loss_after_choice", "loss_low", "loss_high", "examples", "queries", "subsets", "seeds", "ceiling", "torch"),
)


def measure(name: str, quick: bool) -> Evaluation:
    case = CASES[name]()
    sizes: dict[str, Any] = {"removed": REMOVED, **SIZES[name]}
    if quick:
        sizes |= {"count": 8, "seeds": 1, "removed": ()}
    return gs.evaluate(case, cache=CACHE, **sizes)


def row_of(found: Evaluation, row: Row) -> dict[str, Any]:
    out: dict[str, Any] = {"case": found.case, "name": row.name, "family": row.family, "method": row.method}
    out["bytes"] = row.bytes
    for key, figure in (("lds", row.lds), ("qld", row.qld)):
        if figure is not None:
            out |= {key: figure.mean, f"{key}_low": figure.interval.low, f"{key}_high": figure.interval.high}
    if row.auc is not None:
        out |= {"auc": row.auc.value, "auc_low": row.auc.interval.low, "auc_high": row.auc.interval.high}
    if row.classes is not None:
        out["class_recall"] = row.classes.value
    if row.agreement is not None:
        out["recall_of_exact"] = row.agreement.recall.value
        out["in_list_of_100"] = row.agreement.listed.value
        out["spearman_of_exact"] = row.agreement.spearman
    about = {"examples": found.examples, "queries": found.queries, "subsets": found.subsets, "seeds": found.seeds}
    return {**out, **about, "ceiling": found.ceiling, "torch": torch.__version__}


def choices() -> list[dict[str, Any]]:
    """Every selector on the digits: the loss of held-out targets after training on what it chose."""
    case = digits_case()
    return [
        {
            "case": "digits",
            "name": f"choice: {one.name}",
            "family": "selector",
            "method": one.name,
            "loss_after_choice": one.mean,
            "loss_low": one.interval.low,
            "loss_high": one.interval.high,
            "examples": case.examples,
            "queries": one.queries,
            "seeds": one.seeds,
            "torch": torch.__version__,
        }
        for one in compare(case, CACHE)
    ]


def keep(case: str, rows: list[dict[str, Any]]) -> None:
    kept: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["case"] != case]
    kept = sorted([*kept, *({k: _short(v) for k, v in row.items()} for row in rows)], key=_place)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def _place(row: dict[str, Any]) -> int:
    return list(CASES).index(row["case"])


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), nargs="+", default=["digits", "lm"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--lend", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.lend:
        lend(options.lend)
        return
    console = Console()
    for name in options.case:
        torch.set_num_threads(2)
        CASES[name]()  # the base model is there before the helper looks for it
        torch.set_num_threads(1)
        with subprocess.Popen([sys.executable, __file__, "--lend", name]) as helper:
            try:
                found = measure(name, options.quick)
            finally:
                helper.kill()  # leaving the block waits for it
        print_evaluation(console, found)
        if options.quick:
            continue
        rows = [row_of(found, row) for row in found.rows]
        keep(name, [*rows, *(choices() if name == "digits" else [])])
        draw(RESULTS.with_name(f"fidelity_{name}.png"), found)
        write_page()


def lend(name: str) -> None:
    """Train what the process that began this one is going to ask for, on the other core."""
    case = CASES[name]()
    parent = os.getppid()
    outcomes_of(case, CACHE).lend(lambda: os.getppid() == parent)


if __name__ == "__main__":
    main()
