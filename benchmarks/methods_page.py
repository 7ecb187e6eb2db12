"""docs/methods.md from what the methods say of themselves, results/fidelity.csv and the tests that hold them.

    python benchmarks/methods_page.py

A method without any figure, its own or one that was measured, or without a brute-force test, is an error.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterable
from pathlib import Path

from gradsift.engine.curvature.registry import CORRECTIONS
from gradsift.engine.methods import Method
from gradsift.engine.scorers.registry import SCORERS
from gradsift.engine.selectors.registry import SELECTORS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "fidelity.csv"
PAGE = ROOT / "docs" / "methods.md"

Row = dict[str, str]

KINDS = (
    ("Scorers", SCORERS, "How rows are compared with queries: `query --scorer`, `gs.topk(scorer=...)`."),
    ("Selectors", SELECTORS, "How rows are chosen: `select --method`, `gs.select(method=...)`."),
    ("Corrections", CORRECTIONS, "Curvature behind exact answers: `query --method`, `gs.precondition(method=...)`."),
)

_EXACT = "test_scorers.py::test_a_scorer_is_its_formula_on_exact_gradients"
_CHOSEN = "test_selectors_exact.py::test_a_store_chooses_what_plain_gradients_choose"
BRUTE_FORCE = {
    "Scorers": {
        **dict.fromkeys(("dot", "cosine", "less", "datainf", "trak", "dtrak", "self"), _EXACT),
        "fisher": "test_ridge.py::test_the_stores_fisher_gives_the_exact_moves",
        "self_fisher": "test_scorer_properties.py::test_fisher_over_checkpoints_is_the_mean_of_each_with_its_own",
        "dmin": "test_scorer_properties.py::test_dmin_is_the_product_of_concatenated_unit_vectors",
    },
    "Selectors": {
        **dict.fromkeys(("top", "bids", "groups", "diverse", "order", "vog"), _CHOSEN),
        "tarot": "test_tarot.py::test_layers_equal_a_brute_force",
        "lobass": "test_selectors_exact.py::test_lobass_reads_the_losses_of_two_stores",
    },
    "Corrections": {
        "none": "test_ridge.py::test_exact_scores_give_the_exact_moves",
        "fisher": "test_precondition.py::test_a_sketch_converges_in_few_steps_and_any_preconditioner_to_the_same",
        "ekfac": "test_ekfac.py::test_equals_dense_kronecker_algebra",
        "ggn": "test_gauss_newton.py::test_conjugate_gradients_reach_the_dense_solve_and_labels_do_not_matter",
    },
}
"""Which test compares a method with dense algebra on exact gradients."""

_CONTROLS = ("random", "everything")
"""Choices beside which every selector's figure is read."""


def page(rows: list[Row]) -> str:
    """The whole page."""
    lines = [
        "# Methods",
        "",
        "<!-- Written by `python benchmarks/methods_page.py`: edit what the classes say of themselves instead. -->",
        "",
        "What each method computes, what it needs and costs, which test holds it to dense algebra on exact gradients, "
        "and what was measured on the built-in cases of `gradsift eval` ([how to read this](fidelity.md)). Where the "
        "source says *our reading*, details were not found in the paper. `lambda` is `k trace(F)/n`.",
        "",
        *_settings(rows),
    ]
    for kind, table, about in KINDS:
        lines += [f"## {kind}", "", about, ""]
        for name, made in table.items():
            lines += [*_method(kind, name, made.about, rows), ""]
    lines += ["## Baselines", "", "Printed beside every method.", ""]
    names = dict.fromkeys(row["name"] for row in rows if row["family"] == "baseline")
    lines += _table([row for row in rows if row["name"] in names])
    return "\n".join(lines).rstrip() + "\n"


def _settings(rows: list[Row]) -> list[str]:
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        row = next(r for r in rows if r["case"] == case and r["lds"])
        ceiling = f"; trainings that differ in their seed alone allow {float(row['ceiling']):.2f}" * (
            row["ceiling"] not in ("", "nan")
        )
        lines.append(
            f"- **{case}**: {row['examples']} examples, {row['queries']} queries; LDS over {row['subsets']} random "
            f"halves x {row['seeds']} seeds{ceiling}."
        )
    return [*lines, ""] if lines else []


def _method(kind: str, name: str, about: Method, rows: list[Row]) -> list[str]:
    test = BRUTE_FORCE[kind].get(name)
    if test is None or not _exists(test):
        raise SystemExit(f"{kind}: {name!r} names {test!r} as its brute-force test: expected one that exists")
    families = {"Scorers": ("exact", "sketch", "codes"), "Selectors": ("selector",), "Corrections": ("exact",)}[kind]
    measured = [row for row in rows if row["method"] == _measured_as(kind, name) and row["family"] in families]
    if not measured and about.published.startswith("none found"):
        raise SystemExit(f"{kind}: {name!r} has no figure: expected one that was published or one in {RESULTS}")
    if measured and kind == "Selectors":
        measured += [row for row in rows if row["family"] == "selector" and row["method"] in _CONTROLS]
    lines = [f"### {name}", "", f"`{about.formula}`", ""]
    lines += [f"- **needs** {about.needs}", f"- **cost** {about.cost}", f"- **source** {about.source}"]
    lines += [f"- **published** {about.published}", f"- **brute force** `tests/{test}`", ""]
    return lines + (_table(measured) if measured else ["No figure of our own: the built-in cases do not serve it."])


def _measured_as(kind: str, name: str) -> str:
    """A correction called "none" is exact plain products."""
    return "dot" if (kind, name) == ("Corrections", "none") else name


def _table(rows: Iterable[Row]) -> list[str]:
    rows = list(rows)
    columns = (
        ("LDS", lambda row: _around(row, "lds", 2)),
        ("QLD", lambda row: _around(row, "qld", 3)),
        ("AUC", lambda row: _around(row, "auc", 3)),
        ("class", lambda row: _number(row, "class_recall", 2)),
        ("of exact top 10", lambda row: _number(row, "recall_of_exact", 2)),
        ("in list of 100", lambda row: _number(row, "in_list_of_100", 3)),
        ("loss after training on the choice", lambda row: _around(row, "loss_after_choice", 2, "loss")),
    )
    shown = [(title, read) for title, read in columns if any(read(row) for row in rows)]
    lines = ["| case | row | " + " | ".join(title for title, _ in shown) + " |", "|---|---|" + "---|" * len(shown)]
    lines += [f"| {r['case']} | {r['name']} | " + " | ".join(read(r) for _, read in shown) + " |" for r in rows]
    return lines


def _number(row: Row, key: str, digits: int) -> str:
    return f"{float(row[key]):.{digits}f}" if row[key] else ""


def _around(row: Row, key: str, digits: int, ends: str | None = None) -> str:
    if not row[key]:
        return ""
    half = (float(row[f"{ends or key}_high"]) - float(row[f"{ends or key}_low"])) / 2
    return f"{float(row[key]):.{digits}f} ± {half:.{digits}f}"


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / "tests" / file
    return path.is_file() and any(
        isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(ast.parse(path.read_text()))
    )


def read() -> list[Row]:
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write_page() -> None:
    PAGE.write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    write_page()
