"""docs/methods.md is what its generator writes: no method without a figure and a brute-force test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> Any:
    spec = importlib.util.spec_from_file_location("methods_page", ROOT / "benchmarks" / "methods_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_in_step_with_the_methods_and_their_figures(made: Any) -> None:
    """Written anew by: python benchmarks/methods_page.py"""
    assert made.page(made.read()) == (ROOT / "docs" / "methods.md").read_text()


def test_every_selector_stands_beside_random_choice_and_everything(made: Any) -> None:
    page = made.page(made.read())
    selectors = page[page.index("## Selectors") : page.index("## Corrections")].split("### ")[1:]
    for section in selectors:
        assert all(f"| choice: {name} |" in section for name in ("random", "everything")) == ("| choice: " in section)
    assert any("| choice: random |" in section for section in selectors)


def test_the_record_shows_what_the_documents_claim_of_the_language_case(made: Any) -> None:
    """As it was measured, with intervals of .06: which inequalities hold is what the README rests on."""
    rows = {row["name"]: row for row in made.read() if row["case"] == "lm"}
    lds = {name: float(row["lds"]) for name, row in rows.items() if row["lds"]}
    assert lds["exact fisher, k 0.3"] >= lds["exact dot"] + 0.12
    assert min(lds["fisher, k 0.3, dim 4096"], lds["fisher, k 1, dim 4096"]) >= lds["exact dot"]
    assert min(lds["fisher, k 0.3, 512 B"], lds["fisher, k 1, 512 B"]) >= lds["exact dot"]
    assert lds["exact dot"] > lds["BM25"] + 0.1 > lds["random"] + 0.2
    two_stages = "fisher, k 1, 256 B + exact"
    assert float(rows[two_stages]["recall_of_exact"]) >= 0.97
    qld = {name: float(row["qld"]) for name, row in rows.items() if row["qld"]}
    assert qld[two_stages] >= max(qld["exact dot"], qld["BM25"])


def test_the_readme_prints_the_record(made: Any) -> None:
    rows = {row["name"]: row for row in made.read() if row["case"] == "lm"}
    readme = (ROOT / "README.md").read_text().splitlines()
    for name, of in {
        "BM25": ["BM25"],
        "gradient products, exact": ["exact dot"],
        "true Fisher, exact, k = 1 / k = .3": ["exact fisher, k 1", "exact fisher, k 0.3"],
        "true Fisher in a sketch of 4096, k = 1 / k = .3": ["fisher, k 1, dim 4096", "fisher, k 0.3, dim 4096"],
        "the same, compacted | 292": ["fisher, k 1, 512 B", "fisher, k 0.3, 512 B"],
        "the same, compacted | 148": ["fisher, k 1, 256 B", "fisher, k 0.3, 256 B"],
        "the same, of which exact gradients decide the best 100": ["fisher, k 1, 256 B + exact"],
        "random": ["random"],
    }.items():
        (line,) = [line for line in readme if line.startswith(f"| {name} |") and line.count("|") == 5]
        *_, bytes_, lds, qld = (cell.strip() for cell in line.strip("|").split("|"))
        first = rows[of[0]]
        assert bytes_.replace(",", "") == first["bytes"]
        known = [round(float(rows[each]["lds"]), 2) for each in of if rows[each]["lds"]]
        assert [float(each) for each in lds.split("/") if each] == known
        assert not qld or float(qld) == round(float(first["qld"]), 1)


def test_the_readme_prints_what_smollm2_gave(made: Any) -> None:
    rows = {row["name"]: row for row in made.read() if row["case"] == "smollm2"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"of {rows['fisher, k 1, 128 B']['bytes']} bytes per record has an LDS of" in readme
    for name, words in {
        "fisher, k 1, 128 B": "has an LDS of",
        "exact dot": f"exact gradient products of {float(rows['exact dot']['bytes']) / 1e6:.1f} MB per record",
        "hidden states": "hidden states",
        "BM25": "BM25",
    }.items():
        low, mean, high = (float(rows[name][key]) for key in ("lds_low", "lds", "lds_high"))
        assert f"{words} {mean:.2f} ± {(high - low) / 2:.2f}".replace(" 0.", " .") in readme, name


def test_a_method_without_a_figure_or_a_test_is_refused(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in made.read() if row["method"] != "fisher"]
    with pytest.raises(SystemExit, match="'fisher' has no figure"):
        made.page(rows)
    monkeypatch.setitem(made.BRUTE_FORCE["Scorers"], "dot", "test_scorers.py::test_that_is_not_there")
    with pytest.raises(SystemExit, match="'dot' names 'test_scorers"):
        made.page(made.read())
