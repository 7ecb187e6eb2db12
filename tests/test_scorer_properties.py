"""Equalities and invariances that scorers have beyond their formulas."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gradients import ADAM, RATES, ROWS, WORLD, close, margin, queries_for, solve, streamed, unit
from stores import TABLE, MemoryStore, random_rows
from torch import Tensor

from gradsift.engine.capture.features import TableRow
from gradsift.engine.scorers.datainf import DataInf
from gradsift.engine.scorers.empirical import Trak
from gradsift.engine.scorers.protocol import Queries
from gradsift.engine.scorers.registry import SCORERS

logging.getLogger("gradsift.engine.capture.capture").setLevel(logging.ERROR)

SQUARED = {"loss": {"kind": "squared", "settings": {"measure": "squared_prediction"}}}
LEARNING = np.array(RATES)

TIMES = tuple({"timestep": t, "dim": 64} for t in (100, 500, 900))


def in_time(n: int, seed: int) -> Tensor:
    """Rows of three timesteps whose lengths differ by orders of magnitude."""
    return random_rows(n * 3, seed=seed).view(n, 3, 64) * 10.0 ** torch.arange(3)[:, None]


def test_dmin_is_the_product_of_concatenated_unit_vectors() -> None:
    rows, queries = in_time(30, 0), in_time(2, 1)
    norms = rows.norm(dim=2) * torch.linspace(0.9, 1.1, 90).view(30, 3)  # the exact ones are not the sketch's
    store = MemoryStore(rows, norms=norms, parts=TIMES)
    long = (rows.double() / norms.double()[..., None]).flatten(1)
    expected = unit(queries.double()).flatten(1) @ long.T
    close(streamed(store, queries, "dmin"), expected)
    np.testing.assert_allclose(streamed(store, queries, "dmin"), 3 * streamed(store, queries, "cosine"), rtol=1e-12)


def test_dmin_makes_one_unit_vector_of_the_groups_of_a_timestep() -> None:
    rows, queries = in_time(30, 0), in_time(2, 1)
    halves = torch.zeros(2, 64)
    halves[0, :20], halves[1, 20:] = 1, 1
    grouped = tuple({**part, "group": f"g{g}"} for part in TIMES for g in range(2))
    split = [(values[:, :, None] * halves).flatten(1, 2) for values in (rows, queries)]
    whole = streamed(MemoryStore(rows, parts=TIMES), queries, "dmin")
    np.testing.assert_allclose(streamed(MemoryStore(split[0], parts=grouped), split[1], "dmin"), whole, rtol=1e-5)


def fisher(curvature: Tensor, n: int) -> np.ndarray:
    r = curvature.double().numpy()
    return r.T @ r / len(r) + (r**2).sum(axis=1).mean() / min(len(r), n) * np.eye(r.shape[1])


def test_fisher_over_checkpoints_is_the_mean_of_each_with_its_own() -> None:
    curvature = random_rows(3 * 20, WORLD.store().rows.shape[1], seed=5).view(20, 3, -1)
    store, queries = WORLD.store(checkpoints=3, curvature=curvature), queries_for("fisher", {"checkpoints": 3})
    x, y = WORLD.exact("train").numpy(), WORLD.exact("asked").numpy()
    each = [solve(fisher(curvature[:, c], ROWS), y[:, c]) @ x[:, c].T for c in range(3)]
    close(streamed(store, queries, "fisher"), np.mean(each, axis=0))
    own = [(solve(fisher(curvature[:, c], ROWS), x[:, c]) * x[:, c]).sum(axis=1) for c in range(3)]
    close(streamed(store, None, "self_fisher"), np.mean(own, axis=0)[None])


def test_the_leverages_of_all_rows_add_up_to_the_degrees_of_freedom() -> None:
    """sum_i phi_i' (R'R/n + lambda I)^-1 phi_i / n over R's own rows is sum_k e_k / (e_k + n lambda)."""
    rows = random_rows(80)
    store = MemoryStore(rows, curvature=rows)
    squares = np.linalg.eigvalsh(rows.double().numpy().T @ rows.double().numpy())
    damping = (rows.double() ** 2).sum().item() / 80
    expected = (squares / (squares + damping)).sum()
    assert streamed(store, None, "self_fisher").sum() / 80 == pytest.approx(expected, rel=1e-6)


def test_less_does_not_depend_on_the_length_of_rows_or_learning_rates(caplog: pytest.LogCaptureFixture) -> None:
    shape = {"checkpoints": 3, "metadata": {"preconditioner": ADAM}}
    plain, queries = WORLD.store(**shape), queries_for("less", shape)
    expected = streamed(plain, queries, "less")
    scaled = WORLD.store(**shape)
    scaled.rows = scaled.rows * torch.logspace(-3, 3, ROWS)[:, None, None]
    scaled.parts = tuple({**part, "learning_rate": 7 * part["learning_rate"]} for part in plain.parts)  # type: ignore[attr-defined]
    longer = replace(queries, values=queries.values * torch.tensor([1e-3, 1.0, 1e3])[:, None, None])
    close(streamed(scaled, longer, "less"), expected)
    assert not caplog.records
    streamed(WORLD.store(checkpoints=3), queries, "less")
    assert "holds plain gradients, so 'less' compares these instead of Adam's updates" in caplog.text


def test_a_row_that_is_zero_at_a_checkpoint_adds_nothing_there() -> None:
    shape = {"checkpoints": 3, "metadata": {"preconditioner": ADAM}}
    store, queries = WORLD.store(**shape), queries_for("less", shape)
    full = streamed(store, queries, "less")
    store.rows = store.rows.clone()
    store.rows[4], store.rows[9, 1:] = 0, 0
    got = streamed(store, queries, "less")
    assert (got[:, 4] == 0).all()
    first = unit(queries.values.double())[:, 0] @ unit(store.rows[9:10].double())[:, 0].T
    close(got[:, 9], RATES[0] / LEARNING.sum() * first[:, 0])
    np.testing.assert_allclose(np.delete(got, [4, 9], axis=1), np.delete(full, [4, 9], axis=1), rtol=1e-12)


def test_datainf_is_the_exact_inverse_where_all_rows_are_equal_up_to_sign_and_never_below_it() -> None:
    """The inverse is operator convex, so that the mean of inverses is above the inverse of the mean."""
    queries = random_rows(3, seed=1)
    same = random_rows(1) * torch.tensor([1.0, -1.0, 1.0])[:, None]
    for rows, equal in ((same[:1], True), (same, True), (random_rows(20), False)):
        x, y = rows.double().numpy(), queries.double().numpy()
        exact = solve(x.T @ x / len(x) + 0.1 * (x**2).mean() * np.eye(64), y)
        scorer = DataInf()
        scorer.prepare(MemoryStore(rows, table=TABLE))
        found = scorer.directions(Queries(queries.double(), queries.double().norm(dim=1))).numpy()
        if equal:
            close(found, exact)
        else:
            assert ((found * y).sum(axis=1) > 1.01 * (exact * y).sum(axis=1)).all()


def test_a_group_without_any_gradient_changes_no_datainf_score() -> None:
    rows, queries = random_rows(20), random_rows(2, seed=1)
    part = {"group": "layer.weight", "dim": 64}
    table = (*TABLE, TableRow("other.weight", (2, 2)))
    alone = MemoryStore(rows, table=table, parts=(part,))
    padded = [torch.stack([values, torch.zeros_like(values)], dim=1) for values in (rows, queries)]
    both = MemoryStore(padded[0], table=table, parts=(part, {"group": "other", "dim": 64}))
    np.testing.assert_allclose(streamed(both, padded[1], "datainf"), streamed(alone, queries, "datainf"), rtol=1e-12)


def test_datainf_damps_by_parameters_and_not_by_the_length_of_a_sketch() -> None:
    rows, queries = random_rows(20), random_rows(2, seed=1)
    wide = MemoryStore(rows, table=(TableRow("layer.weight", (64, 640)),))
    got = streamed(wide, queries, "datainf")
    close(got, streamed(MemoryStore(rows, table=TABLE), queries, DataInf(damping=0.1 * 64 / 640 / 64)))


def test_margins_derived_from_losses_are_the_margins_own_gradients() -> None:
    """The same scores from rows of the loss "classification" and of the loss "margin", whose sign is a loss's."""
    derived = streamed(WORLD.store(), WORLD.apart("asked", False, 1), "trak")
    rows = -WORLD.exact("train", margin)[:, 0].float()
    with torch.no_grad():
        loss = -margin(WORLD.models[0], WORLD.train)
    store = MemoryStore(rows, loss=loss.numpy(), metadata={"loss": {"kind": "margin"}})
    close(streamed(store, -WORLD.exact("asked", margin)[:, 0].float(), "trak"), derived)


def test_rows_that_the_model_is_sure_of_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    store = WORLD.store()
    store.loss = store.loss.copy()  # type: ignore[attr-defined]
    store.loss[[2, 7]] = 1e-9  # type: ignore[attr-defined]
    scores = streamed(store, WORLD.apart("asked", False, 1), "trak")
    assert np.isfinite(scores).all()
    assert f"2 of {ROWS} rows have 1 - p below 1e-06" in caplog.text


def test_trak_without_damping_is_the_pseudo_inverse_of_many_rows() -> None:
    rows, queries = random_rows(400), random_rows(2, seed=1)
    expected = queries.double().numpy() @ np.linalg.pinv(rows.double().numpy()) / 1.0
    close(streamed(MemoryStore(rows), queries, Trak(damping=0)), expected)
    close(streamed(MemoryStore(rows), queries, "trak", damping=0), expected)


@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_the_order_of_the_rows_changes_nothing(scorer: str) -> None:
    shape: dict[str, Any] = {
        "less": {"checkpoints": 3, "metadata": {"preconditioner": ADAM}},
        "datainf": {"groups": True},
        "dtrak": {"metadata": SQUARED},
    }.get(scorer, {})
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    queries = queries_for(scorer, shape)
    if scorer == "dmin":
        shape = {"parts": TIMES[:1]}
    curvature = random_rows(20, WORLD.store().rows.shape[1], seed=5)
    straight, mixed = (WORLD.store(curvature=curvature, rows=rows, **shape) for rows in (slice(None), order))
    expected = streamed(straight, queries, scorer)[:, order]
    np.testing.assert_allclose(streamed(mixed, queries, scorer), expected, rtol=1e-9, atol=1e-12)
