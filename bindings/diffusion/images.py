"""Images with their captions or labels: a folder, or a JSONL, CSV or Parquet file; read, and cropped as in training."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradsift.bindings.records import Record, Records, open_records
from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["Entries", "Entry", "Listed", "Picture", "open_images", "read_picture", "to_pixels"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

_CAPTIONS = ("text", "caption")
"""Columns that may hold a caption, the first that is there."""

_READ = frozenset({"id", "file_name", "image", "label", *_CAPTIONS})
"""Columns that are told apart from all others."""

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as the data names it.

    Attributes:
        id: relative file name; or the record's ``id``, path, or number.
        source: its file or its bytes.
        text: its caption; None where there is none.
        label: its class; None where there is none.
        columns: whatever else its record holds.
    """

    id: str
    source: Path | bytes
    text: str | None = None
    label: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class Picture(NamedTuple):
    """An image cut to the model's size.

    Attributes:
        pixels: uint8 (resolution, resolution, channels).
        original: height and width before.
        crop: top and left of the cut in the resized image.
    """

    pixels: np.ndarray
    original: tuple[int, int]
    crop: tuple[int, int]


class Entries(Protocol):
    """Images of a data set: ``entries[i]`` raises a DataError that says what is wrong with one."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Entry: ...
    def place(self, row: int) -> str:
        """Where a row is found, in words for the user."""
        ...


class Listed:
    """Images that are named one by one, such as those of a query."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, row: int) -> Entry:
        return self._entries[row]

    def place(self, row: int) -> str:
        """Its file."""
        return self._entries[row].id


class Folder:
    """A folder of images, in the order of their relative names.

    Captions and labels come from ``metadata.jsonl`` (.csv, .parquet) in any of its folders, as `datasets` reads an
    image folder, with a column ``file_name``; or from a .txt file beside the image. A line of metadata without its
    image is an entry, too: it says what is missing.
    """

    def __init__(self, root: Path) -> None:
        files = {file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()}
        self._root = root
        self._rows: list[tuple[Path, Records | None, int]] = []
        listed: set[Path] = set()
        for metadata in sorted(file for name in _METADATA for file in root.rglob(name)):
            records = open_records(metadata)
            for row in range(len(records)):
                file = metadata.parent / _file_name(records, row)
                listed.add(file)
                self._rows.append((file, records, row))
        self._rows += [(file, None, 0) for file in files - listed]
        self._rows.sort(key=lambda found: found[0].relative_to(root).as_posix())
        if not self._rows:
            raise DataError(f"folder '{root}' holds no image ({', '.join(SUFFIXES)})")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Entry:
        file, records, line = self._rows[row]
        name = file.relative_to(self._root).as_posix()
        if records is None:
            beside = file.with_suffix(".txt")
            return Entry(name, file, _beside(beside) if beside.is_file() else None)
        record, place = records[line], records.place(line)
        if not record.get("file_name"):
            raise DataError(f"{place}: no 'file_name', so there is no image to attribute")
        if not file.is_file():
            raise DataError(f"{place}: image '{record['file_name']}' does not exist")
        return Entry(name, file, _caption(record, place), _label(record, place), _others(record))

    def place(self, row: int) -> str:
        """Its relative file name."""
        file, records, line = self._rows[row]
        if records is not None and not file.suffix:
            return records.place(line)
        return file.relative_to(self._root).as_posix()


class Table:
    """Records with a column ``image``: a path, relative to the file's folder, or the bytes of an image file."""

    def __init__(self, path: Path) -> None:
        self._records = open_records(path)
        self._folder = path.parent

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Entry:
        record, place = self._records[row], self.place(row)
        image, name = record.get("image"), record.get("id")
        if isinstance(image, Mapping):  # how Arrow keeps the images of `datasets`
            name = image.get("path") if name is None else name
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            file = self._folder / image
            source: Path | bytes = file
            name = image if name is None else name
            if not file.is_file():
                raise DataError(f"{place}: image '{image}' does not exist")
        elif isinstance(image, bytes) and image:
            source = image
        else:
            got = "missing" if image is None else f"a {type(image).__name__}"
            raise DataError(f"{place}, column 'image': {got}, expected the path of an image or its bytes")
        called = str(row if name is None else name)
        return Entry(called, source, _caption(record, place), _label(record, place), _others(record))

    def place(self, row: int) -> str:
        """As of the records."""
        return self._records.place(row)


def open_images(path: str | Path) -> Entries:
    """Open a folder of images, or a .jsonl, .csv or .parquet file with a column ``image``.

    Raises:
        DataError: there is nothing, or no image in it.
    """
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        raise DataError(f"data '{path}' is one image: give a folder of images, or a .jsonl, .csv or .parquet file")
    return Table(path)


def read_picture(entry: Entry, resolution: int, channels: int) -> Picture:
    """Read an image and cut it to a square, as diffusers' training scripts do with a centre crop.

    The shorter side is resized to the resolution (Lanczos), and the middle of the longer one is kept.

    Args:
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: it cannot be read, by its id.
    """
    image_module, ops = require("PIL.Image"), require("PIL.ImageOps")
    try:
        opened = image_module.open(io.BytesIO(entry.source) if isinstance(entry.source, bytes) else entry.source)
        image = ops.exif_transpose(opened).convert({1: "L", 3: "RGB"}[channels])
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"image '{entry.id}' cannot be read: {cause}") from None
    width, height = image.size
    if width <= height:
        size = resolution, max(resolution, int(resolution * height / width))
    else:
        size = max(resolution, int(resolution * width / height)), resolution
    if size != image.size:
        image = image.resize(size, image_module.Resampling.LANCZOS)
    left, top = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)))
    return Picture(pixels.reshape(resolution, resolution, channels), (height, width), (top, left))


def to_pixels(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, C) as the float32 (C, H, W) in [-1, 1] that models are trained on."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def _file_name(records: Records, row: int) -> str:
    """What a line of metadata names; the line's own place where it names nothing that can be read."""
    try:
        name = records[row].get("file_name")
    except DataError:
        name = None
    return name if isinstance(name, str) and name else records.place(row).replace("/", " ")


def _beside(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        raise DataError(f"caption file '{file.name}' is not UTF-8: save it as UTF-8") from None


def _caption(record: Record, place: str) -> str | None:
    column = next((column for column in _CAPTIONS if record.get(column) is not None), None)
    if column is None:
        return None
    text = record[column]
    if not isinstance(text, str):
        raise DataError(f"{place}, column '{column}': a {type(text).__name__}, expected the text of one caption")
    return text


def _label(record: Record, place: str) -> int | None:
    label = record.get("label")
    if label is None:
        return None
    try:
        if isinstance(label, bool) or int(label) != float(label):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"{place}, column 'label': {label!r}, expected the number of a class") from None
    return int(label)


def _others(record: Record) -> Record:
    return {column: value for column, value in record.items() if column not in _READ}
