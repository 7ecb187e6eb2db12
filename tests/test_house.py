"""The house: layers import downwards only, the package list is complete, and importing is cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = {"gradsift.kernels": 0, "gradsift.engine": 1, "gradsift.bindings": 2, "gradsift": 3}
FOLDERS = {"kernels": 0, "engine": 1, "bindings": 2}


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.parent.name != "gradsift"]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    level = FOLDERS[path.relative_to(ROOT).parts[0]]
    for name in imports(path):
        package = next((p for p in LEVELS if name == p or (p != "gradsift" and name.startswith(p + "."))), None)
        assert package is None or LEVELS[package] <= level or (package == "gradsift" and level == 2), f"{path}: {name}"


def test_package_list_is_complete() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {"gradsift"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if path.parent.name != "gradsift":
                expected.add("gradsift." + ".".join(path.parent.relative_to(ROOT).parts))
    assert set(settings["packages"]) == expected


def test_import_loads_neither_zarr_nor_triton_and_costs_little_beside_torch() -> None:
    code = (
        "import json, sys, time; start = time.process_time(); import torch; middle = time.process_time(); "
        "import gradsift; gradsift.Capture; gradsift.SketchSpec; end = time.process_time(); "
        "print(json.dumps([(end - middle) / (middle - start), "
        "[m for m in ('zarr', 'triton', 'transformers', 'peft', 'rich', 'typer') if m in sys.modules]]))"
    )
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
        for _ in range(5)
    ]
    assert min(share for share, _ in runs) < 0.04  # a tenth of a second where torch itself takes two and a half
    assert all(loaded == [] for _, loaded in runs)


def test_every_public_name_exists() -> None:
    import gradsift

    assert all(getattr(gradsift, name) is not None for name in gradsift.__all__)


CORE_ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "peft", "datasets", "gguf", "matplotlib", "hypothesis", "pytest"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import gradsift as gs

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
loss = lambda model, batch: model(batch["x"]).square().sum(1)
batches = [{"x": torch.randn(3, 4)} for _ in range(4)]
store = gs.extract(model, batches, loss, sys.argv[1], spec=gs.SketchSpec(kind="identity"), modules="*", progress=False)
query = gs.Capture(model, store.spec, modules="*")(batches[2], loss)
print(gs.topk(store, query, k=1, scorer="cosine").rows[:, 0].tolist())
"""


def test_core_works_without_the_extras(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CORE_ALONE, str(tmp_path / "train.zarr")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [6, 7, 8]


def test_missing_extra_is_one_sentence_with_the_pip_command(tmp_path: Path) -> None:
    code = CORE_ALONE.split("import torch")[0] + "from gradsift.bindings.cli import main; main()"
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n')
    arguments = ["extract", "--model", "m", "--data", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "s.zarr")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "pip install 'gradsift[hf]'" in run.stderr
    assert "Traceback" not in run.stderr
