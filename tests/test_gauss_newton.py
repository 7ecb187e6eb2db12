"""The Gauss-Newton matrix: its products equal dense J'HJ, and it is the true Fisher's expectation over labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import Mixer
from models import llama, padded_batch, with_lora
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import gradsift as gs
from gradsift.engine.answers.gradient import state_names
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.curvature.curvature import Curvature
from gradsift.engine.curvature.products import Products
from gradsift.engine.losses import Diffusion, NoiseSchedule, classification, language_model

DRAWS = 3000


def tiny() -> Any:
    return with_lora(llama(initializer_range=0.1, attn_implementation="eager"), target_modules=["v_proj"], r=2)


def jacobian(model: nn.Module, outputs: Any, modules: Any) -> Tensor:
    """d outputs / d captured parameters by reverse mode, float64 (numbers, P)."""
    captured = parameters_of(model, modules)
    names = state_names(model, captured)
    weights = {names[name]: p.detach() for name, p in captured.items()}
    blocks = jacrev(lambda at: outputs(lambda *a, **kw: functional_call(model, at, a, kw)).flatten())(weights)
    return torch.cat([blocks[names[name]].flatten(1).double() for name in captured], dim=1)


def dense_language(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """J' (diag(p) - p p') J over all counted positions."""
    rest = {key: t for key, t in batch.items() if key != "labels"}
    j = jacobian(model, lambda call: call(**rest).logits, "lora")
    with torch.no_grad():
        p = model(**rest).logits.double().softmax(-1)
    counted = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    j = j.unflatten(0, p.shape)[counted]
    h = torch.diag_embed(p[counted]) - p[counted][:, :, None] * p[counted][:, None]
    return torch.einsum("tvp,tvw,twq->pq", j, h, j)


@pytest.fixture(scope="module")
def case() -> tuple[Any, dict[str, Tensor], Tensor]:
    model, batch = tiny(), padded_batch(3, 7)
    return model, batch, dense_language(model, batch)


def test_a_product_equals_the_dense_matrix(case: Any) -> None:
    model, batch, dense = case
    parts = [{key: t[:2] for key, t in batch.items()}, {key: t[2:] for key, t in batch.items()}]
    products = Products(model, parts, language_model)
    u = torch.randn(products.flat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = dense @ u
    assert (products.gauss_newton(u) - expected).norm() <= 1e-4 * expected.norm()


def test_conjugate_gradients_reach_the_dense_solve_and_labels_do_not_matter(case: Any) -> None:
    model, batch, dense = case
    v = gs.gradient(model, {"input_ids": torch.arange(9)[None]}, language_model)
    flat = torch.cat([t.reshape(-1).double() for t in v.values()])
    answers = []
    for seed in (0, 10):
        drawn = language_model.sampled_batch(model, batch, range(seed, seed + 3))
        curvature = Curvature(model, [drawn], language_model)
        k = 0.3 / curvature.fisher(1.0).damping
        found = curvature.correct(v, "ggn", k=k, steps=60)
        expected = torch.linalg.solve(dense / 3 + found.damping * torch.eye(len(dense)), flat)
        got = torch.cat([t.reshape(-1) for t in found.values()])
        assert (got - expected).norm() <= 1e-3 * expected.norm()
        answers.append(got)
    assert (answers[0] - answers[1]).norm() <= 1e-3 * answers[0].norm()


def test_it_is_the_expectation_of_the_true_fisher(case: Any) -> None:
    """Rows of drawn labels average to it: relative error about sqrt(effective rank / draws)."""
    model, batch, dense = case
    capture = gs.Capture(model, gs.SketchSpec(kind="identity"))
    one = {key: t[:1].expand(DRAWS // 10, -1) for key, t in batch.items()}
    moment = torch.zeros_like(dense)
    exact = dense_language(model, {key: t[:1] for key, t in batch.items()})
    for start in range(0, DRAWS, DRAWS // 10):
        drawn = language_model.sampled_batch(model, one, range(start, start + DRAWS // 10))
        rows = capture(drawn, language_model).values.double()
        moment += rows.T @ rows / DRAWS
    assert abs(float(moment.trace() / exact.trace()) - 1) < 0.05
    assert (moment - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_of_a_squared_error(weighting: Any) -> None:
    loss = Diffusion(NoiseSchedule("v_prediction", 3, (0.9, 0.5, 0.1)), 3, weighting=weighting)
    model, batch = Mixer(4), {"latents": torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))}
    products = Products(model, [batch], loss, "*")
    u = torch.randn(products.flat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = loss.gauss_newton(model, batch)[0]
    weights = [loss.schedule.min_snr(t) if weighting == "min_snr" else 1.0 for t in range(3)]

    def slope(numbers: Tensor) -> Tensor:
        """The loss as a function of its outputs alone, whose second derivative is H."""
        target = outputs.detach() + 1
        errors = (numbers - target).square().mean(dim=(2, 3, 4))
        return (errors * torch.tensor(weights)).sum()

    hessian = torch.autograd.functional.hessian(slope, outputs.detach()).reshape(outputs.numel(), -1).double()
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    grads = []
    for number in outputs.flatten():
        found = torch.autograd.grad(number, [dict(model.named_parameters())[n] for n in names], retain_graph=True)
        grads.append(torch.cat([g.flatten() for g in found]))
    j = torch.stack(grads).double()
    expected = j.T @ (hessian @ (j @ u))
    assert (products.gauss_newton(u) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_products_in_float16_go_with_the_length_of_the_vector(factor: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).half()
    batch = {"input": torch.randn(6, 4).half(), "labels": torch.arange(6) % 3}
    products = Products(model, [batch], classification, "*")
    u, c = torch.randn(products.flat.size).double(), torch.randn(6).double()
    for product, vector in ((products.gauss_newton, u), (products.combine, c), (products.times, u)):
        expected = product(vector)
        assert expected.any()
        assert (product(factor * vector) / factor - expected).abs().max() <= 4e-3 * expected.abs().max()
    assert not products.gauss_newton(0 * u).any()
