"""gradsift: which training examples made this model do that, decided by exact gradients.

import gradsift as gs

capture = gs.Capture(model, gs.SketchSpec(dim=4096))
store = gs.extract(model, loader, gs.losses.language_model, "train.zarr")
top = gs.topk(store, capture(query, gs.losses.language_model), k=10)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AdamMoments": "gradsift.engine.checkpoints.moments",
    "Capture": "gradsift.engine.capture.capture",
    "Checkpoint": "gradsift.engine.checkpoints.checkpoint",
    "CaptureError": "gradsift.kernels.errors",
    "CompactStore": "gradsift.engine.compaction.store",
    "Curvature": "gradsift.engine.curvature.curvature",
    "DataError": "gradsift.kernels.errors",
    "FeatureStore": "gradsift.engine.store.reader",
    "Features": "gradsift.engine.capture.features",
    "FidelityCase": "gradsift.engine.fidelity.case",
    "GradsiftError": "gradsift.kernels.errors",
    "LinearScorer": "gradsift.engine.scorers.protocol",
    "Rescorer": "gradsift.engine.answers.search",
    "Scorer": "gradsift.engine.scorers.protocol",
    "ShapeError": "gradsift.kernels.errors",
    "SketchSpec": "gradsift.kernels.spec",
    "SpecError": "gradsift.kernels.errors",
    "StoreError": "gradsift.kernels.errors",
    "adam_moments": "gradsift.engine.checkpoints.adam",
    "check": "gradsift.engine.check.run",
    "compact": "gradsift.engine.compaction.compact",
    "evaluate": "gradsift.engine.fidelity.evaluate",
    "extract": "gradsift.engine.extraction.extract",
    "gradient": "gradsift.engine.answers.gradient",
    "losses": "gradsift.engine",
    "precondition": "gradsift.engine.curvature.precondition",
    "rescore": "gradsift.engine.answers.rescore",
    "select": "gradsift.engine.answers.select",
    "sketch_matrix": "gradsift.kernels.sketch",
    "sketch_outer": "gradsift.kernels.outer",
    "stream_scores": "gradsift.engine.scorers.scores",
    "topk": "gradsift.engine.answers.search",
}

__all__ = [
    "AdamMoments",
    "Capture",
    "CaptureError",
    "Checkpoint",
    "CompactStore",
    "Curvature",
    "DataError",
    "FeatureStore",
    "Features",
    "FidelityCase",
    "GradsiftError",
    "LinearScorer",
    "Rescorer",
    "Scorer",
    "ShapeError",
    "SketchSpec",
    "SpecError",
    "StoreError",
    "adam_moments",
    "check",
    "compact",
    "evaluate",
    "extract",
    "gradient",
    "losses",
    "precondition",
    "rescore",
    "select",
    "sketch_matrix",
    "sketch_outer",
    "stream_scores",
    "topk",
]

if TYPE_CHECKING:
    from gradsift.engine import losses
    from gradsift.engine.answers.gradient import gradient
    from gradsift.engine.answers.rescore import rescore
    from gradsift.engine.answers.search import Rescorer, topk
    from gradsift.engine.answers.select import select
    from gradsift.engine.capture.capture import Capture
    from gradsift.engine.capture.features import Features
    from gradsift.engine.check.run import check
    from gradsift.engine.checkpoints.adam import adam_moments
    from gradsift.engine.checkpoints.checkpoint import Checkpoint
    from gradsift.engine.checkpoints.moments import AdamMoments
    from gradsift.engine.compaction.compact import compact
    from gradsift.engine.compaction.store import CompactStore
    from gradsift.engine.curvature.curvature import Curvature
    from gradsift.engine.curvature.precondition import precondition
    from gradsift.engine.extraction.extract import extract
    from gradsift.engine.fidelity.case import FidelityCase
    from gradsift.engine.fidelity.evaluate import evaluate
    from gradsift.engine.scorers.protocol import LinearScorer, Scorer
    from gradsift.engine.scorers.scores import stream_scores
    from gradsift.engine.store.reader import FeatureStore
    from gradsift.kernels.errors import (
        CaptureError,
        DataError,
        GradsiftError,
        ShapeError,
        SpecError,
        StoreError,
    )
    from gradsift.kernels.outer import sketch_outer
    from gradsift.kernels.sketch import sketch_matrix
    from gradsift.kernels.spec import SketchSpec


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: `import gradsift` stays as cheap as it looks."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradsift' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    if name == "losses":
        value: Any = importlib.import_module("gradsift.engine.losses")
    else:
        value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
