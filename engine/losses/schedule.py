"""NoiseSchedule: how training mixes image and noise at each step, and what it asks the denoiser to predict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from gradsift.kernels.errors import SpecError

__all__ = ["MIN_SNR_GAMMA", "NoiseSchedule"]

MIN_SNR_GAMMA = 5.0
"""Signal-to-noise ratios above this count no more: the value of the paper and of diffusers' documentation."""

_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_FLOW = "flow"
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Those whose training tables are their configuration's; others reuse the word ``shift`` for something else."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Training steps 0 (least noise) to ``steps - 1`` (most) of a diffusion model.

    With ``alphas_cumprod`` a, clean image x and noise e: the model sees ``sqrt(a) x + sqrt(1 - a) e`` and predicts e
    ("epsilon"), ``sqrt(a) e - sqrt(1 - a) x`` ("v_prediction") or x ("sample"), and is told the step. Under flow
    matching ("flow") it sees ``(1 - s) x + s e``, predicts ``e - x`` and is told ``s * steps``, with
    ``s = shift u / (1 + (shift - 1) u)`` and ``u = (step + 1) / steps``: diffusers' training scripts index exactly
    these levels.

    Attributes:
        prediction: what the model predicts.
        steps: number of noise levels that it was trained on.
        alphas_cumprod: one number in [0, 1] per step; None under flow matching.
        shift: of flow matching; 1 otherwise.

    Raises:
        SpecError: the prediction is unknown, or does not come with what it needs.
    """

    prediction: str
    steps: int
    alphas_cumprod: tuple[float, ...] | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in (*_PREDICTIONS, _FLOW):
            raise SpecError(
                f"the prediction type is {self.prediction!r}, expected {', '.join(map(repr, _PREDICTIONS))} or "
                f"{_FLOW!r}: give the scheduler that the model was trained with"
            )
        if self.prediction == _FLOW:
            if self.alphas_cumprod is not None or self.shift <= 0 or self.steps < 1:
                raise SpecError(
                    f"flow matching has {self.steps} steps, shift {self.shift:g} and "
                    f"{'no ' if self.alphas_cumprod is None else ''}alphas_cumprod, expected at least one step, a "
                    "positive shift and no alphas_cumprod"
                )
            return
        levels = np.asarray(self.alphas_cumprod if self.alphas_cumprod is not None else (), dtype=np.float64)
        if levels.shape != (self.steps,) or self.steps < 1 or not ((levels >= 0) & (levels <= 1)).all():
            raise SpecError(
                f"alphas_cumprod has shape {levels.shape} for {self.steps} training steps, expected one number between "
                "0 and 1 for each"
            )

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """The schedule that a scheduler of diffusers, or one like it, was configured for in training.

        Its sampling steps play no part: ``set_timesteps`` may have been called. Schedulers of the DDPM family have
        ``alphas_cumprod`` and ``config.prediction_type``; of flow matching FlowMatchEulerDiscreteScheduler and
        FlowMatchHeunDiscreteScheduler are read, whose ``shift`` applies unless shifting is dynamic (it then is a
        matter of sampling, as in diffusers' training scripts).

        Raises:
            SpecError: another kind of scheduler, or one whose prediction type or noise levels are not known here.
        """
        name = type(scheduler).__name__
        config = getattr(scheduler, "config", None)
        setting = config.get if isinstance(config, Mapping) else lambda key, other=None: getattr(config, key, other)
        if any(base.__name__ in _FLOW_SCHEDULERS for base in type(scheduler).__mro__):
            if setting("invert_sigmas", False):
                raise SpecError(
                    f"{name} inverts its sigmas (invert_sigmas), and what its model predicts is not known: give "
                    "a scheduler without it"
                )
            shift = 1.0 if setting("use_dynamic_shifting", False) else float(setting("shift", 1.0))
            return cls(_FLOW, int(setting("num_train_timesteps", 1000)), None, shift)
        levels = getattr(scheduler, "alphas_cumprod", None)
        if levels is None or config is None:
            raise SpecError(
                f"the scheduler is {name}, without alphas_cumprod, expected one of the DDPM family or a "
                f"{_FLOW_SCHEDULERS[0]}: give the scheduler that the model was trained with"
            )
        prediction = setting("prediction_type", None)
        if setting("use_flow_sigmas", False) or prediction not in _PREDICTIONS:
            what = "use_flow_sigmas" if prediction in _PREDICTIONS else f"prediction type {prediction!r}"
            raise SpecError(
                f"{name} has {what}, expected the prediction type {', '.join(map(repr, _PREDICTIONS))}, or a "
                f"{_FLOW_SCHEDULERS[0]} for flow matching: give the scheduler that the model was trained with"
            )
        table = tuple(float(a) for a in levels)
        return cls(prediction, len(table), table)

    @property
    def name(self) -> str:
        """What is predicted over which levels, equal for equal schedules: ``"epsilon over 1000 steps (5c1f09ab)"``."""
        if self.alphas_cumprod is None:
            return f"flow matching over {self.steps} steps, shift {self.shift:g}"
        table = np.asarray(self.alphas_cumprod, dtype="<f8").tobytes()
        digest = hashlib.blake2b(table, digest_size=4).hexdigest()
        return f"{self.prediction} over {self.steps} steps ({digest})"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything as JSON; ``NoiseSchedule.from_settings`` reads it."""
        found = asdict(self)
        return {**found, "alphas_cumprod": None if self.alphas_cumprod is None else list(self.alphas_cumprod)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The schedule whose ``settings`` these are."""
        levels = settings["alphas_cumprod"]
        return cls(**{**settings, "alphas_cumprod": None if levels is None else tuple(levels)})

    def timestep(self, step: int) -> int | float:
        """What the model is told: the step itself, or 1000 times the noise's share under flow matching."""
        return step if self.alphas_cumprod is not None else self.factors(step)[1] * self.steps

    def factors(self, step: int) -> tuple[float, float]:
        """Of clean image and noise in what the model sees."""
        if self.alphas_cumprod is not None:
            return self.alphas_cumprod[step] ** 0.5, (1.0 - self.alphas_cumprod[step]) ** 0.5
        level = (step + 1) / self.steps
        share = self.shift * level / (1.0 + (self.shift - 1.0) * level)
        return 1.0 - share, share

    def target(self, step: int) -> tuple[float, float]:
        """Of clean image and noise in what the model predicts."""
        signal, noise = self.factors(step)
        return {"epsilon": (0.0, 1.0), "v_prediction": (-noise, signal), "sample": (1.0, 0.0), "flow": (-1.0, 1.0)}[
            self.prediction
        ]

    def min_snr(self, step: int) -> float:
        """Weight of a step's squared error: min(snr, 5), over snr for "epsilon", over snr + 1 for "v_prediction".

        Written without a division by zero, so that a last step without any signal has its limit.

        Raises:
            SpecError: flow matching, for which diffusers' training has no such weight.

        Source: Hang et al. 2023 (min-SNR); diffusers' train_text_to_image scripts.
        """
        if self.alphas_cumprod is None:
            raise SpecError("min-SNR weights are not defined for flow matching: use weighting='none'")
        signal = self.alphas_cumprod[step]
        noise = 1.0 - signal
        if self.prediction == "v_prediction":
            return min(signal, MIN_SNR_GAMMA * noise)
        if self.prediction == "sample":
            return MIN_SNR_GAMMA if signal >= MIN_SNR_GAMMA * noise else signal / noise
        return 1.0 if signal <= MIN_SNR_GAMMA * noise else MIN_SNR_GAMMA * noise / signal
