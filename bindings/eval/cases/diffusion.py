"""The diffusion demo's model: which images taught it to draw an eight when it is asked for a three?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsift.bindings.demo.digits import EIGHT, THREE, Digits, DigitsCase
from gradsift.bindings.demo.digits_model import trained_base, tuned
from gradsift.bindings.diffusion.images import to_pixels
from gradsift.bindings.hush import hush
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.losses import Diffusion, NoiseSchedule

__all__ = ["diffusion_case"]

_QUERIES = 20
_BATCH = 16


def diffusion_case(
    folder: Path, report: Callable[[int, int], None] = lambda done, total: None, sizes: DigitsCase | None = None
) -> FidelityCase:
    """112 digits, 24 of them eights that are said to be threes; the queries are other eights, asked for as threes.

    Args:
        folder: where the base model is kept.
        report: called with steps done and steps in all while the base model trains.
        sizes: of the demo, unless given.
    """
    hush("diffusers")
    sizes = sizes or DigitsCase()
    digits = Digits(sizes)
    pipe = trained_base(sizes, digits, folder / "digits_base", report)
    eights = np.flatnonzero(digits.base_labels == EIGHT)[:_QUERIES]
    schedule = NoiseSchedule.of(pipe.scheduler)

    def retrain(rows: Sequence[int], seed: int) -> Any:
        return tuned(replace(sizes, seed=seed), pipe, digits, np.asarray(rows), lambda done, total: None)

    return FidelityCase(
        name="diffusion",
        key=f"1 {sizes}",
        examples=len(digits),
        retrain=retrain,
        batches=_batches(digits.pixels, digits.labels),
        queries=_batches(digits.base_pixels[eights], np.full(len(eights), THREE)),
        loss=Diffusion(schedule),
        measures={
            "timesteps": Diffusion(schedule, parts=True),
            "squared_prediction": Diffusion(schedule, measure="squared_prediction"),
        },
        inputs=lambda batch: batch["latents"].flatten(1) + 1,  # brightness
        labels=digits.planted.astype(np.int64),
        query_labels=np.ones(len(eights), dtype=np.int64),
    )


def _batches(pixels: np.ndarray, labels: np.ndarray) -> list[dict[str, Tensor]]:
    latents = to_pixels(pixels.transpose(1, 2, 0))[:, None]
    classes = torch.from_numpy(labels.astype(np.int64))
    return [
        {"latents": some, "class_labels": said}
        for some, said in zip(latents.split(_BATCH), classes.split(_BATCH), strict=True)
    ]
