"""The loss of a diffusion model as a repeatable measurement: fixed timesteps, and noise that a counter decides."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.losses.counter import counter_key, counter_normal
from gradsift.engine.losses.denoiser import Predict, conditions_of, denoise, latents_of, predict
from gradsift.engine.losses.schedule import NoiseSchedule
from gradsift.engine.store.ids import read_ids
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = ["Diffusion"]

NoiseKind = Literal["shared", "per_example"]
Timesteps = Literal["stratified", "cubic"]
Weighting = Literal["none", "min_snr"]
Measure = Literal["loss", "squared_prediction"]

_CACHED = 64
"""Shared noises that are kept, by shape and measurement."""


class _Passed(NamedTuple):
    """One forward pass, in float32 or float64.

    Attributes:
        prediction: (n, K, C, H, W), differentiable.
        clean: (n, 1, C, H, W).
        noise: (n or 1, K, C, H, W).
    """

    prediction: Tensor
    clean: Tensor
    noise: Tensor


class Diffusion:
    """Mean squared error of the denoiser, summed over K measurements; each is a timestep with a noise.

    A batch is a mapping: ``latents`` (n, C, H, W), clean and scaled as the denoiser sees them; ``ids`` when noise is
    per example; every other entry is a condition, a tensor or mapping of tensors with n entries, named as the
    denoiser's forward names it (``encoder_hidden_states``, ``class_labels``, ``added_cond_kwargs``, ...). The model
    runs once on n * K rows, an example's measurements one after another, in its own dtype; losses are float32 (float64
    for a float64 model). Both derivative modes work.

    What is measured depends on the settings alone, never on batch, order, machine, dtype or an interrupted run:
    timesteps are fixed, the middle of each of K equal strata of the schedule; noise comes from (seed, k), or from
    (seed, example id, k), by a counter and Box-Muller in float64, rounded to float32. Training drops prompts at random
    (classifier-free guidance) and jitters timesteps; the measurement always keeps the prompt.

    Args:
        schedule: what the model was trained on.
        measurements: K.
        seed: of the noise.
        noise: "shared": the same K noises for every example and query, which is what makes gradients comparable
            (DMin); "per_example": K of each example's own, by ``batch["ids"]``.
        timesteps: "stratified", rising; or "cubic": ``T - 1 - floor((k / K)^3 T)``, DMin's choice, mostly high noise.
        weighting: "min_snr" multiplies each measurement by its min-SNR weight.
        measure: "loss"; or "squared_prediction", the mean square of the prediction itself (D-TRAK).
        parts: keep the K measurements apart: ``loss`` gives n * K numbers, and a store a row of each.
        predict: ``predict(model, noisy, timesteps, conditions)`` -> (n * K, C, H, W), or an output whose ``.sample`` or
            first entry that is; ``model(noisy, timestep=timesteps, **conditions)`` unless given.

    Raises:
        SpecError: an option is not one of those above.

    Source: Lin et al. 2024 (DMin, arXiv 2412.08637); Zheng et al. 2023 (D-TRAK, arXiv 2311.00500).
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        measurements: int = 4,
        seed: int = 0,
        noise: NoiseKind = "shared",
        timesteps: Timesteps = "stratified",
        weighting: Weighting = "none",
        measure: Measure = "loss",
        parts: bool = False,
        predict: Predict | None = None,
    ) -> None:
        given = {"noise": noise, "timesteps": timesteps, "weighting": weighting, "measure": measure}
        for (name, value), known in zip(given.items(), (NoiseKind, Timesteps, Weighting, Measure), strict=True):
            if value not in get_args(known):
                raise SpecError(f"{name} is {value!r}, expected {' or '.join(map(repr, get_args(known)))}")
        if not 1 <= measurements <= schedule.steps:
            raise SpecError(
                f"measurements is {measurements}, expected 1 to {schedule.steps}, the schedule's number of steps"
            )
        self.schedule = schedule
        self.measurements = measurements
        self.seed = seed
        self.noise = noise
        self.timesteps = timesteps
        self.weighting = weighting
        self.measure = measure
        self._apart = bool(parts)
        self._predict = predict
        self._chosen = tuple(range(measurements))
        self._weights = [schedule.min_snr(s) if weighting == "min_snr" else 1.0 for s in self._steps()]

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each example, (n,); with ``parts`` of each measurement of each example, (n * K,), example-major."""
        losses = self._numbers(model, batch).flatten(2).sum(dim=2)
        return losses.flatten() if self._apart else losses.sum(dim=1)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each latent position adds to the loss, summed over channels and measurements: (n, H, W)."""
        return self._numbers(model, batch).sum(dim=(1, 2))

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Loss of targets drawn around the model's own prediction.

        Such a target is the prediction plus normal noise of variance C H W / 2w (w: the measurement's weight), the
        noise model whose negative log-likelihood this loss is. The second moment of the gradients is then the loss's
        Gauss-Newton matrix, the true Fisher. Returned is the part of that squared error which is linear in the
        prediction: the same gradient, and nothing large that would cancel in a central difference.

        Args:
            seeds: n integers, one per example; the noise of measurement k comes from (seed, k).

        Returns:
            shaped as the loss.

        Raises:
            ShapeError: another number of seeds.
        """
        return self(model, self.sampled_batch(model, batch, seeds))

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the draws of ``sampled`` to be kept, as ``seeds``: its plain loss is that of ``sampled``."""
        return {**batch, "seeds": [int(seed) for seed in seeds]}

    def gauss_newton(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The outputs that the loss is a square of, and the product with its second derivative at them.

        Returns:
            the prediction (n, K, C, H, W); and ``hessian(t)``: ``2 w t / (C H W)`` with w the measurement's weight.
        """
        prediction = self._pass(model, batch).prediction
        bend = self._column(self._weights, prediction) * (2 / prediction[0, 0].numel())
        return prediction, lambda tangent: bend * tangent

    def owners(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Of each row that the model sees the number of its example, int64 (n * K,); None when every row is one."""
        k = len(self._chosen)
        if self._apart or k == 1:
            return None
        return torch.arange(len(latents_of(batch))).repeat_interleave(k)

    @property
    def parts(self) -> tuple[dict[str, Any], ...] | None:
        """What each part measures, ``{"timestep": t}``; None when they are summed."""
        return tuple({"timestep": self.schedule.timestep(s)} for s in self._steps()) if self._apart else None

    def part(self, k: int) -> Self:
        """The same loss with measurement k alone.

        Raises:
            IndexError: there is no such measurement.
        """
        if k not in self._chosen:
            raise IndexError(f"measurement {k} is out of range for {self.measurements}")
        alone = copy.copy(self)
        alone._chosen, alone._apart, alone._weights = (k,), False, [self._weights[self._chosen.index(k)]]
        return alone

    @property
    def kind(self) -> str:
        """Everything that is measured, in words: two losses measure the same if and only if these agree."""
        whose = "shared noises" if self.noise == "shared" else "noises per example"
        words = [
            f"diffusion: {self.schedule.name}",
            f"{self.measurements} {whose} of seed {self.seed}",
            f"{self.timesteps} timesteps",
        ]
        if self.weighting == "min_snr":
            words.append("min-SNR weights")
        if self.measure == "squared_prediction":
            words.append("squared prediction instead of the error")
        if self._predict is not None:
            words.append(f"prediction by {getattr(self._predict, '__qualname__', type(self._predict).__qualname__)}")
        if self._apart:
            words.append("kept apart")
        if len(self._chosen) < self.measurements:
            words.append(f"measurement {self._chosen[0]} alone")
        return ", ".join(words)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but ``predict`` as JSON, for ``from_settings``."""
        return {
            "name": "diffusion",
            "schedule": self.schedule.settings,
            "measurements": self.measurements,
            "seed": self.seed,
            "noise": self.noise,
            "timesteps": self.timesteps,
            "weighting": self.weighting,
            "measure": self.measure,
            "parts": self._apart,
            "part": self._chosen[0] if len(self._chosen) < self.measurements else None,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], predict: Predict | None = None) -> Self:
        """The loss whose ``settings`` these are, such as a store's ``metadata["loss"]["settings"]``.

        Args:
            predict: as it was given then; ``kind`` tells whether it fits.

        Raises:
            SpecError: they are those of another loss.
        """
        options = dict(settings)
        if options.pop("name", None) != "diffusion":
            raise SpecError(f"the settings are those of {settings.get('name')!r}, expected those of a diffusion loss")
        schedule, part = NoiseSchedule.from_settings(options.pop("schedule")), options.pop("part")
        whole = cls(schedule, **options, predict=predict)
        return whole if part is None else whole.part(part)

    def __repr__(self) -> str:
        return f"Diffusion({self.kind!r})"

    def _steps(self) -> list[int]:
        """The schedule's step of each chosen measurement."""
        total, count = self.schedule.steps, self.measurements
        if self.timesteps == "cubic":
            return [total - 1 - k**3 * total // count**3 for k in self._chosen]
        return [(2 * k + 1) * total // (2 * count) for k in self._chosen]

    def _numbers(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each number of each prediction adds to the loss, (n, K, C, H, W)."""
        passed = self._pass(model, batch)
        prediction = passed.prediction
        numbers = prediction[0, 0].numel()
        weights = self._column(self._weights, prediction) / numbers
        if batch.get("seeds") is not None:
            return -(2.0 * weights).sqrt() * self._draws(batch["seeds"], prediction) * prediction
        if self.measure == "squared_prediction":
            return weights * prediction.square()
        clean, noise = (
            self._column(c, prediction) for c in zip(*map(self.schedule.target, self._steps()), strict=True)
        )
        return weights * (prediction - (clean * passed.clean + noise * passed.noise)).square()

    def _pass(self, model: nn.Module, batch: Mapping[str, Any]) -> _Passed:
        latents = latents_of(batch)
        n, k = len(latents), len(self._chosen)
        weight = next(p for p in model.parameters() if p.is_floating_point())
        wide = torch.promote_types(weight.dtype, torch.float32)
        clean = latents.to(weight.device, wide)[:, None]
        noise = self._noises(batch, latents).to(clean)
        steps = self._steps()
        signal, share = (self._column(c, clean) for c in zip(*map(self.schedule.factors, steps), strict=True))
        noisy = (signal * clean + share * noise).flatten(0, 1).to(weight.dtype)
        timesteps = torch.tensor([self.schedule.timestep(s) for s in steps], device=weight.device).repeat(n)
        conditions = conditions_of(batch, n, k, weight.device, weight.dtype)
        prediction = denoise(model, noisy, timesteps, conditions, self._predict or predict, wide)
        return _Passed(prediction.unflatten(0, (n, k)), clean, noise)

    def _noises(self, batch: Mapping[str, Any], latents: Tensor) -> Tensor:
        """float32 on the CPU, (1, K, C, H, W) when shared, else (n, K, C, H, W)."""
        shape = tuple(latents.shape[1:])
        if self.noise == "shared":
            return torch.stack([_noise(counter_key("noise", self.seed, k), shape) for k in self._chosen])[None]
        ids = read_ids(batch)
        if ids is None or len(ids) != len(latents):
            got = "none" if ids is None else str(len(ids))
            raise DataError(
                f"noise='per_example' needs an id of each of {len(latents)} examples, and the batch has {got}: put "
                "'ids' in the batch"
            )
        keys = [counter_key("noise", self.seed, example, k) for example in ids for k in self._chosen]
        return _normal(keys, shape).view(len(ids), len(self._chosen), *shape)

    def _draws(self, seeds: Sequence[int], prediction: Tensor) -> Tensor:
        """Unit normal numbers for ``sampled``, shaped as the prediction."""
        n, _, *shape = prediction.shape
        if len(seeds) != n:
            raise ShapeError(f"got {len(seeds)} seeds for {n} examples: give one per example")
        keys = [counter_key("draw", int(seed), k) for seed in seeds for k in self._chosen]
        return _normal(keys, tuple(shape)).view_as(prediction).to(prediction)

    @staticmethod
    def _column(values: Sequence[float], like: Tensor) -> Tensor:
        """One number per measurement, (K, 1, 1, 1)."""
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None, None]


@lru_cache(maxsize=_CACHED)
def _noise(key: int, shape: tuple[int, ...]) -> Tensor:
    """Shared noise of one measurement: read, never written."""
    return _normal([key], shape)[0]


def _normal(keys: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of each key, float32 (keys, *shape); one key at a time, whose float64 fits a cache."""
    numbers = np.empty((len(keys), prod(shape)), dtype=np.float32)
    for row, key in zip(numbers, keys, strict=True):
        row[:] = counter_normal(np.array([key], dtype=np.uint64), prod(shape))[0]
    return torch.from_numpy(numbers).view(len(keys), *shape)
