"""The diffusion demo in order: tune, draw, extract, ask, compare with baselines, and take images out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradsift.bindings.curvature import curvature_of
from gradsift.bindings.demo.baselines import neighbours, precision
from gradsift.bindings.demo.digits import EIGHT, THREE, Digits, DigitsCase, Judge
from gradsift.bindings.demo.digits_model import draw, trained_base, tuned
from gradsift.bindings.demo.steps import Ticks
from gradsift.bindings.diffusion.dataset import Dataset
from gradsift.bindings.diffusion.encoder import Encoder
from gradsift.bindings.diffusion.images import open_images
from gradsift.bindings.diffusion.pipelines import load
from gradsift.bindings.diffusion.workspace import Notes, Workspace
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.answers.rescore import Rescorer
from gradsift.engine.answers.search import TopK, topk
from gradsift.engine.extraction.extract import extract
from gradsift.engine.extras import require
from gradsift.engine.losses import Diffusion, NoiseSchedule
from gradsift.engine.store.reader import FeatureStore

__all__ = ["Drawn", "Found", "Pictures", "Run", "pixel_neighbours"]

_BATCH = 16
"""Images in a batch."""


@dataclass(frozen=True)
class Drawn:
    """What a model draws when it is asked for threes.

    Attributes:
        pictures: uint8 (n, 8, 8); picture i begins with the same noise for every model.
        digits: what the judge sees in them, (n,).
    """

    pictures: np.ndarray
    digits: np.ndarray

    @property
    def share(self) -> float:
        """Of eights."""
        return float((self.digits == EIGHT).mean())


@dataclass(frozen=True)
class Found:
    """Who finds the planted images.

    Attributes:
        rows: all images for the wrong pictures asked about as one, most influential first.
        alone: method -> precision@10 of one wrong picture, averaged over the pictures.
        together: method -> share of planted images among as many first ones as were planted, of all pictures as one.
        shown: number of the picture that is shown: a clear eight that was a clear three before tuning.
        answer: exact scores of all images for that picture, best first, with what each pixel adds.
    """

    rows: np.ndarray
    alone: dict[str, float]
    together: dict[str, float]
    shown: int
    answer: TopK


class Run:
    """One demo in one folder; its methods are the steps, to be called in the order in which they stand.

    Args:
        case: how large it is.
        folder: where images, models and store go. A base model of the same case is used again, the rest replaced.
        ticks: called as ``ticks(step, steps)`` while something long runs.
    """

    def __init__(self, case: DigitsCase, folder: Path, ticks: Ticks = lambda step, steps: None) -> None:
        self.case, self.folder, self.ticks = case, folder, ticks
        self.digits, self.judge = Digits(case), Judge()
        self.base_path, self.lora_path = folder / "digits_base", folder / "digits_lora"
        self.data_path, self.store_path = folder / "digits", folder / "digits.zarr"
        self.query_path = folder / "wrong.png"
        folder.mkdir(parents=True, exist_ok=True)
        self._write_images()
        self._pipe = trained_base(case, self.digits, self.base_path, ticks)
        self.model: Any = self._pipe.unet

    def drawn(self) -> Drawn:
        """Pictures of the model as it is now."""
        seed = self.case.seed + 1
        pictures = draw(self.model, self._pipe.scheduler, THREE, self.case.drawn, seed, self.ticks)
        return Drawn(pictures, self.judge.digits(pictures))

    def tune(self, without: Iterable[int] = ()) -> None:
        """Tune a new LoRA on all images but some."""
        left_out = set(without)
        rows = np.array([i for i in range(len(self.digits)) if i not in left_out])
        self.model = tuned(self.case, self._pipe, self.digits, rows, self.ticks)

    def extract(self) -> FeatureStore:
        """What `gradsift extract --kind diffusion` would write of the tuned model, whose LoRA is saved first."""
        self.model.save_pretrained(str(self.lora_path))
        pipeline = load(str(self.base_path), str(self.lora_path), device="cpu")
        schedule = NoiseSchedule.of(pipeline.pipe.scheduler)
        loss = Diffusion(schedule, measurements=self.case.measurements, timesteps="cubic")
        images = Dataset(open_images(self.data_path), Encoder(pipeline))
        notes = Notes(
            model=str(self.base_path.resolve()),
            data=str(self.data_path.resolve()),
            lora=str(self.lora_path.resolve()),
            encoders=images.encoder.fingerprint,
            resolution=images.encoder.resolution,
            trained_on=loss.kind,
        )
        shutil.rmtree(self.store_path, ignore_errors=True)
        return extract(
            pipeline.denoiser,
            images.batches(_BATCH),
            loss,
            self.store_path,
            block=len(images),
            curvature=self.case.curvature,
            progress=lambda update: self.ticks(update.rows, update.total or update.rows),
            notes=asdict(notes),
        )

    def wrong(self, drawn: Drawn) -> np.ndarray:
        """Numbers of the first pictures that show an eight."""
        return np.flatnonzero(drawn.digits == EIGHT)[: self.case.queries]

    def ask(self, store: FeatureStore, before: Drawn, drawn: Drawn) -> Found:
        """Rank all images by gradsift and by the baselines, for some of the wrong pictures.

        Args:
            before, drawn: pictures of the model before and after tuning.

        Raises:
            DataError: as of ``Workspace``.
        """
        chosen = self.wrong(drawn)
        wrong, planted, count = drawn.pictures[chosen], self.digits.planted, self.case.planted
        space = Workspace(store, Notes(**store.metadata["notes"]), "cpu")
        features = space.capture(Pictures(wrong))
        alone, together = {}, {}
        scorers: dict[str, Literal["fisher", "dot"]] = {"gradsift": "fisher", "gradsift, no curvature": "dot"}
        for name, scorer in scorers.items():
            alone[name] = float(planted[topk(store, features, 10, scorer).rows].mean())
            together[name] = float(planted[topk(store, features, count, scorer, as_set=True).rows].mean())
        for name, scores in pixel_neighbours(self.digits, wrong).items():
            alone[name] = precision(scores, planted)
            together[name] = precision(scores.mean(axis=0, keepdims=True), planted, count)
        alone["random"] = together["random"] = float(planted.mean())
        rows = topk(store, features, len(store), "fisher", as_set=True).rows[0]
        shown = self._clearest(before, drawn)
        return Found(rows, alone, together, shown, self._exactly(space, drawn.pictures[shown]))

    def random_rows(self, count: int) -> list[int]:
        """As many images drawn at random, always the same ones."""
        return sorted(random.Random(self.case.seed).sample(range(len(self.digits)), count))

    def _clearest(self, before: Drawn, drawn: Drawn) -> int:
        """Of the pictures that were threes before tuning and are eights now, the clearest as both."""
        clear = np.minimum(self.judge.likeness(before.pictures, THREE), self.judge.likeness(drawn.pictures, EIGHT))
        return int(np.argmax(clear + (before.digits == THREE) + 2 * (drawn.digits == EIGHT)))

    def _exactly(self, space: Workspace, picture: np.ndarray) -> TopK:
        """Exact scores of all images for one picture, which is also written for the command line."""
        _write_png(self.query_path, picture)
        question = Pictures(picture[None])
        curvature = curvature_of(space, self.case.exact_rows)
        total, done = curvature.uses("fisher"), 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.ticks(done, total)

        v = curvature.correct(gradient(space.model, question.fetch([0]), space.loss), progress=advance)
        rescorer = Rescorer(space.model, lambda rows: _batches(space, rows), space.loss.token_losses, [v])
        n = len(space.store)
        return topk(space.store, space.capture(question), n, rescore=rescorer, shortlist=n)

    def _write_images(self) -> None:
        """The tuned images as a folder with labels, as anybody would have them."""
        shutil.rmtree(self.data_path, ignore_errors=True)
        self.data_path.mkdir()
        lines = []
        for name, pixels, label in zip(self.digits.names, self.digits.pixels, self.digits.labels.tolist(), strict=True):
            _write_png(self.data_path / name, pixels)
            lines.append(json.dumps({"file_name": name, "label": label}))
        (self.data_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def pixel_neighbours(digits: Digits, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Cosines of brightness with every tuned image, (q, n): of all, and with those of another label last."""
    flat = [torch.from_numpy(p.reshape(len(p), -1).astype(np.float32)) for p in (digits.pixels, pictures)]
    scores = neighbours(*flat)
    within = np.where(digits.labels == THREE, scores, scores - 2)
    return {"pixel neighbours within the label": within, "pixel neighbours": scores}


class Pictures:
    """Pictures drawn for the label three, as queries."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def id(self, index: int) -> int:
        """Its number."""
        return index

    def record(self, index: int) -> dict[str, Any]:
        """Its number and label."""
        return {"id": index, "label": THREE}

    def find(self, ids: Sequence[str | int]) -> list[int]:
        """Numbers stand where they say."""
        return [int(name) for name in ids]

    def fetch(self, indices: Sequence[int]) -> dict[str, Any]:
        """One batch."""
        rows = list(indices)
        latents: Tensor = torch.from_numpy(self._pixels[rows].astype(np.float32))[:, None] / 127.5 - 1
        return {"ids": rows, "latents": latents, "class_labels": torch.full((len(rows),), THREE)}


def _batches(space: Workspace, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(rows), _BATCH):
        yield space.fetch(rows[start : start + _BATCH])


def _write_png(path: Path, pixels: np.ndarray) -> None:
    require("PIL.Image").fromarray(pixels).save(path)
