"""Records of a local JSONL, CSV or Parquet file, read by row and never held in memory."""

from __future__ import annotations

import csv
import json
import logging
from array import array
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["ListRecords", "Records", "open_records"]

Record = dict[str, Any]

_JSON_LINES = (".jsonl", ".ndjson", ".json")


class Records(Protocol):
    """Rows of a data set: ``records[i]`` is a dict, ``records.place(i)`` says where it stands."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Record: ...
    def place(self, row: int) -> str:
        """Where a row is found, in words for the user."""
        ...


class ListRecords:
    """Records that are in memory already, such as the one query typed on a command line."""

    def __init__(self, records: Sequence[Record], name: str = "record") -> None:
        self._records, self._name = records, name

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Record:
        return self._records[row]

    def place(self, row: int) -> str:
        """Such as ``query 0``."""
        return f"{self._name} {row}" if len(self) > 1 else self._name


class JsonLines:
    """A JSONL file through the offsets of its lines: 8 bytes of memory per record, every error with its line.

    Arrow's reader infers one schema for all lines and reports a bad one by its byte block; this one does
    not care about other lines and gives each record back as it was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        starts = array("q", [0])
        with path.open("rb") as file:
            for line in file:
                starts.append(starts[-1] + len(line))
            self._bytes = mmap(file.fileno(), 0, access=ACCESS_READ) if starts[-1] else b""
        self._starts = np.frombuffer(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Record:
        begin, end = self._starts[row : row + 2].tolist()
        return self._parse(self._bytes[begin:end], row)

    def _parse(self, line: bytes, row: int) -> Record:
        try:
            text = line.decode("utf-8-sig" if row == 0 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(row)}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
        if not text:
            raise DataError(f"{self.place(row)}: the line is empty, expected a JSON object: remove it")
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.place(row)}, column {error.colno}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            hint = ": write one object per line" if isinstance(record, list) else ""
            raise DataError(f"{self.place(row)}: a JSON {_kind(record)}, expected an object{hint}")
        return record

    def place(self, row: int) -> str:
        """Such as ``train.jsonl line 12``, counted from 1 as editors do."""
        return f"{self._path.name} line {row + 1}"


class Table:
    """A CSV or Parquet file through `datasets`, memory-mapped from its Arrow cache; CSV values stay text."""

    def __init__(self, path: Path) -> None:
        datasets = require("datasets")
        self._path = path
        verbosity = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(logging.CRITICAL)
        datasets.disable_progress_bars()
        options: dict[str, Any] = {}
        if path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                columns = next(csv.reader(file), [])
            if not columns:
                raise DataError(f"{path.name} is empty, expected a header line with column names")
            # Without this, a completion "12" would become a number and "NA" would become missing.
            text = datasets.Features({column: datasets.Value("string") for column in columns})
            options = {"features": text, "keep_default_na": False}
        try:
            loader = "csv" if path.suffix.lower() == ".csv" else "parquet"
            rows = datasets.load_dataset(loader, data_files=str(path), split="train", **options)
            for column, feature in rows.features.items():
                if isinstance(feature, datasets.Image):  # bytes as they are: what cannot be decoded is said by row
                    rows = rows.cast_column(column, datasets.Image(decode=False))
            self._rows = rows
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            cause = str(error.__cause__ or error).strip().splitlines()[0]
            raise DataError(f"{path.name} cannot be read as {loader}: {cause}") from None
        finally:
            datasets.enable_progress_bars()
            datasets.logging.set_verbosity(verbosity)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Record:
        return dict(self._rows[int(row)])

    def place(self, row: int) -> str:
        """Such as ``train.csv record 12``, counted from 1 after the header."""
        return f"{self._path.name} record {row + 1}"


def open_records(path: str | Path) -> Records:
    """Open a data file by its suffix: .jsonl, .ndjson, .json (an object per line), .csv or .parquet.

    Raises:
        DataError: the file is missing, empty, unreadable or of another kind.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"data file '{path}' {what}: give a .jsonl, .csv or .parquet file")
    if suffix in _JSON_LINES:
        records: Records = JsonLines(path)
    elif suffix in (".csv", ".parquet"):
        records = Table(path)
    else:
        raise DataError(f"data file '{path.name}' ends in '{suffix}', expected .jsonl, .csv or .parquet")
    if not len(records):
        raise DataError(f"data file '{path}' holds no records")
    return records


def _kind(value: Any) -> str:
    names = {
        list: "array",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), "object")
