"""Check of what a diffusion model is asked to predict: does it do so better than by predicting nothing?"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.engine.check.case import Case
from gradsift.engine.check.parts import repeatable
from gradsift.engine.check.report import Result
from gradsift.engine.losses import Diffusion

__all__ = ["target"]

_CLEARLY = 0.5
"""Share of the error of predicting nothing: below it, and half as large as the share under the schedule's own target,
another target is the one that the model was trained on."""

_WORDS = {"epsilon": "the noise", "v_prediction": "v", "sample": "the image", "flow": "noise minus image"}


def target(case: Case, loss: Diffusion) -> Result:
    """Whether the predictions are what the schedule says that they are.

    Predicting nothing has the mean square of the target for its error. A model whose predictions fit another target
    much better was trained on that one: its gradients under this loss would be those of unlearning.
    """
    own = loss.schedule.prediction
    names = [own] if own == "flow" else [own, *(name for name in _WORDS if name not in (own, "flow"))]
    errors: dict[str, float] = {}
    guesses: dict[str, float] = {}
    with torch.no_grad(), repeatable(case.model):
        for name in names:
            other = copy.copy(loss)
            other.schedule = replace(loss.schedule, prediction=name)
            errors[name] = _mean(other, case.model, case.batch)
            guesses[name] = _mean(Diffusion.from_settings({**other.settings, "parts": False}), _Nothing(), case.batch)
    shares = {name: errors[name] / guesses[name] for name in names}
    said = (
        f"the model predicts {_WORDS[own]} ({own}): mean squared error {errors[own]:.3g}, of predicting nothing "
        f"{guesses[own]:.3g}"
    )
    ratio, best = shares[own], min(shares, key=lambda name: shares[name])
    if shares[best] < _CLEARLY < ratio and shares[best] < _CLEARLY * ratio:
        return Result(
            "labels",
            "fail",
            f"{said}; but {_WORDS[best]} ({best}) {errors[best]:.3g} of {guesses[best]:.3g}, so that is what it was "
            f"trained to predict: set prediction_type in the scheduler's configuration to {best!r}",
            ratio,
            1.0,
        )
    if ratio >= 1.0:
        return Result(
            "labels",
            "warn",
            f"{said}: it is untrained, or it was trained with latents of another scale, or with another schedule",
            ratio,
            1.0,
        )
    return Result("labels", "ok", said, ratio, 1.0)


def _mean(loss: Diffusion, model: nn.Module, batch: Any) -> float:
    """Loss per example and measurement."""
    losses: Tensor = loss(model, batch)
    return float(losses.sum()) / (len(batch["latents"]) * loss.measurements)


class _Nothing(nn.Module):
    """Predicts zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noisy: Tensor, timestep: Tensor, **_: Any) -> Tensor:
        """Zeros of the latents' shape."""
        return torch.zeros_like(noisy)
