"""The language-model demo over several seeds, so that nobody need take one run's word for it.

    python benchmarks/demo_lm.py --quick --seeds 0 1 2 3 4

One row per seed and method in results/demo_lm.csv: precision@10 of five questions together and of one alone, how
many of the named records were planted, and the loss of the planted answers after each training.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

from rich.console import Console

from gradsift.bindings.demo.lm import play
from gradsift.bindings.demo.quick import quick_case
from gradsift.bindings.demo.smollm import smollm_case
from gradsift.bindings.hush import hush

RESULTS = Path(__file__).parent / "results" / "demo_lm.csv"


def rows_of(form: str, seed: int) -> list[dict[str, object]]:
    case = quick_case(seed) if form == "quick" else smollm_case(seed)
    with tempfile.TemporaryDirectory() as folder:
        found = play(case, Path(folder), Console(quiet=True))
    losses = {f"loss_{name.replace(' ', '_')}": round(b["loss"], 3) for name, b in found["behaviours"].items()}
    shared = {"planted": found["planted"], "named_planted": found["named_planted"], **losses}
    return [
        {
            "form": form,
            "seed": seed,
            "method": method,
            "precision_together": round(together, 3),
            "precision_alone": round(found["precision_at_10_one_question"][method], 3),
            **shared,
            "seconds": round(found["seconds"]),
            "threads": found["threads"],
            "torch": found["torch"],
        }
        for method, together in found["precision_at_10"].items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    hush()
    form = "quick" if options.quick else "smollm2"
    kept: list[dict[str, object]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if r["form"] != form or int(r["seed"]) not in options.seeds]
    for seed in options.seeds:
        new = rows_of(form, seed)
        kept += new
        print(f"{form} seed {seed}:", *(f"{r['method']} {r['precision_together']}" for r in new), sep="  ")
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(new[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)


if __name__ == "__main__":
    main()
