"""The exact curvature-corrected vector: conjugate gradients against the dense solve, whatever preconditions them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import llama, padded_batch, with_lora
from stores import MemoryStore, random_rows
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.curvature.corrected import Corrected
from gradsift.engine.curvature.curvature import Curvature
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.curvature.registry import CORRECTIONS
from gradsift.engine.losses import language_model

K = 1.0


class Case:
    """A tiny model, its exact curvature rows, a query, and the dense answer."""

    def __init__(self) -> None:
        self.model = with_lora(llama(initializer_range=0.1))
        whole = padded_batch(12)
        drawn = language_model.sampled_batch(self.model, whole, range(12))
        self.batches = [{key: value[i : i + 5] for key, value in drawn.items()} for i in range(0, 12, 5)]
        self.rows = self.captured(gs.SketchSpec(kind="identity"))
        query = {"input_ids": torch.randint(0, 97, (1, 9), generator=torch.Generator().manual_seed(3))}
        self.v = gs.gradient(self.model, query, language_model)
        self.dense = Fisher(self.rows, K).solve(flat(self.v)[None])[0]

    def captured(self, spec: gs.SketchSpec) -> Tensor:
        capture = gs.Capture(self.model, spec)
        return torch.cat([capture(batch, language_model).values for batch in self.batches])

    def curvature(self, rows: Tensor | None = None) -> Curvature:
        return Curvature(self.model, self.batches, language_model, rows, derivatives="forward")

    def error(self, got: dict[str, Tensor]) -> float:
        return float((flat(got) - self.dense).norm() / self.dense.norm())


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1).double() for t in v.values()])


def same_lambda(rows: Tensor, like: Tensor) -> float:
    """k that gives rows the lambda which K gives others."""
    return K * Fisher(like, K).damping / Fisher(rows, K).damping


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_the_exact_gram_matrix_needs_one_step(case: Case) -> None:
    found = gs.precondition(case.v, "fisher", curvature=case.curvature(case.rows), k=K, steps=1)
    assert case.error(found) <= 1e-4
    assert (found.method, found.k, found.steps) == ("fisher", K, 1)
    assert found.damping == Fisher(case.rows, K).damping
    assert found.residuals[0] == 1.0
    assert found.residuals[1] <= 1e-4


def test_a_sketch_converges_in_few_steps_and_any_preconditioner_to_the_same(case: Case) -> None:
    sketched = case.captured(gs.SketchSpec(dim=1024))
    errors = {}
    for name, rows in {"sketch": sketched, "useless": random_rows(12, 64)}.items():
        curvature, k = case.curvature(rows), same_lambda(rows, case.rows)
        errors[name] = [case.error(curvature.correct(case.v, "fisher", k=k, steps=s)) for s in (3, 30)]
    assert errors["sketch"][1] <= 1e-4
    assert errors["useless"][1] <= 1e-4
    assert errors["sketch"][0] < errors["useless"][0]


@pytest.mark.parametrize("method", ["fisher", "ggn"])
def test_a_stopped_solve_goes_on_to_the_same_bits(case: Case, method: str, tmp_path: Path) -> None:
    curvature, kept = case.curvature(), tmp_path / "deep" / "state.npz"
    whole = curvature.correct(case.v, method, k=K, steps=4)

    class StoppedError(Exception):
        pass

    left = 13 if method == "fisher" else 12  # in a later step: each has products, before the first is R v or a count

    def stop() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise StoppedError

    with pytest.raises(StoppedError):
        curvature.correct(case.v, method, k=K, steps=4, checkpoint=kept, progress=stop)
    used: list[int] = []
    again = curvature.correct(case.v, method, k=K, steps=4, checkpoint=kept, progress=lambda: used.append(1))
    assert torch.equal(flat(again), flat(whole))
    assert again.residuals == whole.residuals
    curvature.correct(case.v, method, k=K, steps=4, progress=lambda: used.append(-1))
    assert sum(used) < 0, "the second call began again"
    assert torch.equal(flat(curvature.correct(case.v, method, k=K, steps=4, checkpoint=kept)), flat(whole))


def test_a_state_of_another_problem_is_refused(case: Case, tmp_path: Path) -> None:
    curvature, kept = case.curvature(), tmp_path / "state.npz"
    curvature.correct(case.v, "fisher", k=K, steps=1, checkpoint=kept)
    other = {name: 2 * t for name, t in case.v.items()}
    with pytest.raises(gs.StoreError, match="state of another query"):
        curvature.correct(other, "fisher", k=K, steps=1, checkpoint=kept)
    with pytest.raises(gs.StoreError, match="damping"):
        curvature.correct(case.v, "fisher", k=2 * K, steps=1, checkpoint=kept)
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(gs.StoreError, match="delete it"):
        curvature.correct(case.v, "fisher", k=K, steps=1, checkpoint=kept)


def test_the_model_is_left_as_found_and_dropout_does_not_matter(case: Case) -> None:
    model = with_lora(llama(initializer_range=0.1), lora_dropout=0.5).train()
    curvature = Curvature(model, case.batches, language_model, case.rows, derivatives="forward")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    for method in ("fisher", "ekfac", "ggn"):
        found = curvature.correct(case.v, method, k=K, steps=1)
        calm = case.curvature(case.rows).correct(case.v, method, k=K, steps=1)
        torch.testing.assert_close(flat(found), flat(calm), rtol=1e-4, atol=1e-9)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_cost_counts_the_batches_that_are_used(case: Case) -> None:
    for method in CORRECTIONS:
        curvature, used = case.curvature(case.rows), 0

        def count() -> None:
            nonlocal used
            used += 1

        cost = curvature.cost(method, steps=2, queries=2)
        for v in (case.v, {name: -t for name, t in case.v.items()}):
            curvature.correct(v, method, k=K, steps=2, progress=count)
        assert used == cost.batches == 3 * cost.passes
        assert (cost.seconds > 0) == (cost.passes > 0)


def test_rescorer_corrects_its_vectors(case: Case) -> None:
    rescorer = gs.Rescorer(
        case.model,
        lambda rows: [{key: value[list(rows)] for key, value in padded_batch(12).items()}],
        language_model.token_losses,
        [case.v],
        curvature=case.curvature(),
    )
    assert rescorer.corrected("none") is rescorer
    corrected = rescorer.corrected("ekfac", k=K)
    (v,) = corrected.vectors
    assert isinstance(v, Corrected)
    assert v.method == "ekfac"
    with pytest.raises(gs.SpecError, match="corrected by 'ekfac' already"):
        corrected.corrected("fisher", k=K)
    with pytest.raises(gs.SpecError, match="has no curvature"):
        gs.Rescorer(case.model, rescorer.fetch, language_model.token_losses, [case.v]).corrected("fisher")


@pytest.mark.parametrize(
    ("change", "method", "error"),
    [
        ({}, "newton", "method is 'newton', expected 'none', 'fisher', 'ekfac', 'ggn'"),
        ({"more": torch.ones(2)}, "fisher", "has more, which the curvature does not"),
    ],
)
def test_unusable_requests_are_refused(case: Case, change: Any, method: str, error: str) -> None:
    with pytest.raises(gs.SpecError, match=error):
        gs.precondition({**case.v, **change}, method, curvature=case.curvature(case.rows), k=K)


def test_a_zero_query_and_another_number_of_examples_are_refused(case: Case) -> None:
    with pytest.raises(gs.ShapeError, match="length 0"):
        case.curvature(case.rows).correct({name: 0 * t for name, t in case.v.items()}, k=K)
    for method in ("fisher", "ekfac", "ggn"):
        with pytest.raises(gs.ShapeError, match="hold 12 examples but there are 5 sketched rows"):
            case.curvature(random_rows(5)).correct(case.v, method, k=K)


def test_examples_are_counted_where_factors_come_from_disk(case: Case, tmp_path: Path) -> None:
    kept: Any = {"rows": case.rows, "path": tmp_path / "factors"}
    Curvature(case.model, case.batches, language_model, **kept).fit()
    fewer = Curvature(case.model, case.batches[:1], language_model, **kept)
    with pytest.raises(gs.ShapeError, match="hold 5 examples but there are 12 sketched rows"):
        fewer.correct(case.v, "ggn", k=K)


def test_rows_of_a_graph_are_taken_off_it(case: Case, tmp_path: Path) -> None:
    rows = case.rows.clone().requires_grad_()
    found = case.curvature(rows).correct(case.v, "fisher", k=K, steps=1, checkpoint=tmp_path / "state.npz")
    assert case.error(found) <= 1e-4
    assert not Fisher(rows).rows.requires_grad


class Columns(nn.Module):
    """Two maps over (tokens, examples, d), the second of them in use only on demand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        out: Tensor = self.first(x) + (self.second(x) if both else 0)
        return out


def columns(across: bool, both: bool = True) -> Any:
    """A loss of batches whose x is (examples, tokens, d), run with tokens or with examples first."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"].transpose(0, 1) if across else batch["x"]
        return torch.as_tensor(model(x, both)).sin().square().sum(dim=(0, 2) if across else (1, 2))

    return loss


@pytest.mark.parametrize("method", ["fisher", "ekfac"])
def test_examples_may_lie_along_another_axis(method: str) -> None:
    model, x = Columns(), torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    v = gs.gradient(model, {"x": x[:1]}, columns(across=False), "*")
    samples = [
        Curvature(model, [{"x": x}], columns(across), modules="*", derivatives="forward", batch_axis=1 if across else 0)
        for across in (False, True)
    ]
    found = [sample.correct(v, method, k=K) for sample in samples]
    torch.testing.assert_close(flat(found[1]), flat(found[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "ekfac"])
def test_a_map_may_be_allowed_to_idle(method: str) -> None:
    model, x = Columns(), torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    v = gs.gradient(model, {"x": x[:1]}, columns(across=False), "*")
    sample: Any = (model, [{"x": x}], columns(across=False, both=False))
    with pytest.raises(gs.CaptureError, match="allow_idle"):
        Curvature(*sample, modules="*").correct(v, method, k=K)
    found = Curvature(*sample, modules="*", allow_idle=["second"]).correct(v, method, k=K)
    torch.testing.assert_close(found["second.weight"], v["second.weight"].double() / found.damping)


def test_a_loss_without_second_derivative_is_told_what_to_use(case: Case) -> None:
    curvature = Curvature(case.model, case.batches, lambda m, b: language_model(m, b), case.rows)
    with pytest.raises(gs.SpecError, match="use method='fisher'"):
        curvature.correct(case.v, "ggn", k=K)


def test_every_correction_says_what_it_is() -> None:
    assert list(CORRECTIONS) == ["none", "fisher", "ekfac", "ggn"]
    for name, correction in CORRECTIONS.items():
        about = correction.about
        assert about.name == name
        assert all((about.formula, about.needs, about.cost, about.source, about.published))


def stored(case: Case) -> tuple[Tensor, MemoryStore, gs.Rescorer]:
    """Exact rows, a store of them, and what scores them exactly along the query."""
    data = padded_batch(12)
    rows = gs.Capture(case.model, gs.SketchSpec(kind="identity"))(data, language_model).values
    rescorer = gs.Rescorer(
        case.model,
        lambda rows: [{key: value[list(rows)] for key, value in data.items()}],
        language_model.token_losses,
        [case.v],
        "forward",
        curvature=case.curvature(case.rows),
    )
    return rows, MemoryStore(rows, curvature=case.rows), rescorer


def test_one_call_decides_by_the_corrected_vector_over_the_short_list_or_all(case: Case) -> None:
    """The order of exact scores along the dense answer, from the list of the sketch's own whitened scores."""
    rows, store, rescorer = stored(case)
    exact = rows.double() @ case.dense
    asked = flat(case.v)[None]
    whole = gs.topk(store, asked, 3, rescore=rescorer, method="fisher", shortlist="all")
    assert whole.rows[0].tolist() == exact.argsort(descending=True)[:3].tolist()
    assert whole.scores[0] == pytest.approx(exact.sort(descending=True).values[:3].numpy(), rel=1e-3)
    some = gs.topk(store, asked, 3, rescore=rescorer, method="fisher", shortlist=5)
    assert set(some.rows[0]) <= set(gs.topk(store, asked, 5).rows[0].tolist())


def test_one_damping_serves_the_sketch_and_the_exact_scores(case: Case) -> None:
    rows, store, rescorer = stored(case)
    asked = flat(case.v)[None]
    top = gs.topk(store, asked, 12, rescore=rescorer, method="fisher", damping=0.1)
    exact = (Fisher(case.rows, 0.1).solve(asked) @ rows.double().T)[0].numpy()
    np.testing.assert_allclose(top.scores[0], exact[top.rows[0]], rtol=0, atol=1e-3 * np.abs(exact).max())


def test_plain_gradients_behind_the_scorer_fisher_are_warned_of(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    _, store, rescorer = stored(case)
    asked = flat(case.v)[None]
    corrected = rescorer.corrected("ekfac", k=K)
    for scorer, vectors, method in (("dot", rescorer, None), ("fisher", rescorer, "none"), ("fisher", corrected, None)):
        gs.topk(store, asked, 3, scorer, rescore=vectors, method=method)
        assert not caplog.records
    assert gs.topk(store, asked, 3, rescore=rescorer).scorer == "fisher"
    (record,) = caplog.records
    assert "give method='fisher'" in record.getMessage()
    assert "scorer='dot'" in record.getMessage()


@pytest.mark.parametrize(("queries", "vectors", "as_set"), [(1, 2, False), (3, 2, False), (3, 3, True)])
def test_a_rescorer_with_another_number_of_vectors_than_queries_is_refused_before_any_work(
    case: Case, queries: int, vectors: int, as_set: bool
) -> None:
    def fetch(_: Any) -> Any:
        raise AssertionError("work was done")

    _, store, rescorer = stored(case)
    other = replace(rescorer, fetch=fetch, vectors=[case.v] * vectors)
    asked = flat(case.v).expand(queries, -1)
    with pytest.raises(gs.ShapeError, match=f"has {vectors} vectors for {1 if as_set else queries} queries: .*as_set"):
        gs.topk(store, asked, 3, "dot", as_set=as_set, rescore=other)
