"""What an evaluation found: a row per method, and in words which one to use."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

from gradsift.engine.fidelity.auc import AUC
from gradsift.engine.fidelity.lds import LDS
from gradsift.engine.fidelity.qld import QLD
from gradsift.engine.fidelity.recall import Agreement, Share

__all__ = ["Evaluation", "Row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one case; what was not measured is None.

    Attributes:
        name, family, method, bytes: as of ``Candidate``.
        lds: prediction of retraining on random subsets.
        qld: rise of the query's loss without its best examples.
        auc: of telling mislabelled examples.
        classes: share of the best 10 that is of the query's class.
        agreement: with the same formula by exact gradients.
    """

    name: str
    family: str
    method: str | None = None
    bytes: int | None = None
    lds: LDS | None = None
    qld: QLD | None = None
    auc: AUC | None = None
    classes: Share | None = None
    agreement: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        out: dict[str, Any] = {"name": self.name, "family": self.family, "method": self.method, "bytes": self.bytes}
        if self.lds is not None:
            interval = [_number(end) for end in self.lds.interval]
            out["lds"] = {"mean": _number(self.lds.mean), "interval": interval, "undefined": self.lds.undefined}
        if self.qld is not None:
            out["qld"] = {"mean": self.qld.mean, "interval": [*self.qld.interval]}
        if self.auc is not None:
            out["auc"] = {"value": self.auc.value, "interval": [*self.auc.interval]}
        if self.classes is not None:
            out["class_recall"] = _share(self.classes)
        if self.agreement is not None:
            out["agreement"] = {
                "recall": _share(self.agreement.recall),
                "in_short_list": _share(self.agreement.listed),
                "spearman": _number(self.agreement.spearman),
            }
        return out


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All methods on one case.

    Attributes:
        case, examples, queries, subsets, seeds: what was trained, and how often.
        ceiling: the LDS that a perfect prediction could reach, see ``reliability``; NaN with one seed.
        rows: in the order in which methods were given.
        left_out: method -> why it does not fit the case.
    """

    case: str
    examples: int
    queries: int
    subsets: int
    seeds: int
    ceiling: float
    rows: tuple[Row, ...]
    left_out: dict[str, str]

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def advice(self) -> list[str]:
        """Which method to use on this data, in sentences."""
        from gradsift.engine.fidelity.words import advice

        return advice(self)

    @property
    def ranked(self) -> list[Row]:
        """Rows by LDS, highest first; those without one last, in their order."""
        return sorted(self.rows, key=lambda row: -row.lds.mean if row.lds and not isnan(row.lds.mean) else 2.0)

    @property
    def undefined(self) -> dict[str, int]:
        """Row -> its queries without a correlation, which its LDS leaves out: all scores, or all losses, are equal."""
        return {row.name: row.lds.undefined for row in self.rows if row.lds and row.lds.undefined}

    def __str__(self) -> str:
        lines = [
            f"{self.case}: {self.examples} examples, {self.queries} queries, {self.subsets} subsets x {self.seeds}"
        ]
        lines += [
            f"{row.name:32} LDS {row.lds.mean:+.3f} [{row.lds.interval.low:+.3f}, {row.lds.interval.high:+.3f}]"
            for row in self.rows
            if row.lds is not None
        ]
        lines += [f"{name}: {count} of {self.queries} queries left out" for name, count in self.undefined.items()]
        return "\n".join([*lines, *self.advice])

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "case": self.case,
            "examples": self.examples,
            "queries": self.queries,
            "subsets": self.subsets,
            "seeds": self.seeds,
            "ceiling": _number(self.ceiling),
            "rows": [row.to_json() for row in self.rows],
            "left_out": self.left_out,
            "advice": self.advice,
        }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if isnan(value) else value


def _share(share: Share) -> dict[str, Any]:
    return {"value": share.value, "chance": share.chance, "interval": [*share.interval]}
