"""Report: what `check` found, as rows that people and machines can read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["KindRow", "Report", "Result", "Shown", "Verdict"]

Verdict = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Result:
    """One check.

    Attributes:
        name: such as "features".
        verdict: "ok"; "warn": worth knowing; "fail": results would be wrong; "skip": it could not run, or need not.
        sentence: what was found and, unless all is well, what to do.
        measured: the number that decided, if one did.
        limit: what it was compared with.
    """

    name: str
    verdict: Verdict
    sentence: str
    measured: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class KindRow:
    """The maps of one kind ("q_proj"); a number is None where its check did not run.

    Attributes:
        maps: how many of them are captured.
        numbers: parameters that they hold together.
        energy: share of the squared gradient norm, mean over examples.
        features: largest relative error of rows against autograd, one example at a time.
        conservation: |sum of rows - S grad| over the root sum of squares of the rows, the largest.
        batch: largest relative difference of an example's row alone and in a batch.
        precision: mean cosine of rows in low and in full precision.
        sketch: RMS relative error of the sketch's inner products.
    """

    kind: str
    maps: int
    numbers: int
    energy: float | None = None
    features: float | None = None
    conservation: float | None = None
    batch: float | None = None
    precision: float | None = None
    sketch: float | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What the loss trains on in one example.

    Attributes:
        id: the example's.
        tokens: its token ids.
        trained: whether each is predicted with a loss.
        losses: the loss of each, 0 where there is none.
    """

    id: str | int
    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``check`` found.

    Attributes:
        results: one row per check, in the order in which they ran.
        kinds: one row per kind of map.
        uncovered: trainable parameters left out: canonical name -> share of all trainable numbers.
        shown: one example with its mask, for a language model.
        examples: how many were looked at one by one, and how many were at hand for rankings.
    """

    results: tuple[Result, ...]
    kinds: tuple[KindRow, ...]
    uncovered: dict[str, float]
    shown: Shown | None
    examples: tuple[int, int]

    @property
    def failed(self) -> tuple[Result, ...]:
        """The checks that found something wrong."""
        return tuple(result for result in self.results if result.verdict == "fail")

    @property
    def warned(self) -> tuple[Result, ...]:
        """The checks that found something worth knowing."""
        return tuple(result for result in self.results if result.verdict == "warn")

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """One sentence."""
        ran = sum(result.verdict != "skip" for result in self.results)
        if self.failed:
            names = ", ".join(result.name for result in self.failed)
            return f"do not trust results on this model yet: {len(self.failed)} of {ran} checks failed ({names})"
        if self.warned:
            names = ", ".join(result.name for result in self.warned)
            return f"gradsift can attribute this model: no check of {ran} failed, but read what it says on {names}"
        return f"gradsift can attribute this model: all {ran} checks passed"

    def __getitem__(self, name: str) -> Result:
        """The result of one check, by name."""
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "checks": [asdict(result) for result in self.results],
            "kinds": [asdict(kind) for kind in self.kinds],
            "uncovered": self.uncovered,
            "shown": None if self.shown is None else asdict(self.shown),
            "examples": {"one_by_one": self.examples[0], "ranked": self.examples[1]},
        }
