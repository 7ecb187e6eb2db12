"""A data set of images as batches of latents and conditions, checked as a whole before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from gradsift.bindings.diffusion.encoder import Encoder
from gradsift.bindings.diffusion.families import nested
from gradsift.bindings.diffusion.images import Entries, Entry, Picture, read_picture
from gradsift.kernels.errors import DataError

__all__ = ["Batches", "Dataset", "Survey"]

_MAX_NAMED = 10

Batch = dict[str, Any]
Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class Survey:
    """What reading every image once has shown.

    Attributes:
        records: entries in the data.
        enlarged: images smaller than the resolution.
        cropped: images of which a side was cut.
        prompts: different prompts.
        bad: entries left out; ``named`` says why for the first ten.
    """

    records: int = 0
    enlarged: int = 0
    cropped: int = 0
    prompts: int = 0
    bad: int = 0
    named: list[str] = field(default_factory=list)


class _Found(NamedTuple):
    """What is remembered of an image: not its caption and pixels, which are read again when they are needed."""

    key: bytes
    original: tuple[int, int]
    crop: tuple[int, int]


class Dataset:
    """Images with what the denoiser reads beside them: random access, ids and batches.

    Args:
        entries: see ``open_images``.
        encoder: how they become latents and conditions.
        prompt: the caption of every image that has none.
        check: read every image now. Without it there are no batches: enough for looking examples up by their ids.
        skip_bad: leave unusable images out, and count and name them, instead of refusing the data.
        progress: called with how many are done, of how many, and what is being done.

    Attributes:
        survey: counts of the whole.

    Raises:
        DataError: the first unusable image, by name; or nothing usable is left.
    """

    def __init__(
        self,
        entries: Entries,
        encoder: Encoder,
        prompt: str | None = None,
        *,
        check: bool = True,
        skip_bad: bool = False,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.entries = entries
        self.encoder = encoder
        self._prompt = prompt
        self.survey = Survey(records=len(entries))
        self._rows = list(range(len(entries)))
        self._places: dict[str, int] = {}
        self._found: dict[int, _Found] = {}
        if check:
            self._check(skip_bad, progress)

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, index: int) -> Entry:
        """The image as the data names it, with the caption that it is read with."""
        return self._entry(self._rows[index])

    def id(self, index: int) -> str:
        """The image's id."""
        return self.entry(index).id

    def record(self, index: int) -> dict[str, Any]:
        """The image as a record: its id, its caption or label, and the other columns of its record."""
        entry = self.entry(index)
        named = {"text": entry.text, "label": entry.label}
        return {"id": entry.id, **{k: value for k, value in named.items() if value is not None}, **entry.columns}

    def picture(self, index: int) -> Picture:
        """The image as the model sees it."""
        return self._picture(self.entry(index))

    def find(self, ids: Sequence[str | int]) -> list[int]:
        """Where images with these ids stand.

        Raises:
            DataError: an id is not in the data.
        """
        if not self._places:
            for index in range(len(self)):
                try:
                    self._places.setdefault(self.id(index), index)  # later ones of the same id were left out
                except DataError:
                    continue  # an entry that was left out
        missing = [name for name in map(str, ids) if name not in self._places]
        if missing:
            raise DataError(f"id {missing[0]!r} is not in the data: give the data that was extracted")
        return [self._places[str(name)] for name in ids]

    def fetch(self, indices: Sequence[int]) -> Batch:
        """One batch of these images, in this order."""
        encoder, family = self.encoder, self.encoder.pipeline.family
        latents, conditions = [], []
        for index in indices:
            entry = self.entry(index)
            found = self._found.get(self._rows[index]) or self._seen(entry)
            latents.append(encoder.latents(found.key, partial(self._picture, entry)))
            mine = {}
            if family.encode is not None:
                mine.update(encoder.text(entry.text or ""))
            if family.sizes is not None:
                mine.update(family.sizes(found.original, found.crop, encoder.resolution))
            if encoder.pipeline.classes is not None:
                mine["class_labels"] = torch.tensor(entry.label)
            conditions.append(mine)
        names = conditions[0] if conditions else {}
        stacked = {name: torch.stack([each[name] for each in conditions]) for name in names}
        return {"ids": [self.id(i) for i in indices], "latents": torch.stack(latents), **nested(stacked)}

    def batches(self, batch_size: int) -> Batches:
        """All images in batches of so many, in order."""
        return Batches(self, batch_size)

    def _check(self, skip_bad: bool, progress: Progress) -> None:
        rows: list[int] = []
        places: dict[str, int] = {}
        given: set[str] = set()
        prompts: dict[str, None] = {}
        for row in range(len(self.entries)):
            try:
                entry = self._entry(row)
                if entry.id in given:  # also to one that was left out: whoever looks it up finds that one first
                    raise DataError(f"id '{entry.id}' was given to an earlier image: ids must differ")
                given.add(entry.id)
                found = self._seen(entry)
            except DataError as error:
                place, text = self.entries.place(row), str(error)
                sentence = text if place in text else f"{place}: {text}"
                if not skip_bad:
                    raise DataError(sentence) from None
                self.survey.bad += 1
                if len(self.survey.named) < _MAX_NAMED:
                    self.survey.named.append(sentence)
            else:
                self._found[row] = found
                places[entry.id] = len(rows)
                rows.append(row)
                if entry.text is not None:
                    prompts[entry.text] = None
                smaller, larger = sorted(found.original)
                self.survey.enlarged += smaller < self.encoder.resolution
                self.survey.cropped += smaller != larger
            progress(row + 1, len(self.entries), "checking images")
        if not rows:
            raise DataError(f"none of the {len(self.entries)} images is usable; the first: {self.survey.named[0]}")
        self._rows, self._places = rows, places
        self._encode(list(prompts), progress)

    def _encode(self, prompts: Sequence[str], progress: Progress) -> None:
        """Everything that is not in the cache yet, and nothing else in it."""
        encoder = self.encoder
        for index, row in enumerate(self._rows):
            encoder.latents(self._found[row].key, partial(self._picture_of, row))
            progress(index + 1, len(self._rows), "encoding images")
        keys = {self._found[row].key for row in self._rows}
        if encoder.pipeline.family.encode is not None:
            self.survey.prompts = len(prompts)
            for index, prompt in enumerate(prompts):
                encoder.text(prompt)
                keys.add(encoder.text_key(prompt))
                progress(index + 1, len(prompts), "encoding prompts")
        encoder.keep(keys)

    def _seen(self, entry: Entry) -> _Found:
        picture = self._picture(entry)
        return _Found(self.encoder.image_key(picture), picture.original, picture.crop)

    def _entry(self, row: int) -> Entry:
        """The entry with everything that the model needs of it."""
        entry = self.entries[row]
        pipeline = self.encoder.pipeline
        if pipeline.family.encode is not None and entry.text is None:
            if self._prompt is None:
                raise DataError(
                    f"image '{entry.id}' has no caption, which the model reads: give it one in metadata.jsonl or in a "
                    ".txt file beside it, or one for all such images as --prompt"
                )
            entry = replace(entry, text=self._prompt)
        if pipeline.classes is not None:
            if entry.label is None:
                raise DataError(f"image '{entry.id}' has no label, which the model reads: add a column 'label'")
            if not 0 <= entry.label < pipeline.classes:
                raise DataError(
                    f"image '{entry.id}' has label {entry.label}, expected 0 to {pipeline.classes - 1}, the classes "
                    "that the model knows"
                )
        return entry

    def _picture_of(self, row: int) -> Picture:
        return self._picture(self._entry(row))

    def _picture(self, entry: Entry) -> Picture:
        return read_picture(entry, self.encoder.resolution, self.encoder.pipeline.channels)


class Batches:
    """Every batch of a data set, the same ones in the same order each time it is gone through."""

    def __init__(self, dataset: Dataset, batch_size: int) -> None:
        if batch_size < 1:
            raise DataError(f"batch size is {batch_size}, expected at least 1")
        self._dataset, self._size = dataset, batch_size

    @property
    def rows(self) -> int:
        """Examples in all batches together."""
        return len(self._dataset)

    def __len__(self) -> int:
        return -(-self.rows // self._size)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for start in range(0, self.rows, self._size):
            yield self._dataset.fetch(range(start, min(start + self._size, self.rows)))
