"""The curvature sample drawn again from its seeds, and the exact vector that it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokens import save_adapter, save_base, write_jsonl

from gradsift.bindings.curvature import choose_damping, correct, curvature_of
from gradsift.bindings.data import Dataset
from gradsift.bindings.models import load
from gradsift.bindings.workspace import Notes, Workspace
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.capture.capture import Capture
from gradsift.engine.curvature.conjugate import Checkpoint
from gradsift.engine.curvature.curvature import Curvature
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
    sample = curvature_of(space)
    capture = Capture(space.model, space.store.spec)
    rows = torch.cat([capture(batch, language_model).values for batch in sample.batches])
    assert len(sample) == 40
    assert len({draw for _, draw in space.store.curvature_draws}) > 1
    torch.testing.assert_close(rows, space.store.curvature, rtol=1e-4, atol=1e-5)


def test_the_vector_is_the_dense_solve(space: Workspace) -> None:
    """After four steps of conjugate gradients, preconditioned by the sketch, 1 % is left of the first residual."""
    sample = curvature_of(space)
    capture = Capture(space.model, SketchSpec(kind="identity"))
    rows = torch.cat([capture(batch, language_model).values for batch in sample.batches]).double()
    question = space.question("the cat sat", None, None).fetch([0])
    used: list[int] = []
    v = sample.correct(gradient(space.model, question, language_model), progress=lambda: used.append(1))
    found = torch.cat([v[row.name].reshape(-1) for row in capture.table])
    fisher = rows.T @ rows / len(rows) + v.damping * torch.eye(rows.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(fisher, capture(question, language_model).values.double()[0])
    assert float((found - expected).norm() / expected.norm()) <= 0.01
    assert 0 < len(used) <= sample.uses("fisher")


def test_fewer_rows_may_be_used_and_factors_of_fewer_are_fitted_again(space: Workspace, tmp_path: Path) -> None:
    few, all_of_them = curvature_of(space, 10), curvature_of(space, 256)
    assert (len(few), len(all_of_them)) == (10, 40)
    assert few.fit().examples == 10
    assert curvature_of(space, 5).fit().examples == 10
    assert all_of_them.fit().examples == 40
    assert curvature_of(space, 10).fit().examples == 40
    assert [path.name for path in space.store.path.parent.glob("*.ekfac")] == ["s.zarr.ekfac"]


def test_a_stopped_query_goes_on_and_its_states_go_when_it_is_done(
    space: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = [
        gradient(space.model, space.question(text, None, None).fetch([0]), language_model)
        for text in ("the cat sat", "Paris 3")
    ]
    sample, states = curvature_of(space), space.store.path.with_name("s.zarr.solving")
    solved = Curvature.correct

    def fails(self: Curvature, v: Any, *args: Any, **settings: Any) -> Any:
        if v is vectors[1]:
            raise KeyboardInterrupt
        return solved(self, v, *args, **settings)

    monkeypatch.setattr(Curvature, "correct", fails)
    with pytest.raises(KeyboardInterrupt):
        correct(sample, space, vectors, "fisher")
    assert "curvature  fisher: at most 18 passes over the sample (90 batches), about" in capsys.readouterr().err
    assert len(list(states.iterdir())) == 1
    monkeypatch.undo()
    read: list[Any] = []
    load_state = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: read.append(load_state(self)) or read[-1])
    again = correct(sample, space, vectors, "fisher")
    assert [state is not None for state in read] == [True, False]
    assert not states.exists()
    for v, found in zip(vectors, again, strict=True):
        whole = sample.correct(v, "fisher")
        assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_unseen_examples_are_compared_per_token(
    space: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts twice as long lose twice as much without being harder: the damping must not change for it."""
    sample = curvature_of(space)
    losses = torch.tensor(space.store.loss).double() * 1.2
    tokens = torch.tensor(space.store.loss_tokens)
    found = sample.choose_k(space.store, losses, tokens)
    assert sample.choose_k(space.store, 2 * losses, 2 * tokens).k == pytest.approx(found.k)
    assert found.observed == pytest.approx(0.2 * float(space.store.loss.mean()), rel=1e-4)
    with monkeypatch.context() as means:
        means.setitem(space.store.metadata["loss"], "sums_tokens", False)
        assert sample.choose_k(space.store, losses, 2 * tokens).observed == pytest.approx(found.observed)
    unseen = space.questions(write_jsonl(tmp_path / "unseen.jsonl", [{"text": f"on the mat {i}"} for i in range(9)]))
    by_file = choose_damping(sample, space, unseen)
    assert sample.k == by_file.k
    with torch.no_grad():
        batch = unseen.fetch(range(9))
        per_token = float(language_model(space.model, batch).sum()) / int(language_model.loss_tokens(batch).sum())
    mean = float(space.store.loss.sum()) / int(tokens.sum())
    assert by_file.observed == pytest.approx((per_token - mean) * float(tokens.double().mean()), rel=1e-3)
