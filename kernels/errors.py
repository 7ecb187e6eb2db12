"""The errors of every layer: each inherits the builtin that a caller would expect."""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CaptureError",
    "DataError",
    "GradsiftError",
    "MissingExtraError",
    "ShapeError",
    "SpecError",
    "StoreError",
]


class GradsiftError(Exception):
    """Base of all errors raised on purpose; its text is one sentence for the user."""


class SpecError(GradsiftError, ValueError):
    """A sketch specification is invalid, or differs from the one that is needed."""


class ShapeError(GradsiftError, ValueError):
    """Tensors do not fit each other."""


class BackendError(GradsiftError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class CaptureError(GradsiftError, RuntimeError):
    """A gradient cannot be captured truthfully: the text names the map and the cause."""


class StoreError(GradsiftError, RuntimeError):
    """A store is missing, damaged, foreign, or built from something else."""


class DataError(GradsiftError, ValueError):
    """A user's data file or record is unusable: the text names the line and the column."""


class MissingExtraError(GradsiftError, ImportError):
    """An optional dependency is absent: the text gives the pip command."""
