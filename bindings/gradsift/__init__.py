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
    "Capture": "gradsift.engine.capture",
    "CaptureError": "gradsift.kernels.errors",
    "DataError": "gradsift.kernels.errors",
    "FeatureStore": "gradsift.engine.store",
    "Features": "gradsift.engine.features",
    "GradsiftError": "gradsift.kernels.errors",
    "Rescorer": "gradsift.engine.search",
    "ShapeError": "gradsift.kernels.errors",
    "SketchSpec": "gradsift.kernels.spec",
    "SpecError": "gradsift.kernels.errors",
    "StoreError": "gradsift.kernels.errors",
    "check": "gradsift.engine.check",
    "extract": "gradsift.engine.extract",
    "gradient": "gradsift.engine.gradient",
    "losses": "gradsift.engine",
    "rescore": "gradsift.engine.rescore",
    "select": "gradsift.engine.select",
    "sketch_matrix": "gradsift.kernels.sketch",
    "sketch_outer": "gradsift.kernels.outer",
    "topk": "gradsift.engine.search",
}

__all__ = [
    "Capture",
    "CaptureError",
    "DataError",
    "FeatureStore",
    "Features",
    "GradsiftError",
    "Rescorer",
    "ShapeError",
    "SketchSpec",
    "SpecError",
    "StoreError",
    "check",
    "extract",
    "gradient",
    "losses",
    "rescore",
    "select",
    "sketch_matrix",
    "sketch_outer",
    "topk",
]

if TYPE_CHECKING:
    from gradsift.engine import losses
    from gradsift.engine.capture import Capture
    from gradsift.engine.check import check
    from gradsift.engine.extract import extract
    from gradsift.engine.features import Features
    from gradsift.engine.gradient import gradient
    from gradsift.engine.rescore import rescore
    from gradsift.engine.search import Rescorer, topk
    from gradsift.engine.select import select
    from gradsift.engine.store import FeatureStore
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
