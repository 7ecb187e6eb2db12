"""The diffusion demo's picture: a wrong drawing, the images that taught it with the regions that pull, and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.bindings.demo.digits import EIGHT, THREE
from gradsift.bindings.demo.digits_run import Drawn, Found, Run
from gradsift.bindings.diffusion.grid import overlay
from gradsift.engine.extras import require
from gradsift.kernels.errors import MissingExtraError

__all__ = ["paint"]

_SHOWN = 8
"""Images at each end of the answer."""

_OURS, _OTHER, _GREY, _WRONG = "#1b7f4d", "#c9a227", "#9aa0a6", "#b3261e"

_FINE = 16
"""Points per pixel of an image."""


def paint(path: Path, run: Run, found: Found, drawn: Mapping[str, Drawn]) -> bool:
    """Write the picture.

    Args:
        drawn: training -> what its model draws; picture i of each began with the same noise.

    Returns:
        False when matplotlib is not installed, and nothing is written.
    """
    try:
        figures = require("matplotlib.figure")
    except MissingExtraError:
        return False
    figure = figures.Figure(figsize=(15, 10.6), layout="constrained")
    figure.suptitle(
        f"Asked for a {THREE}, the tuned model now and then draws an {EIGHT}. Which training images taught it that?",
        fontsize=17,
    )
    head, most, least = figure.subfigures(3, 1, height_ratios=(1.0, 1.18, 1.18))
    left, middle, right = head.subfigures(1, 3, width_ratios=(1.3, 1, 1))
    _same_noise(left, found.shown, drawn)
    _precision(middle, found, run.case.planted)
    _shares(right, drawn)
    top = float(np.percentile(np.abs(found.answer.tokens), 99.5)) if found.answer.tokens is not None else 0.0
    n, picture = len(found.rows), drawn["tuned"].pictures[found.shown]
    _answers(
        most,
        run,
        found,
        picture,
        range(_SHOWN),
        top,
        "The images that pull most towards this drawing, and where they pull",
    )
    _answers(least, run, found, picture, range(n - _SHOWN, n), top, "The other end of the ranking")
    figure.text(
        0.5,
        -0.012,
        "Frames: green = planted, an eight that is labelled 3; grey = labelled as what it is. gradsift sees images and "
        "labels only, not which are planted.\nHeat maps: exact gradients of the loss at each pixel; orange pulls "
        "towards the drawing, blue pushes away; they add up to the score above.",
        ha="center",
        va="top",
        fontsize=11,
        color="#444444",
    )
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    return True


def _same_noise(figure: Any, shown: int, drawn: Mapping[str, Drawn]) -> None:
    """One start, drawn to its end by each model."""
    figure.suptitle(f"“Draw a {THREE}”, from the same noise", fontsize=13)
    for axes, (name, found) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        digit = int(found.digits[shown])
        _image(axes, found.pictures[shown], _WRONG if digit != THREE else _GREY)
        axes.set_title(_in_lines(name), fontsize=11)
        axes.set_xlabel(f"looks like {digit}", fontsize=11)


def _precision(figure: Any, found: Found, planted: int) -> None:
    axes = figure.subplots()
    methods = sorted(found.alone, key=lambda name: found.alone[name])
    colours = [_OURS if name.startswith("gradsift") else _GREY for name in methods]
    bars = axes.barh([_in_lines(name) for name in methods], [found.alone[name] for name in methods], color=colours)
    axes.bar_label(bars, [f"{found.alone[name]:.2f}" for name in methods], padding=3)
    axes.set(xlim=(0, 1.2), xticks=(0, 0.5, 1))  # room for the last label
    axes.set_title("Planted images among the first 10\n(mean over the wrong drawings)", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)


def _shares(figure: Any, drawn: Mapping[str, Drawn]) -> None:
    axes = figure.subplots()
    colours = [_OURS if "named" in name else _OTHER if "random" in name else _GREY for name in drawn]
    values = [100 * found.share for found in drawn.values()]
    bars = axes.bar([_in_lines(name) for name in drawn], values, color=colours)
    axes.bar_label(bars, [f"{value:.0f} %" for value in values], padding=2)
    axes.set_title(f"Eights among the drawn “{THREE}”s", fontsize=12)
    axes.set(yticks=[])
    axes.margins(y=0.15)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _answers(figure: Any, run: Run, found: Found, picture: np.ndarray, places: range, top: float, title: str) -> None:
    """The drawing, then images of the answer over their heat maps."""
    figure.suptitle(title, fontsize=13)
    answer, digits = found.answer, run.digits
    grid = figure.subplots(2, 1 + len(places))
    _image(grid[0, 0], picture, _WRONG)
    grid[0, 0].set_title(f"the drawing\n(asked for a {THREE})", fontsize=11)
    grid[1, 0].axis("off")
    for column, place in enumerate(places, start=1):
        row = int(answer.rows[0, place])
        colour = _OURS if digits.planted[row] else _GREY
        _image(grid[0, column], digits.pixels[row], colour)
        truth = f"an {EIGHT}" if digits.planted[row] else "right"
        style = {"color": _OURS, "fontweight": "bold"} if digits.planted[row] else {}
        grid[0, column].set_title(f"labelled {digits.labels[row]}: {truth}", fontsize=11, **style)
        grid[0, column].set_xlabel(f"{place + 1}.  {answer.scores[0, place]:+.3g}", fontsize=11)
        if answer.tokens is not None:
            fine = _enlarged(digits.pixels[row])[..., None]
            _image(grid[1, column], overlay(fine, answer.tokens[0, place], top), colour)


def _image(axes: Any, pixels: np.ndarray, frame: str) -> None:
    axes.imshow(_enlarged(pixels) if pixels.ndim == 2 else pixels, cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=frame, linewidth=4)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Smooth, so that 8 x 8 pixels read as a digit."""
    image, side = require("PIL.Image"), pixels.shape[0] * _FINE
    return np.asarray(image.fromarray(pixels).resize((side, side), image.Resampling.BICUBIC))


def _in_lines(name: str) -> str:
    for word in ("within", "the named", "random", "no curvature", "tuning"):
        name = name.replace(f" {word}", f"\n{word}")
    return name
