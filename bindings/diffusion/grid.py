"""The picture of an answer: what was asked about, then rows of training images with scores and heat maps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from gradsift.engine.extras import require

__all__ = ["PULLS", "PUSHES", "Row", "Tile", "draw", "overlay"]

PULLS, PUSHES = (214, 96, 0), (33, 84, 190)
"""Orange and blue, which colour-blind people tell apart too: regions that pull the query's loss down, or push it up."""

_SIDE, _GAP, _MARGIN, _TEXT, _LEFT = 176, 14, 28, 15, 300
"""Sizes in pixels: of an image, between images, around everything, of letters, of the column with the query."""

_INK, _FAINT, _PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)

_BRIGHTEST = 99.5
"""Percentile of all regions at which a colour is full: one bright spot must not hide the others."""


@dataclass(frozen=True, slots=True)
class Tile:
    """An image with what is written under it.

    Attributes:
        pixels: uint8 (H, W, 1 or 3).
        lines: the first stands out; long ones are wrapped.
        heat: what each region adds to the score, (h, w) of any size; None for none.
        frame: colour of a frame; None for none.
    """

    pixels: np.ndarray
    lines: Sequence[str]
    heat: np.ndarray | None = None
    frame: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Images side by side, with a heading and a sentence beneath it."""

    heading: str
    sentence: str
    tiles: Sequence[Tile]


def draw(title: str, query: Tile, rows: Sequence[Row], path: Path, note: str) -> None:
    """Write the picture of an answer.

    Args:
        query: what was asked about, at the left.
        rows: at its right, one below the other; with heat maps, each image is followed by itself under its map.
        note: at the foot: what scores mean.
    """
    heats = [np.abs(tile.heat) for row in rows for tile in row.tiles if tile.heat is not None]
    top = float(np.percentile(np.concatenate([heat.ravel() for heat in heats]), _BRIGHTEST)) if heats else 0.0
    blocks = [_row(row, top) for row in rows]
    left = _query(query)
    width = 2 * _MARGIN + _LEFT + max(block.width for block in blocks)
    height = _MARGIN + 44 + max(left.height, sum(block.height for block in blocks)) + (70 if heats else 40)
    page, pen = _page(width, height)
    pen.text((_MARGIN, _MARGIN - 6), title, font=_font(24), fill=_INK)
    page.paste(left, (_MARGIN, _MARGIN + 44))
    y = _MARGIN + 44
    for block in blocks:
        page.paste(block, (_MARGIN + _LEFT, y))
        y += block.height
    foot = height - (62 if heats else 34)
    pen.line((_MARGIN, foot - 8, width - _MARGIN, foot - 8), fill=(220, 220, 220))
    pen.text((_MARGIN, foot), note, font=_font(_TEXT), fill=_FAINT)
    if heats:
        _legend(page, pen, _MARGIN, foot + 26)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def overlay(pixels: np.ndarray, heat: np.ndarray, top: float) -> np.ndarray:
    """An image in grey under its heat map, uint8 (H, W, 3).

    Args:
        pixels: uint8 (H, W, 1 or 3).
        heat: (h, w), bilinear to the image's size.
        top: the value at which a colour is full.
    """
    height, width = pixels.shape[:2]
    values = torch.from_numpy(np.asarray(heat, dtype=np.float32))[None, None]
    fine = interpolate(values, size=(height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
    strength = np.clip(np.abs(fine) / top, 0, 1)[..., None] if top else np.zeros((height, width, 1))
    colour = np.where(fine[..., None] >= 0, np.array(PULLS), np.array(PUSHES))
    grey = 255 - 0.5 * (255 - pixels.mean(axis=2, keepdims=True))
    mixed: np.ndarray = np.round((1 - 0.85 * strength) * grey + 0.85 * strength * colour)
    return mixed.astype(np.uint8)


def _row(row: Row, top: float) -> Any:
    """A row of tiles as a picture."""
    columns = [[_image(tile.pixels, tile.frame)] for tile in row.tiles]
    for column, tile in zip(columns, row.tiles, strict=True):
        if tile.heat is not None:
            column.append(_image(overlay(_enlarged(tile.pixels), tile.heat, top), tile.frame))
    words = [[line for text in tile.lines for line in _wrapped(text, _SIDE)] for tile in row.tiles]
    deep = max(len(column) for column in columns) * (_SIDE + 6)
    height = 52 + deep + max(map(len, words)) * (_TEXT + 4) + 20
    page, pen = _page(len(columns) * (_SIDE + _GAP), height)
    pen.text((0, 0), row.heading, font=_font(19), fill=_INK)
    pen.text((0, 26), row.sentence, font=_font(_TEXT), fill=_FAINT)
    for place, (column, lines) in enumerate(zip(columns, words, strict=True)):
        x = place * (_SIDE + _GAP)
        for depth, image in enumerate(column):
            page.paste(image, (x, 52 + depth * (_SIDE + 6)))
        for number, line in enumerate(lines):
            fill = _INK if number == 0 else _FAINT
            pen.text((x, 52 + deep + number * (_TEXT + 4)), line, font=_font(_TEXT), fill=fill)
    return page


def _query(tile: Tile) -> Any:
    """The query as a picture, larger than the others."""
    side = _LEFT - 2 * _MARGIN
    lines = [line for text in tile.lines for line in _wrapped(text, side)]
    page, pen = _page(_LEFT, side + 60 + len(lines) * (_TEXT + 4))
    pen.text((0, 0), "Asked about", font=_font(19), fill=_INK)
    page.paste(_image(tile.pixels, tile.frame, side), (0, 52))
    for number, line in enumerate(lines):
        pen.text((0, 58 + side + number * (_TEXT + 4)), line, font=_font(_TEXT), fill=_FAINT if number else _INK)
    return page


def _legend(page: Any, pen: Any, x: int, y: int) -> None:
    """The colours of heat maps from one end to the other."""
    ramp = np.linspace(-1, 1, 240, dtype=np.float32)[None].repeat(14, axis=0)
    bar = overlay(np.full((14, 240, 3), 255, dtype=np.uint8), ramp, 1.0)
    words = "this region pulls away from the picture asked about", "this region pulls towards it"
    before = int(pen.textlength(words[0], font=_font(_TEXT))) + 10
    pen.text((x, y), words[0], font=_font(_TEXT), fill=_INK)
    page.paste(require("PIL.Image").fromarray(bar), (x + before, y + 2))
    pen.text((x + before + 250, y), f"{words[1]} (one scale for all)", font=_font(_TEXT), fill=_INK)


def _page(width: int, height: int) -> tuple[Any, Any]:
    page = require("PIL.Image").new("RGB", (width, height), _PAPER)
    return page, require("PIL.ImageDraw").Draw(page)


def _font(size: int) -> Any:
    return require("PIL.ImageFont").load_default(size=size)


def _enlarged(pixels: np.ndarray, side: int = _SIDE) -> np.ndarray:
    """At the size of a tile, so that the map on it is smooth where the pixels of a small image are not."""
    return np.asarray(_image(pixels, None, side))


def _image(pixels: np.ndarray, frame: tuple[int, int, int] | None, side: int = _SIDE) -> Any:
    image_module = require("PIL.Image")
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    small = max(pixels.shape[:2]) < side
    how = image_module.Resampling.NEAREST if small else image_module.Resampling.LANCZOS
    image = image_module.fromarray(np.ascontiguousarray(rgb)).resize((side, side), how)
    if frame is not None:
        require("PIL.ImageDraw").Draw(image).rectangle((0, 0, side - 1, side - 1), outline=frame, width=5)
    return image


def _wrapped(text: str, width: int, most: int = 4) -> list[str]:
    """Lines of about so many pixels, at most four of them."""
    letters = max(8, int(width / (0.52 * _TEXT)))
    return textwrap.wrap(text, letters, max_lines=most, placeholder=" ...") or [""]
