"""SketchSpec: the few numbers that define a sketch, and its identity on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Self

from gradsift.kernels.errors import SpecError

__all__ = ["SEGMENT", "SketchSpec"]

SEGMENT = 64
"""Entries of one row segment: 256 bytes of float32, the unit that is hashed and moved as a whole."""

VERSION = 1
"""Changes whenever the same (seed, name, shape) would give other buckets, signs or projections."""

_MAX_DIM = 1 << 24
_KINDS = ("segment", "identity")

Layout = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class SketchSpec:
    """What is needed to draw the same random projection again, anywhere.

    Args:
        dim: numbers per example, a positive multiple of 64; 4096 unless given. With ``kind="identity"`` it
            follows from the captured parameters and need not be given.
        seed: any integer in [0, 2**64).
        kind: ``"segment"``, the row-segment sketch; or ``"identity"``, no projection: the gradients of all
            captured parameters one after another, for exact tests on small models.
        version: law of buckets and signs; this release knows 1.
        layout: for ``"identity"`` only, the (name, shape) of the parameters in order; filled by ``bind``.
        project: a positive r, or None. A gradient that has more than r rows and more than r columns is projected to
            (r, r) by a random matrix on either side before it is sketched (``project``): for full weights, whose
            gradients are large. LoRA's, of rank r or less, stay as they are. Inner products stay unbiased; what a
            small r costs is spread, see docs/kernels.md.

    Raises:
        SpecError: a value is out of range.
    """

    dim: int = -1
    seed: int = 0
    kind: str = "segment"
    version: int = VERSION
    layout: Layout = ()
    project: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise SpecError(f"sketch kind is {self.kind!r}, expected one of {', '.join(map(repr, _KINDS))}")
        if self.version != VERSION:
            raise SpecError(
                f"sketch version is {self.version!r} but this gradsift draws version {VERSION}: "
                "install the release that built it, or extract again"
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 1 << 64:
            raise SpecError(f"seed is {self.seed!r}, expected an integer in [0, 2**64)")
        if not _is_int(self.dim):
            raise SpecError(f"dim is {self.dim!r}, expected an integer")
        if self.project is not None and (not _is_int(self.project) or self.project < 1):
            raise SpecError(f"project is {self.project!r}, expected a positive integer, or None for no projection")
        if self.kind == "segment":
            self._check_segment()
        else:
            self._check_identity()

    def _check_segment(self) -> None:
        if self.layout:
            raise SpecError("layout is for kind='identity' only: leave it out")
        if self.dim == -1:
            object.__setattr__(self, "dim", 4096)
        if self.dim <= 0 or self.dim % SEGMENT or self.dim > _MAX_DIM:
            raise SpecError(f"dim is {self.dim}, expected a multiple of {SEGMENT} between {SEGMENT} and {_MAX_DIM}")

    def _check_identity(self) -> None:
        if self.project is not None:
            raise SpecError("project is for kind='segment' only, the identity keeps whole gradients: leave it out")
        layout = tuple((str(name), tuple(int(s) for s in shape)) for name, shape in self.layout)
        object.__setattr__(self, "layout", layout)
        if layout:
            total = sum(prod(shape) for _, shape in layout)
            if self.dim not in (-1, total):
                raise SpecError(f"dim is {self.dim} but the captured parameters hold {total} numbers: leave dim out")
            object.__setattr__(self, "dim", total)
        elif self.dim < -1 or self.dim == 0:
            raise SpecError(f"dim is {self.dim}, expected nothing: leave it out for kind='identity'")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change whenever the projection does."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def bind(self, layout: Layout) -> Self:
        """The spec for these parameters: itself, or the identity with its layout and dim filled in."""
        return self if self.kind == "segment" else replace(self, layout=layout)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        fields = asdict(self)
        if self.kind == "segment":
            del fields["layout"]
        if self.project is None:  # as written before there were projections: fingerprints stay
            del fields["project"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            SpecError: the text is not a JSON object, or a field is missing, unknown or out of range.
        """
        try:
            fields: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"sketch specification is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise SpecError(f"sketch specification is a JSON {type(fields).__name__}, expected an object")
        unknown = sorted(set(fields) - {"dim", "seed", "kind", "version", "layout", "project"})
        missing = sorted({"dim", "seed", "kind", "version"} - set(fields))
        if unknown or missing:
            raise SpecError(f"sketch specification has unknown fields {unknown} and lacks {missing}")
        try:
            fields["layout"] = tuple(
                (name, tuple(int(size) for size in shape)) for name, shape in fields.get("layout", [])
            )
        except (TypeError, ValueError):
            raise SpecError("layout of a sketch specification must be a list of [name, shape]") from None
        return cls(**fields)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
