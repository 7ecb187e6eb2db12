"""The picture of an evaluation: who predicts retraining, what removal does, and what a byte buys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gradsift.bindings.render import bytes_text
from gradsift.engine.extras import require
from gradsift.engine.fidelity.result import Evaluation, Row
from gradsift.kernels.errors import DataError

__all__ = ["check", "draw"]

COLOURS = {"baseline": "#9aa0a6", "exact": "#3b6ea5", "sketch": "#1b7f4d", "codes": "#c9a227", "own": "#8e44ad"}
_WORDS = {
    "baseline": "no gradients",
    "exact": "whole gradients",
    "sketch": "sketched gradients",
    "codes": "compacted store",
    "own": "your own",
}


_WHOLE = ("exact dot", "exact fisher, k 0.3", "exact fisher, k 1")
"""Of the rows by whole gradients, those that are drawn over bytes."""


def check(path: Path) -> None:
    """Refuse a picture that could not be drawn, before hours of training.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: there is no such folder, or it writes no such files.
    """
    kinds = require("matplotlib.figure").Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise DataError(f"--out is '{path}', expected the name of a picture, such as fidelity.png")
    if not path.absolute().parent.is_dir():
        raise DataError(f"--out is '{path}' but there is no folder '{path.parent}': make it first")


def draw(path: Path, found: Evaluation) -> None:
    """Write the picture; ``check`` says whether that can be done."""
    figures = require("matplotlib.figure")
    rows = [row for row in reversed(found.ranked) if row.lds is not None]
    removed = [row for row in found.rows if row.qld is not None]
    sized = [row for row in rows if row.bytes is not None]
    panels = 1 + bool(sized) + bool(removed)
    figure = figures.Figure(figsize=(6 + 4.6 * (panels - 1), max(4.5, 0.24 * len(rows) + 1.6)), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=[1.35, *[1.0] * (panels - 1)])[0]
    _lds(axes[0], found, rows)
    if sized:
        _bytes(axes[1], found, rows)
    if removed:
        _qld(axes[-1], removed)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{found.case}: {found.examples} examples, {found.queries} queries, "
        f"{found.subsets} halves x {found.seeds} seeds"
    )
    figure.savefig(path, dpi=130)


def _lds(axes: Any, found: Evaluation, rows: list[Row]) -> None:
    for family, colour in COLOURS.items():
        places = [place for place, row in enumerate(rows) if row.family == family]
        if places:
            values = [rows[place].lds.mean for place in places]  # type: ignore[union-attr]
            halves = [(r.interval.high - r.interval.low) / 2 for p in places if (r := rows[p].lds) is not None]
            axes.barh(places, values, xerr=halves, color=colour, label=_WORDS[family], error_kw={"lw": 0.8})
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.axvline(0, color="black", lw=0.6)
    if found.ceiling == found.ceiling:
        axes.axvline(found.ceiling, color="black", lw=0.8, ls=":")
        where = (found.ceiling, 0.4 * len(rows))
        axes.annotate("most that can be predicted", where, fontsize=7, rotation=90, va="bottom", ha="right")
    axes.set(title="Prediction of retraining (LDS)", xlim=(None, 1.0), ylim=(-0.7, len(rows) - 0.3))
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _bytes(axes: Any, found: Evaluation, rows: list[Row]) -> None:
    """LDS over bytes per example, one line per method and family."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.bytes is not None and row.lds is not None:
            lines.setdefault((row.family, _without_size(row.name)), []).append((row.bytes, row.lds.mean))
    for (family, name), line in lines.items():
        if family != "exact" or name in _WHOLE:
            line.sort()
            axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[family], lw=1.2, ms=4)
            axes.annotate(f"  {name}", line[-1], fontsize=7, va="center")
    words = next((row for row in reversed(rows) if row.family == "baseline"), None)
    if words is not None and words.lds is not None:
        axes.axhline(words.lds.mean, color=COLOURS["baseline"], lw=1.0, ls="--")
        axes.annotate(words.name, (0.01, words.lds.mean), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda size, _: bytes_text(size))
    axes.margins(x=0.25)
    axes.set(title="What a byte buys", xlabel="bytes per example", ylabel="LDS")


def _without_size(name: str) -> str:
    """What rows of one method have in common."""
    return re.sub(r", (dim \d+|\d+ B)$", "", name)


def _qld(axes: Any, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: row.qld.mean)  # type: ignore[union-attr]
    values = [row.qld.mean for row in rows if row.qld]
    halves = [(row.qld.interval.high - row.qld.interval.low) / 2 for row in rows if row.qld]
    axes.barh(
        [r.name for r in rows], values, xerr=halves, color=[COLOURS[r.family] for r in rows], error_kw={"lw": 0.8}
    )
    axes.axvline(0, color="black", lw=0.6)
    axes.tick_params(axis="y", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.set(title="Rise of the query's loss\nwithout its best 1 % (QLD)")
