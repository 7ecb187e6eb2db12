"""A store of a diffusion model together with its pipeline and images, as its notes remember them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradsift.bindings.diffusion.dataset import Dataset
from gradsift.bindings.diffusion.encoder import Encoder
from gradsift.bindings.diffusion.images import Entry, Listed, open_images
from gradsift.bindings.diffusion.pipelines import load
from gradsift.bindings.space import Space
from gradsift.engine.losses import Diffusion
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["Notes", "Workspace", "cache_of", "remembered"]


@dataclass(frozen=True, slots=True)
class Notes:
    """What a command line store remembers of its making.

    Attributes:
        model, lora, data: paths or hub ids; local paths are absolute.
        dtype: of the model.
        modules: what was captured.
        resolution: of the images.
        prompt: the caption of images that have none.
        encoders: fingerprint of what made latents and text encodings.
        trained_on: what is measured, in words.
        kind: that these are notes of a diffusion model.
    """

    model: str
    data: str
    encoders: str
    resolution: int
    lora: str | None = None
    dtype: str | None = None
    modules: str | list[str] = "lora"
    prompt: str | None = None
    trained_on: str = ""
    kind: str = "diffusion"


def remembered(store: FeatureStore) -> Notes:
    """The notes of a store that `gradsift extract --kind diffusion` wrote.

    Raises:
        DataError: it was made from Python or of another kind of model.
    """
    notes: Mapping[str, Any] = store.metadata.get("notes") or {}
    if notes.get("kind") != "diffusion":
        raise DataError(
            f"'{store.path}' was not written by `gradsift extract --kind diffusion`, so it does not say which pipeline "
            "and images it was made from: extract with that, or ask it from Python with gs.topk"
        )
    return Notes(**{name: notes[name] for name in Notes.__dataclass_fields__ if name in notes})


def cache_of(store: Path) -> Path:
    """Where the latents and text encodings behind a store are kept."""
    return store.with_name(store.name + ".cache")


class Workspace(Space):
    """A store of a diffusion model that can be asked: its pipeline is loaded, its images can be read.

    Args:
        store: made by `gradsift extract --kind diffusion`.
        notes: where things are, see ``remembered``.
        device: see ``pipelines.load``.
    """

    data: Dataset
    loss: Diffusion
    summed: Diffusion

    def __init__(self, store: FeatureStore, notes: Notes, device: str | None = None) -> None:
        self.notes = notes
        self.pipeline = load(notes.model, notes.lora, dtype=notes.dtype, device=device)
        made_of = Path((store.metadata.get("compacted") or {}).get("source", store.path))
        kept = cache_of(made_of if cache_of(made_of).exists() else Path(store.path))
        self._encoder = Encoder(self.pipeline, notes.resolution, kept)
        if self._encoder.fingerprint != notes.encoders:
            raise DataError(
                f"the VAE or a text encoder of '{notes.model}' is not the one that '{store.path}' was extracted with: "
                "give that one, or extract again"
            )
        data = Dataset(open_images(notes.data), self._encoder, notes.prompt, check=False)
        settings, predict = store.metadata["loss"]["settings"], self.pipeline.family.predict
        loss = Diffusion.from_settings(settings, predict)
        summed = Diffusion.from_settings({**settings, "parts": False}, predict)
        places = {"model": notes.model, "adapter": notes.lora or notes.model}
        super().__init__(store, self.pipeline.denoiser, loss, notes.modules, data, places, summed)

    def questions(self, images: Sequence[Path], prompt: str | None, label: int | None) -> Dataset:
        """Queries that are images of the user's, all of them checked."""
        if prompt is not None and self.pipeline.family.encode is None:
            raise DataError(
                f"--prompt is given, but a {type(self.pipeline.pipe).__name__} reads no prompt: leave it out"
            )
        if label is not None and self.pipeline.classes is None:
            raise DataError(f"--label is given, but '{self.notes.model}' reads no class labels: leave it out")
        entries = []
        for image in images:
            if not image.is_file():
                raise DataError(f"image '{image}' does not exist")
            beside = image.with_suffix(".txt")
            text = beside.read_text(encoding="utf-8-sig").strip() if prompt is None and beside.is_file() else prompt
            entries.append(Entry(str(image), image, text, label))
        return Dataset(Listed(entries), self._encoder, check=False)

    def style(self, folder: Path, prompt: str | None) -> Dataset:
        """Queries that are a whole set of images, with the captions that they have."""
        return Dataset(open_images(folder), self._encoder, prompt, check=False)

    def own(self, ids: Sequence[str]) -> Dataset:
        """Queries that are training images."""
        entries = [self.data.entry(index) for index in self.data.find(ids)]
        return Dataset(Listed(entries), self._encoder, check=False)
