"""Losses, one number per example: what to pass as ``loss_fn``."""

from gradsift.engine.losses.counter import counter_uniform
from gradsift.engine.losses.language import IGNORE, LanguageModelLoss, language_model

__all__ = ["IGNORE", "LanguageModelLoss", "counter_uniform", "language_model"]
