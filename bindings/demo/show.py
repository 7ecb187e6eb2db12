"""What the demo prints, and its one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from gradsift.bindings.demo.case import Case
from gradsift.bindings.demo.report import Behaviour, Found, Run
from gradsift.bindings.render import LEGEND, coloured, number, table
from gradsift.engine.extras import require
from gradsift.engine.losses import IGNORE
from gradsift.kernels.errors import MissingExtraError

__all__ = ["draw", "show_answers", "show_found", "show_precision"]

_SHOWN = 8
"""Records of the answer that are printed."""


def show_answers(console: Console, case: Case, columns: Mapping[str, Behaviour]) -> None:
    """The model's answer to each question under each training, and the loss of the planted behaviour."""
    rows: list[Sequence[Any]] = [
        [label, *(behaviour.answers[i] for behaviour in columns.values())] for i, label in enumerate(case.labels)
    ]
    rows.append([Text("loss of the planted answers", style="dim"), *(f"{b.loss:.2f}" for b in columns.values())])
    out = table(["", *columns], rows, wide="")
    for column in out.columns[1:]:
        column.justify, column.no_wrap, column.overflow = "left", False, "fold"
    console.print(out)


def show_found(console: Console, run: Run, found: Found) -> None:
    """The most influential records, planted or not, with the tokens that pull."""
    rows = found.rows[:_SHOWN].tolist()
    colours = console.color_system is not None
    lines = []
    for place, (row, shares) in enumerate(zip(rows, run.pulls(rows), strict=True)):
        example = run.data.example(row)
        scored = np.flatnonzero(example.labels != IGNORE)
        prompt = Text(run.prompt_text(row), style="dim")  # no loss, so it neither pulls nor pushes
        answer = coloured(*_in_words(example.pieces, shares, scored), marks=not colours)
        mark = Text("planted", style="bold green") if run.planted[row] else Text("ordinary", style="dim")
        lines.append((place + 1, number(float(found.scores[place])), mark, Text.assemble(prompt, "  ", answer)))
    console.print(table(("", "score", "in truth", "record"), lines, wide="record"))
    console.print(LEGEND, highlight=False)


def show_precision(console: Console, found: Found) -> None:
    """precision@10 of gradsift beside every baseline: of one question, and of all as one."""
    rows: list[Sequence[Any]] = []
    for method in reversed(_ranked(found)):
        alone = found.alone[method]
        style = "bold" if method == "gradsift" else ""
        bar = Text("█" * round(20 * alone), style="green" if method.startswith("gradsift") else "dim")
        rows.append((Text(method, style=style), f"{alone:.2f}", f"{found.together[method]:.2f}", bar))
    out = table(("found by", "precision@10,\none question", "all questions\nas one", ""), rows, wide="")
    out.columns[0].justify = "left"
    console.print(out)


def draw(path: Path, case: Case, found: Found, planted: np.ndarray, losses: Mapping[str, float]) -> bool:
    """Three panels: who finds the records, every record's score, and what taking records out does.

    Returns:
        False when matplotlib is not installed, and nothing is drawn.
    """
    try:
        figures = require("matplotlib.figure")
    except MissingExtraError:
        return False
    ours, other, grey = "#1b7f4d", "#c9a227", "#9aa0a6"
    figure = figures.Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.3, 1))

    methods = _ranked(found)
    values = [found.alone[m] for m in methods]
    bars = left.barh(methods, values, color=[ours if m.startswith("gradsift") else grey for m in methods])
    left.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    left.set(xlim=(0, 1.15), title="Planted records among the first 10\n(share, mean over the questions)")

    ranks = np.arange(1, len(found.rows) + 1)
    is_planted = planted[found.rows]
    middle.vlines(ranks[~is_planted], 0, found.scores[~is_planted], color=grey, lw=1, label="ordinary record")
    middle.vlines(ranks[is_planted], 0, found.scores[is_planted], color=ours, lw=2, label="planted record")
    middle.axhline(0, color="black", lw=0.6)
    middle.set(title="gradsift's score of every record", xlabel="rank", ylabel="influence on the answers")
    middle.legend(frameon=False)

    names = [name.replace(" the ", "\nthe ").replace(" random", "\nrandom") for name in losses]
    colours = [ours if "named" in name else other if "random" in name else grey for name in losses]
    bars = right.bar(names, list(losses.values()), color=colours)
    right.bar_label(bars, [f"{value:.2f}" for value in losses.values()], padding=2)
    right.set(title="Loss of the planted answers\n(high: the behaviour is gone)", ylabel="per token")
    right.margins(y=0.15)

    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(case.claim)
    figure.savefig(path, dpi=130)
    return True


def _ranked(found: Found) -> list[str]:
    """Methods, the best last; of equals the one named first comes later."""
    names = list(found.alone)
    return sorted(reversed(names), key=lambda method: (found.alone[method], found.together[method]))


def _in_words(pieces: Sequence[str], shares: np.ndarray, places: np.ndarray) -> tuple[list[str], list[float]]:
    """The tokens at these places put together to words, with the sum of their shares; the closing token is left out."""
    texts: list[str] = []
    sums: list[float] = []
    for place in places[:-1]:
        if texts and not pieces[place][:1].isspace():
            texts[-1] += pieces[place]
            sums[-1] += float(shares[place])
        else:
            texts.append(pieces[place])
            sums.append(float(shares[place]))
    return texts, sums
