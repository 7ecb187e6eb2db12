"""The diffusion loss: diffusers' own targets, a measurement that depends on its settings alone, both derivatives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import CHANNELS, MAPS, SIZE, Mixer, ddpm_loss, images, take, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.func import functional_call

import gradsift as gs
from gradsift.engine.losses import Diffusion, NoiseSchedule
from gradsift.engine.losses.counter import counter_key, counter_normal
from gradsift.kernels.errors import DataError, ShapeError, SpecError

K = 3


def noise_of(*key: int | str, shape: tuple[int, ...] = (CHANNELS, SIZE, SIZE)) -> Tensor:
    numbers = counter_normal(np.array([counter_key("noise", *key)]), int(np.prod(shape)))
    return torch.from_numpy(numbers.astype(np.float32)).view(shape)


def steps_of(count: int, total: int = 1000) -> list[int]:
    return [int((k + 0.5) * total / count) for k in range(count)]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("family", [DDPMScheduler, DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_loss_is_that_of_diffusers_training_scripts(family: Any, prediction: str) -> None:
    if family is PNDMScheduler and prediction == "sample":
        prediction = "epsilon"  # it knows no other
    scheduler = family(prediction_type=prediction, beta_schedule="scaled_linear")
    trained = DDPMScheduler(prediction_type=prediction, beta_schedule="scaled_linear")
    model, batch = tiny_unet(), images(2)
    expected = torch.zeros(2)
    for k, step in enumerate(steps_of(K)):
        noise, t = noise_of(7, k).expand(2, -1, -1, -1), torch.full((2,), step)
        noisy = trained.add_noise(batch["latents"], noise, t)
        velocity = trained.get_velocity(batch["latents"], noise, t)
        target = {"epsilon": noise, "v_prediction": velocity, "sample": batch["latents"]}[prediction]
        expected += (model(noisy, t, batch["class_labels"]).sample - target).square().mean(dim=(1, 2, 3)).detach()
    loss = Diffusion(NoiseSchedule.of(scheduler), K, seed=7)
    torch.testing.assert_close(loss(model, batch).detach(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 3.0, "use_dynamic_shifting": True}])
def test_flow_matching_is_that_of_diffusers_training_scripts(options: Any) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    schedule = NoiseSchedule.of(scheduler)
    model, batch = tiny_unet(), images(2)
    expected = torch.zeros(2)
    for k, step in enumerate(steps_of(K)):
        noise, t = noise_of(0, k).expand(2, -1, -1, -1), scheduler.timesteps[999 - step].expand(2)
        assert schedule.timestep(step) == pytest.approx(float(t[0]), rel=1e-6)
        noisy = scheduler.scale_noise(batch["latents"], t, noise)
        velocity = noise - batch["latents"]
        expected += (model(noisy, t, batch["class_labels"]).sample - velocity).square().mean(dim=(1, 2, 3)).detach()
    torch.testing.assert_close(Diffusion(schedule, K)(model, batch).detach(), expected, rtol=2e-5, atol=0)
    used, sampling = schedule, FlowMatchEulerDiscreteScheduler(**options)
    sampling.set_timesteps(5, mu=0.7)
    assert NoiseSchedule.of(sampling) == used


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_weights_are_those_of_diffusers_training_scripts(prediction: str, zero_snr: bool) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    schedule = NoiseSchedule.of(scheduler)
    found = torch.tensor([schedule.min_snr(step) for step in range(1000)])
    snr = compute_snr(scheduler, torch.arange(1000))
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(1000)}[prediction]
    expected = snr.clamp_max(5.0) / divisor
    if zero_snr and prediction == "epsilon":
        assert expected[-1].isnan()
        expected[-1] = 1.0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    plain, weighted = (Diffusion(schedule, 10, weighting=w) for w in ("none", "min_snr"))
    model, batch = tiny_unet(), images(1)
    assert expected[50] not in (0.0, 1.0)
    each = [float(plain.part(k)(model, batch).detach()) for k in range(10)]
    total = sum(each[k] * float(expected[step]) for k, step in enumerate(steps_of(10)))
    assert float(weighted(model, batch).detach()) == pytest.approx(total, rel=1e-4)
    assert float(weighted.part(0)(model, batch).detach()) == pytest.approx(each[0] * float(expected[50]), rel=1e-4)


def test_timesteps() -> None:
    def timesteps(**options: Any) -> list[Any]:
        parts = ddpm_loss(parts=True, **options).parts
        assert parts is not None
        return [part["timestep"] for part in parts]

    assert timesteps(measurements=4) == [125, 375, 625, 875]
    assert timesteps(measurements=1) == [500]
    assert timesteps(measurements=1000) == list(range(1000))
    # DMin's own, with its T = 10
    assert timesteps(measurements=10, timesteps="cubic") == [999, 998, 991, 972, 935, 874, 783, 656, 487, 270]


def test_squared_prediction_is_d_traks() -> None:
    model, batch = tiny_unet(), images(2)
    scheduler = DDPMScheduler()
    expected = torch.zeros(2)
    for k, step in enumerate(steps_of(K)):
        t = torch.full((2,), step)
        noisy = scheduler.add_noise(batch["latents"], noise_of(0, k).expand(2, -1, -1, -1), t)
        expected += model(noisy, t, batch["class_labels"]).sample.square().mean(dim=(1, 2, 3)).detach()
    found = ddpm_loss(measurements=K, measure="squared_prediction")(model, batch)
    torch.testing.assert_close(found.detach(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("noise", ["shared", "per_example"])
@pytest.mark.parametrize("parts", [False, True])
def test_features_do_not_depend_on_the_batch(noise: Any, parts: bool) -> None:
    model, batch = tiny_unet(), images(5, ids=["a", "b", "c", "d", "e"])
    loss = ddpm_loss(measurements=2, noise=noise, parts=parts)
    capture = gs.Capture(model, gs.SketchSpec(dim=256), modules=MAPS)
    per_example = 2 if parts else 1

    def rows(*places: int) -> Tensor:
        return capture(take(batch, places), loss).values.view(len(places), per_example, -1)

    together = rows(0, 1, 2, 3, 4)
    scale = float(together.norm(dim=-1).max())
    for places in ([4, 2, 0], [3], [1, 4], [0, 1, 2, 3, 4]):
        assert float((rows(*places) - together[places]).abs().max()) <= 1e-5 * scale


def test_noise_follows_the_id_or_nobody() -> None:
    model, batch = tiny_unet(), images(2)
    batch["latents"][1], batch["class_labels"][1] = batch["latents"][0], batch["class_labels"][0]
    shared = ddpm_loss(measurements=K)(model, batch).detach()
    torch.testing.assert_close(shared[0], shared[1], rtol=1e-5, atol=0)
    mine = ddpm_loss(measurements=K, noise="per_example")
    own = mine(model, {**batch, "ids": ["x", "y"]}).detach()
    assert abs(float(own[0] - own[1])) > 1e-3
    swapped = mine(model, {**batch, "ids": ["y", "x"]}).detach()
    torch.testing.assert_close(swapped, own.flip(0), rtol=1e-5, atol=0)
    seen: list[Tensor] = []

    def record(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        seen.append(noisy)
        return noisy

    ddpm_loss(measurements=1, noise="per_example", seed=9, predict=record)(model, {**batch, "ids": [11, -2]})
    expected = torch.stack([noise_of(9, 11, 0), noise_of(9, -2, 0)])
    noisy = DDPMScheduler().add_noise(batch["latents"], expected, torch.tensor([500, 500]))
    torch.testing.assert_close(seen[0], noisy)


@pytest.mark.parametrize("measure", ["loss", "squared_prediction"])
@pytest.mark.parametrize("parts", [False, True])
def test_positions_sum_to_the_loss(measure: Any, parts: bool) -> None:
    model, batch = tiny_unet(), images(3)
    loss = ddpm_loss(measurements=2, measure=measure, parts=parts)
    with torch.no_grad():
        positions, total = loss.token_losses(model, batch), loss(model, batch)
        alone = torch.stack([loss.part(k)(model, batch) for k in range(2)], dim=1)
    assert positions.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(positions.sum(dim=(1, 2)), alone.sum(dim=1))
    torch.testing.assert_close(total, alone.flatten() if parts else alone.sum(dim=1))


def exact_gauss_newton(loss: Diffusion, model: nn.Module, batch: Any) -> Tensor:
    """Sum over measurements of (2 w / D) J'J, J the Jacobian of the prediction, at one example."""
    weights = {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}
    seen: list[tuple[Tensor, Tensor]] = []

    def record(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        seen.append((noisy, timesteps))
        return noisy

    with torch.no_grad():
        Diffusion.from_settings(loss.settings, predict=record)(model, batch)
    noisy, timesteps = seen[0]
    total: Tensor = torch.zeros(())
    for x, t in zip(noisy, timesteps, strict=True):

        def predicted(at: Any, x: Tensor = x, t: Tensor = t) -> Tensor:
            return functional_call(model, at, (x[None], t[None]))[0].flatten()  # type: ignore[no-any-return]

        blocks = torch.func.jacrev(predicted)(weights)
        jacobian = torch.cat([b.flatten(1) for b in blocks.values()], dim=1)
        weight = loss.schedule.min_snr(int(t)) if loss.weighting == "min_snr" else 1.0
        total = total + 2 * weight / x.numel() * jacobian.T @ jacobian
    return total


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_sampled_gradients_have_the_gauss_newton_matrix_as_second_moment(weighting: Any) -> None:
    draws = 4000
    loss = Diffusion(NoiseSchedule("v_prediction", K, (0.9, 0.5, 0.1)), K, weighting=weighting)
    model, one = Mixer(4), {"latents": torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))}
    batch = {"latents": one["latents"].expand(draws, -1, -1, -1)}
    model.inner.bias.requires_grad_(False)
    model.outer.bias.requires_grad_(False)

    class Sampled:
        owners = staticmethod(loss.owners)

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return loss.sampled(model, batch, range(draws))

    rows = gs.Capture(model, gs.SketchSpec(kind="identity"), modules="*")(batch, Sampled()).values
    moment, exact = rows.T @ rows / draws, exact_gauss_newton(loss, model, one)
    assert float((moment - exact).norm() / exact.norm()) < 0.05
    assert float(rows.mean(dim=0).norm() / exact.trace().sqrt()) < 0.05


def test_sampled_does_not_depend_on_the_batch_and_can_be_kept() -> None:
    model, batch = tiny_unet(), images(3)
    loss = ddpm_loss(measurements=2)
    with torch.no_grad():
        found = loss.sampled(model, batch, [5, 6, 7])
        assert found.shape == (3,)
        torch.testing.assert_close(loss.sampled(model, take(batch, [2]), [7]), found[2:])
        torch.testing.assert_close(loss(model, loss.sampled_batch(model, batch, [5, 6, 7])), found, rtol=0, atol=0)
        assert ddpm_loss(measurements=2, parts=True).sampled(model, batch, [5, 6, 7]).shape == (6,)
    with pytest.raises(ShapeError, match="got 2 seeds for 3 examples"):
        loss.sampled(model, batch, [5, 6])


def test_sampled_survives_a_central_difference() -> None:
    model, batch = tiny_unet(), images(3)
    loss = ddpm_loss(measurements=2)
    kept = loss.sampled_batch(model, batch, [1, 2, 3])
    v = gs.gradient(model, take(batch, [0]), loss, modules=MAPS)
    found = gs.rescore(model, kept, lambda m, b: loss(m, b)[:, None], v, "central", modules=MAPS).scores
    for i in range(3):
        own = gs.gradient(model, take(kept, [i]), loss, modules=MAPS)
        exact = sum(float((own[name].double() * v[name].double()).sum()) for name in v)
        assert float(found[i]) == pytest.approx(exact, abs=1e-3 * float(found.abs().max()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("measure", ["loss", "squared_prediction", "sampled"])
def test_forward_mode_is_backward_mode(measure: Any) -> None:
    model, batch = Mixer(CHANNELS * SIZE * SIZE).double(), images(2)
    del batch["class_labels"]
    loss = ddpm_loss(measurements=2, measure="loss" if measure == "sampled" else measure)
    if measure == "sampled":
        batch = loss.sampled_batch(model, batch, [1, 2])
    weight = model.inner.weight
    along = torch.randn_like(weight)

    def positions(at: Tensor) -> Tensor:
        found: Tensor = functional_call(Positions(model, loss), {"model.inner.weight": at}, (batch,))
        return found

    _, tangent = torch.func.jvp(positions, (weight.detach(),), (along,))
    for i in range(2):
        (slope,) = torch.autograd.grad(loss(model, take(batch, [i])).sum(), weight)
        torch.testing.assert_close(tangent[i].detach().sum(), (slope * along).sum(), rtol=1e-9, atol=1e-12)


class Positions(nn.Module):
    """The losses of positions as a forward."""

    def __init__(self, model: nn.Module, loss: Diffusion) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss.token_losses(self.model, batch)


def test_settings_and_kinds_go_together() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"measurements": 2},
        {"seed": 1},
        {"noise": "per_example"},
        {"timesteps": "cubic"},
        {"weighting": "min_snr"},
        {"measure": "squared_prediction"},
        {"parts": True},
    ]
    losses = [ddpm_loss(**options) for options in variants]
    losses += [ddpm_loss().part(0), ddpm_loss(parts=True).part(1), ddpm_loss(predict=lambda *_: None)]
    losses.append(Diffusion(NoiseSchedule.of(DDPMScheduler(prediction_type="sample"))))
    losses.append(Diffusion(NoiseSchedule.of(DDPMScheduler(beta_schedule="scaled_linear"))))
    losses += [Diffusion(NoiseSchedule.of(FlowMatchEulerDiscreteScheduler(shift=shift))) for shift in (1.0, 3.0)]
    assert len({loss.kind for loss in losses}) == len(losses)
    for loss in losses:
        again = Diffusion.from_settings(json.loads(json.dumps(loss.settings)), predict=loss._predict)
        assert again.kind == loss.kind
        assert again.settings == loss.settings
    assert ddpm_loss().kind == (
        "diffusion: epsilon over 1000 steps (b16e96fc), 4 shared noises of seed 0, stratified timesteps"
    )
    with pytest.raises(SpecError, match="settings are those of 'other'"):
        Diffusion.from_settings({"name": "other"})


def test_owners_say_whose_each_row_is() -> None:
    batch = images(2)
    owners = ddpm_loss(measurements=3).owners(batch)
    assert owners is not None
    assert owners.tolist() == [0, 0, 0, 1, 1, 1]
    assert ddpm_loss(measurements=1).owners(batch) is None
    assert ddpm_loss(measurements=3, parts=True).owners(batch) is None
    assert ddpm_loss(measurements=3).part(1).owners(batch) is None
    assert ddpm_loss(measurements=3).parts is None


def test_half_precision_gives_float32_losses_of_the_same_measurement() -> None:
    model, batch = tiny_unet(), images(2)
    loss = ddpm_loss(measurements=2)
    with torch.no_grad():
        full = loss(model, batch)
        half = loss(model.to(torch.bfloat16), batch)
        wide = loss(tiny_unet().double(), batch)
    assert (half.dtype, wide.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(half, full, rtol=3e-2, atol=0)
    torch.testing.assert_close(wide.float(), full, rtol=1e-5, atol=0)


def test_predicted_variances_are_left_out() -> None:
    def doubled(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return torch.cat([noisy, torch.full_like(noisy, torch.nan)], dim=1)

    def plain(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return noisy

    model, batch = tiny_unet(), images(2)
    found, expected = (ddpm_loss(predict=p)(model, batch) for p in (doubled, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nested_conditions_have_a_row_per_measurement() -> None:
    seen: dict[str, Any] = {}

    def record(model: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        seen.update(conditions, timesteps=timesteps)
        return noisy

    extra = {"added_cond_kwargs": {"time_ids": torch.tensor([[1.0], [2.0]])}}
    ddpm_loss(measurements=2, predict=record)(tiny_unet().to(torch.bfloat16), {**images(2), **extra})
    assert sorted(seen) == ["added_cond_kwargs", "class_labels", "timesteps"]
    assert seen["added_cond_kwargs"]["time_ids"].flatten().tolist() == [1, 1, 2, 2]
    assert seen["added_cond_kwargs"]["time_ids"].dtype == torch.bfloat16
    assert seen["class_labels"].tolist() == [0, 0, 1, 1]
    assert seen["timesteps"].tolist() == [250, 750, 250, 750]


class Late(nn.Module):
    """A transformer's argument order: the timestep is not the second."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.weight * hidden_states + encoder_hidden_states[:, :, None, None] + timestep[:, None, None, None]


class Positional(Late):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return self.weight * x + t[:, None, None, None]


def test_the_timestep_goes_by_name_where_it_has_one() -> None:
    batch = images(2)
    del batch["class_labels"]
    with torch.no_grad():
        plain = ddpm_loss()(Positional(), batch)
        named = ddpm_loss()(Late(), {**batch, "encoder_hidden_states": torch.zeros(2, CHANNELS)})
    torch.testing.assert_close(named, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"latents": None}, DataError, "the batch has no 'latents'"),
        ({"latents": torch.ones(2, 2, 8, 8, dtype=torch.int64)}, DataError, "'latents' that are torch.int64"),
        ({"latents": torch.randn(2, 2, 8)}, ShapeError, r"latents have shape \(2, 2, 8\), expected \(n, channels"),
        ({"class_labels": torch.zeros(3, dtype=torch.int64)}, ShapeError, r"batch\['class_labels'\] has shape \(3,\)"),
        ({"prompt": ["a", "b"]}, DataError, r"batch\['prompt'\] is a list, expected a tensor or a mapping"),
        ({"prompt": torch.zeros(2)}, DataError, "'prompt', which the forward of UNet2DModel does not take"),
        ({"ids": None}, DataError, "needs an id of each of 2 examples, and the batch has none"),
        ({"ids": [1]}, DataError, "needs an id of each of 2 examples, and the batch has 1"),
    ],
)
def test_bad_batches_are_one_sentence(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ddpm_loss(noise="per_example")(tiny_unet(), {**images(2), **change})


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda noisy: noisy[:, :, :4], r"predicted shape \(8, 2, 4, 8\) for latents \(8, 2, 8, 8\)"),
        (lambda noisy: {"x": noisy}, "the denoiser returned dict without a prediction"),
        (lambda noisy: (), "the denoiser returned tuple without a prediction"),
    ],
)
def test_bad_predictions_are_one_sentence(output: Callable[[Tensor], Any], text: str) -> None:
    loss = ddpm_loss(predict=lambda model, noisy, timesteps, conditions: output(noisy))
    with pytest.raises(ShapeError, match=text):
        loss(tiny_unet(), images(2))


@pytest.mark.parametrize(
    ("scheduler", "text"),
    [
        (EDMEulerScheduler(), "the scheduler is EDMEulerScheduler, without alphas_cumprod"),
        (DDPMScheduler(prediction_type="x0"), "DDPMScheduler has prediction type 'x0', expected"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "has prediction type 'flow_prediction', expected",
        ),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "DPMSolverMultistepScheduler has use_flow_sigmas"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "inverts its sigmas"),
        (object(), "the scheduler is object, without alphas_cumprod"),
    ],
)
def test_unknown_schedulers_are_one_sentence(scheduler: Any, text: str) -> None:
    with pytest.raises(SpecError, match=text):
        NoiseSchedule.of(scheduler)


def test_schedules_of_numbers_are_checked() -> None:
    with pytest.raises(SpecError, match="the prediction type is 'x0'"):
        NoiseSchedule("x0", 1, (0.5,))
    with pytest.raises(SpecError, match=r"alphas_cumprod has shape \(1,\) for 2 training steps"):
        NoiseSchedule("epsilon", 2, (0.5,))
    with pytest.raises(SpecError, match=r"alphas_cumprod has shape \(1,\) for 1 training steps"):
        NoiseSchedule("epsilon", 1, (1.5,))
    with pytest.raises(SpecError, match="flow matching has 1000 steps, shift 0"):
        NoiseSchedule("flow", 1000, shift=0.0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"noise": "mine"}, "noise is 'mine', expected 'shared' or 'per_example'"),
        ({"weighting": "snr"}, "weighting is 'snr'"),
        ({"measurements": 0}, "measurements is 0, expected 1 to 1000"),
    ],
)
def test_unknown_options_are_one_sentence(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        ddpm_loss(**options)
    with pytest.raises(SpecError, match="min-SNR weights are not defined for flow matching"):
        Diffusion(NoiseSchedule.of(FlowMatchEulerDiscreteScheduler()), weighting="min_snr")
    with pytest.raises(IndexError, match="measurement 4 is out of range for 4"):
        ddpm_loss().part(4)


def test_counted_numbers_are_normal_and_pinned() -> None:
    keys = np.array([counter_key("noise", 0, k) for k in range(100)])
    numbers = counter_normal(keys, 2001)
    assert abs(numbers.mean()) < 4 / 447  # 200,100 numbers: four standard errors
    assert abs(numbers.var() - 1) < 4 * np.sqrt(2) / 447
    assert abs((numbers**4).mean() - 3) < 4 * np.sqrt(96) / 447
    assert abs((numbers[:, 0:-1:2] * numbers[:, 1::2]).mean()) < 4 / 316
    assert abs((numbers[:-1] * numbers[1:]).mean()) < 4 / 445
    np.testing.assert_array_equal(counter_normal(keys, 7), numbers[:, :7])
    assert counter_key("noise", 0, 1) != counter_key("noise", 0, "1") != counter_key("noise", "01")
    np.testing.assert_allclose(numbers[0, :3], [0.6158643539092615, 0.1299607832646518, 0.6225391449412734], rtol=1e-12)
