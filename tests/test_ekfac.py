"""EK-FAC: dense Kronecker algebra, closed forms, low-rank sides, every kind of map, and factors that went stale."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import llama, one, padded_batch, with_lora
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.curvature.bases import Side
from gradsift.engine.curvature.curvature import Curvature
from gradsift.engine.curvature.ekfac import EkFac, fit
from gradsift.engine.losses import language_model
from gradsift.kernels.hashing import matrix_shape


def per_example(model: nn.Module, examples: Iterable[Any], loss_fn: Any, modules: Any) -> dict[str, Tensor]:
    """{name: gradients (n, p, q)} by plain autograd, float64."""
    found = [gs.gradient(model, example, loss_fn, modules) for example in examples]
    return {
        name: torch.stack([g[name].double().reshape(matrix_shape(tuple(g[name].shape))) for g in found])
        for name in found[0]
    }


def dense(fitted: EkFac, gradients: dict[str, Tensor], v: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """The same by (p q, p q) matrices: Q diag(E[(Q'g)^2]) Q' + lambda I with Q the Kronecker product of the bases."""
    out = {}
    for name, g in gradients.items():
        factor = fitted.factors[name]
        basis = torch.kron(factor.left, factor.right)
        flat = g.flatten(1)
        matrix = basis @ torch.diag((flat @ basis).square().mean(0)) @ basis.T
        matrix += damping * torch.eye(len(matrix), dtype=torch.float64)
        out[name] = torch.linalg.solve(matrix, v[name].double().reshape(-1)).reshape(v[name].shape)
    return out


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for name, t in expected.items():
        assert (got[name] - t).norm() <= tolerance * t.norm(), name


@pytest.mark.parametrize("modules", ["lora", ["*q_proj", "*down_proj"]])
def test_equals_dense_kronecker_algebra(modules: Any) -> None:
    model = with_lora(llama(initializer_range=0.1)) if modules == "lora" else llama(initializer_range=0.1)
    batch = padded_batch(6)
    fitted = fit(model, [one(batch, 0), {k: t[1:] for k, t in batch.items()}], language_model, modules)
    gradients = per_example(model, [one(batch, i) for i in range(6)], language_model, modules)
    v = gs.gradient(model, one(batch, 2), language_model, modules)
    damping = 0.1 * fitted.trace / 6
    close(fitted.solve(v, damping), dense(fitted, gradients, v, damping))
    assert fitted.trace == pytest.approx(float(sum(g.square().sum() for g in gradients.values())) / 6, rel=1e-5)
    assert fitted.examples == 6


def test_the_bases_are_those_of_the_covariances_of_inputs_and_slopes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    x, y = torch.randn(40, 5), torch.randn(40, 4)
    fitted = fit(model, [{"x": x, "y": y}], squared, "*")
    factor = fitted.factors["0.weight"]
    slopes = (model(x) - y).detach().double()
    for axes, tokens in ((factor.left, slopes), (factor.right, x.double())):
        moment = axes.T @ (tokens.T @ tokens) @ axes
        assert (moment - torch.diag(moment.diagonal())).abs().max() <= 1e-5 * moment.abs().max()
        assert (moment.diagonal().diff() <= 0).all()


def test_one_token_per_example_and_independent_slopes_are_the_exact_fisher() -> None:
    """Every x with every slope: then F = E[gg'] (x) E[xx'] exactly, and EK-FAC must be the damped inverse of F."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    inputs, slopes = torch.randn(7, 5), torch.randn(6, 3)
    x, g = inputs.repeat_interleave(6, dim=0), slopes.repeat(7, 1)
    fitted = fit(model, [{"x": x, "y": model(x).detach() - g}], squared, "*")
    rows = torch.einsum("np,nq->npq", g.double(), x.double()).flatten(1)
    v = {"0.weight": torch.randn(3, 5)}
    for damping in (1e-3, 1.0):
        matrix = rows.T @ rows / len(rows) + damping * torch.eye(15, dtype=torch.float64)
        expected = torch.linalg.solve(matrix, v["0.weight"].double().reshape(-1)).reshape(3, 5)
        close(fitted.solve(v, damping), {"0.weight": expected})
        a, s = x.double().T @ x.double() / len(x), g.double().T @ g.double() / len(g)
        closed = torch.linalg.solve(
            torch.kron(s, a) + damping * torch.eye(15, dtype=torch.float64), v["0.weight"].double().reshape(-1)
        )
        close(fitted.solve(v, damping), {"0.weight": closed.reshape(3, 5)})


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_and_transposed_maps(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=groups), nn.Tanh(), nn.Flatten())
    examples = [{"x": torch.randn(1, 4, 6, 5), "y": torch.randn(1, 6 * 3 * 3)} for _ in range(5)]
    batch = {key: torch.cat([example[key] for example in examples]) for key in ("x", "y")}
    fitted = fit(model, [batch], squared, ["0"])
    gradients = per_example(model, examples, squared, ["0"])
    v = gs.gradient(model, examples[0], squared, ["0"])
    close(fitted.solve(v, 0.3), dense(fitted, gradients, v, 0.3))


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(3, 5))
    examples = [{"x": torch.randn(1, 5), "y": torch.randn(1, 3)} for _ in range(6)]
    batch = {key: torch.cat([example[key] for example in examples]) for key in ("x", "y")}
    fitted = fit(model, [batch], squared, "*")
    v = gs.gradient(model, examples[0], squared, "*")
    close(fitted.solve(v, 0.3), dense(fitted, per_example(model, examples, squared, "*"), v, 0.3))


def test_a_wide_side_keeps_its_largest_axes_and_the_trace() -> None:
    """Inputs of rank 3 plus noise: 4 axes of 40 hold them, and outside of those F is a multiple of the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24, bias=False))
    x = torch.randn(300, 3) @ torch.randn(3, 40) * 3 + 0.1 * torch.randn(300, 40)
    y = model(x).detach() - torch.randn(300, 24)
    fitted = fit(model, [{"x": x, "y": y}], squared, "*", rank=4)
    factor = fitted.factors["0.weight"]
    assert factor.left.shape == (24, 4)
    assert factor.right.shape == (40, 4)
    true = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors[:, -3:]
    assert torch.linalg.matrix_norm(factor.right.T @ true, 2) >= 1 - 1e-4
    rows = per_example(model, [{"x": x[i : i + 1], "y": y[i : i + 1]} for i in range(300)], squared, "*")["0.weight"]
    assert fitted.trace == pytest.approx(float(rows.square().sum()) / 300, rel=1e-4)
    left, right = (torch.cat([b, complement(b)], dim=1) for b in (factor.left, factor.right))
    values = torch.cat(
        [
            torch.cat([factor.values, factor.rows[:, None].expand(4, 36)], dim=1),
            torch.cat([factor.columns[None].expand(20, 4), factor.rest.expand(20, 36)], dim=1),
        ]
    )
    squares = (left.T @ rows @ right).square().mean(0)
    for part in (np.s_[:4, :4], np.s_[:4, 4:], np.s_[4:, :4], np.s_[4:, 4:]):
        assert float(values[part].sum()) == pytest.approx(float(squares[part].sum()), rel=1e-3)
    v = torch.randn(24, 40, dtype=torch.float64)
    expected = left @ ((left.T @ v @ right) / (values + 0.01)) @ right.T
    close(fitted.solve({"0.weight": v}, 0.01), {"0.weight": expected}, 1e-9)


def test_a_side_of_zeros_is_no_error() -> None:
    side = Side(30, 4, "idle")
    side.add(torch.zeros(5, 30))
    axes = side.axes()
    torch.testing.assert_close(axes.T @ axes, torch.eye(4, dtype=torch.float64))


def test_tokens_without_a_gradient_change_nothing() -> None:
    model = with_lora(llama(initializer_range=0.1)).double()
    batch = padded_batch(3)
    wider = {key: nn.functional.pad(t, (0, 6), value=-100 if key == "labels" else 0) for key, t in batch.items()}
    v = gs.gradient(model, one(batch, 0), language_model)
    solved = [fit(model, [each], language_model).solve(v, 0.5) for each in (batch, wider)]
    close(solved[0], solved[1], 1e-8)


def test_factors_are_kept_and_refused_for_another_adapter(tmp_path: Path) -> None:
    batch, path = padded_batch(4), tmp_path / "train.zarr.ekfac"
    model = with_lora(llama(initializer_range=0.1))
    v = gs.gradient(model, one(batch, 0), language_model)
    first = Curvature(model, [batch], language_model, path=path)
    fresh = first.correct(v, "ekfac", k=1.0)
    assert sorted(p.name for p in path.iterdir()) == ["factors.json", "factors.npz"]
    used: list[int] = []
    again = Curvature(model, [batch], language_model, first.rows, path=path)
    kept = again.correct(v, "ekfac", k=1.0, progress=lambda: used.append(1))
    assert not used
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)
    weight = next(iter(parameters_of(model).values()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.001)
    with pytest.raises(gs.StoreError, match=r"another adapter .* delete .*train.zarr.ekfac"):
        Curvature(model, [batch], language_model, first.rows, path=path).correct(v, "ekfac", k=1.0)
    with torch.no_grad():
        weight.copy_(before)
    other = Curvature(model, [batch], lambda m, b: language_model(m, b), first.rows, path=path)
    with pytest.raises(gs.StoreError, match="another loss"):
        other.correct(v, "ekfac", k=1.0)
    (path / "factors.npz").write_bytes(b"PK")
    with pytest.raises(gs.StoreError, match="are damaged"):
        Curvature(model, [batch], language_model, first.rows, path=path).correct(v, "ekfac", k=1.0)


def test_factors_of_other_data_are_refused(tmp_path: Path) -> None:
    batch, path = padded_batch(4), tmp_path / "factors"
    model = with_lora(llama(initializer_range=0.1))
    Curvature(model, [batch], language_model, path=path).fit()
    other = {key: t.flip(0) for key, t in batch.items()}
    with pytest.raises(gs.StoreError, match="another sample"):
        Curvature(model, [other], language_model, path=path).fit()


def test_what_a_killed_process_left_does_not_stop_the_next_of_its_number(tmp_path: Path) -> None:
    left = tmp_path / f"factors.{os.getpid()}.tmp"
    left.mkdir()
    (left / "factors.npz").write_bytes(b"PK")
    batch, path = padded_batch(4), tmp_path / "factors"
    Curvature(with_lora(llama(initializer_range=0.1)), [batch], language_model, path=path).fit()
    assert [p.name for p in tmp_path.iterdir()] == ["factors"]


def test_no_example_is_refused() -> None:
    with pytest.raises(gs.ShapeError, match="no example"):
        fit(with_lora(llama()), [], language_model)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(1) / 2


def complement(basis: Tensor) -> Tensor:
    """Orthonormal columns of everything outside."""
    return torch.linalg.svd(basis, full_matrices=True).U[:, basis.shape[1] :]
