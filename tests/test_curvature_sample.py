"""The curvature sample drawn again from its seeds, and the exact vector that it gives."""

from __future__ import annotations

import pytest
import torch
from tokens import save_adapter, save_base, write_jsonl

from gradsift.bindings.curvature import CurvatureSample
from gradsift.bindings.data import Dataset
from gradsift.bindings.models import load
from gradsift.bindings.workspace import Notes, Workspace
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.capture.capture import Capture
from gradsift.engine.extraction.extract import extract
from gradsift.engine.losses import language_model
from gradsift.kernels.spec import SketchSpec


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("space")
    base = save_base(root / "base", layers=1)
    adapter = save_adapter(root / "adapter", base)
    records = [{"text": "the cat sat on the mat " * (1 + i % 3) + f"Paris {i}"} for i in range(12)]
    data = write_jsonl(root / "train.jsonl", records)
    loaded = load(base, adapter, device="cpu")
    batches = Dataset.open(data, loaded.tokenizer).batches(block=64, batch_tokens=64)
    spec = SketchSpec(dim=1024)
    store = extract(loaded.model, batches, language_model, root / "s.zarr", spec=spec, curvature=40, progress=False)
    return Workspace(store, Notes(base, data, adapter), "cpu")


def test_the_same_labels_are_drawn_again(space: Workspace) -> None:
    sample = CurvatureSample(space)
    capture = Capture(space.model, space.store.spec)
    rows = torch.cat([capture(batch, language_model).values for batch in sample.batches])
    assert len(sample) == 40
    assert len({draw for _, draw in space.store.curvature_draws}) > 1
    torch.testing.assert_close(rows, space.store.curvature, rtol=1e-4, atol=1e-5)


def test_the_vector_is_the_dense_solve(space: Workspace) -> None:
    """Three steps of conjugate gradients, preconditioned by the sketch: 2 % is what is left of the first residual."""
    sample = CurvatureSample(space)
    capture = Capture(space.model, SketchSpec(kind="identity"))
    rows = torch.cat([capture(batch, language_model).values for batch in sample.batches]).double()
    question = space.question("the cat sat", None, None).fetch([0])
    steps: list[int] = []
    v = sample.correct(gradient(space.model, question, language_model), lambda: steps.append(1))
    found = torch.cat([v[row.name].reshape(-1) for row in capture.table])
    fisher = rows.T @ rows / len(rows) + sample._fisher.damping * torch.eye(rows.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(fisher, capture(question, language_model).values.double()[0])
    assert float((found - expected).norm() / expected.norm()) <= 0.02
    assert 0 < len(steps) <= sample.passes


def test_fewer_rows_may_be_used(space: Workspace) -> None:
    assert len(CurvatureSample(space, 10)) == 10
    assert len(CurvatureSample(space, 256)) == 40
