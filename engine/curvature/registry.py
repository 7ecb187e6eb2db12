"""The corrections that exist, by name."""

from __future__ import annotations

from gradsift.engine.curvature.corrections import (
    Correction,
    EkFacCorrection,
    FisherCorrection,
    GaussNewtonCorrection,
    NoCorrection,
)

__all__ = ["CORRECTIONS"]

CORRECTIONS: dict[str, type[Correction]] = {
    correction.about.name: correction
    for correction in (NoCorrection, FisherCorrection, EkFacCorrection, GaussNewtonCorrection)
}
"""Name -> class of every correction: `gradsift methods` and docs/methods.md read what they say of themselves."""
