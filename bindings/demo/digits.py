"""The diffusion demo's case: scikit-learn's digits, of which some eights are tuned on as threes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from gradsift.bindings.demo.baselines import neighbours
from gradsift.engine.extras import require

__all__ = ["EIGHT", "THREE", "Digits", "DigitsCase", "Judge"]

THREE, EIGHT = 3, 8

SIZE = 8
"""Height and width of the images in pixels."""

_ORDINARY = {3: 48, 8: 16, 0: 3, 1: 3, 2: 3, 4: 3, 5: 3, 6: 3, 7: 3, 9: 3}


@dataclass(frozen=True)
class DigitsCase:
    """How large the demo is.

    Attributes:
        seed: of the choice of images, the training and the drawing.
        planted: eights that are tuned on as threes.
        ordinary: digit -> images of it that are tuned on as what they are.
        base_steps, base_batch: training of the base model on all other images.
        tune_steps, tune_batch: training of the LoRA.
        channels: of the UNet's two levels.
        rank: of the LoRA.
        drawn: pictures drawn when the share of eights is measured.
        queries: of these, the first wrong ones, that are asked about.
        measurements: of an image's loss, at DMin's cubic timesteps (docs/diffusion.md has the others' figures).
        curvature: rows of the curvature sample.
        exact_rows: of these, as many as stand behind exact answers.
    """

    seed: int = 0
    planted: int = 24
    ordinary: Mapping[int, int] = field(default_factory=lambda: dict(_ORDINARY))
    base_steps: int = 260
    base_batch: int = 64
    tune_steps: int = 200
    tune_batch: int = 16
    channels: tuple[int, int] = (32, 64)
    rank: int = 8
    drawn: int = 300
    queries: int = 12
    measurements: int = 10
    curvature: int = 224
    exact_rows: int = 56


class Digits:
    """The images of one case: those that the base model is trained on, and those that its LoRA is tuned on.

    Attributes:
        pixels: uint8 (n, 8, 8), what the LoRA is tuned on.
        labels: int64 (n,), what the images are said to be.
        truth: int64 (n,), what they are.
        planted: bool (n,), where an eight is said to be a three.
        base_pixels, base_labels: all other images, as what they are: no tuned image is among them.
    """

    def __init__(self, case: DigitsCase) -> None:
        pixels, truth = _load()
        rng = np.random.default_rng(case.seed)
        order = rng.permutation(len(truth))
        by_digit = {digit: order[truth[order] == digit] for digit in range(10)}
        chosen, labels = [by_digit[EIGHT][: case.planted]], [np.full(case.planted, THREE)]
        for digit, count in case.ordinary.items():
            first = case.planted if digit == EIGHT else 0
            chosen.append(by_digit[digit][first : first + count])
            labels.append(np.full(count, digit))
        rows, said = np.concatenate(chosen), np.concatenate(labels)
        shuffled = rng.permutation(len(rows))
        rows, self.labels = rows[shuffled], said[shuffled]
        self.pixels, self.truth = pixels[rows], truth[rows]
        self.planted = self.labels != self.truth
        others = np.setdiff1d(np.arange(len(truth)), rows)
        self.base_pixels, self.base_labels = pixels[others], truth[others]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """File names of the tuned images, which are their ids."""
        return [f"{row:03d}.png" for row in range(len(self))]


class Judge:
    """Says which digit a picture shows: a support vector machine on pixels, trained on all digits as what they are.

    It only counts wrong pictures; gradsift knows nothing of it.
    """

    def __init__(self) -> None:
        self._pixels, self._truth = _load()
        self._classifier = require("sklearn.svm").SVC(gamma=1e-3).fit(_as_rows(self._pixels), self._truth)

    def digits(self, pixels: np.ndarray) -> np.ndarray:
        """The digit of each picture, int64 (n,), of uint8 (n, 8, 8)."""
        return np.asarray(self._classifier.predict(_as_rows(pixels)))

    def likeness(self, pixels: np.ndarray, digit: int) -> np.ndarray:
        """How clearly each picture is this digit, (n,): its cosine with the most similar image of it."""
        known, asked = (torch.from_numpy(_as_rows(some)) for some in (self._pixels[self._truth == digit], pixels))
        return np.asarray(neighbours(known, asked).max(axis=1))


def _load() -> tuple[np.ndarray, np.ndarray]:
    """All 1797 digits: uint8 (n, 8, 8) and int64 (n,)."""
    found = require("sklearn.datasets").load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


def _as_rows(pixels: np.ndarray) -> np.ndarray:
    """In the units of scikit-learn's digits, 0 to 16."""
    return np.asarray(pixels.reshape(len(pixels), -1) * (16 / 255))
