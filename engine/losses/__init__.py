"""Losses, one number per example: what to pass as ``loss_fn``."""

from gradsift.engine.losses.counter import counter_uniform
from gradsift.engine.losses.diffusion import Diffusion
from gradsift.engine.losses.language import IGNORE, LanguageModelLoss, language_model
from gradsift.engine.losses.schedule import NoiseSchedule

__all__ = ["IGNORE", "Diffusion", "LanguageModelLoss", "NoiseSchedule", "counter_uniform", "language_model"]
