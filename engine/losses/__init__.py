"""Losses, one number per example: what to pass as ``loss_fn``."""

from gradsift.engine.losses.classification import ClassificationLoss, Margin, classification
from gradsift.engine.losses.counter import counter_uniform
from gradsift.engine.losses.diffusion import Diffusion
from gradsift.engine.losses.distillation import Distillation
from gradsift.engine.losses.language import LanguageModelLoss, language_model
from gradsift.engine.losses.policy import PolicyGradient
from gradsift.engine.losses.preference import DPO
from gradsift.engine.losses.schedule import NoiseSchedule
from gradsift.engine.losses.softmax import IGNORE

__all__ = [
    "DPO",
    "IGNORE",
    "ClassificationLoss",
    "Diffusion",
    "Distillation",
    "LanguageModelLoss",
    "Margin",
    "NoiseSchedule",
    "PolicyGradient",
    "classification",
    "counter_uniform",
    "language_model",
]
