"""A data file as a re-iterable of padded batches, checked as a whole before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from gradsift.bindings.encode import Encoder, Example, form_of
from gradsift.bindings.records import Record, Records, open_records
from gradsift.bindings.several import Several, SeveralEncoder, SilentError
from gradsift.kernels.errors import DataError

__all__ = ["Batches", "Dataset", "Survey", "encoder_for"]

_READ_AT_ONCE = 1024
_MAX_NAMED = 10

Batch = dict[str, Any]


@dataclass(slots=True)
class Survey:
    """What reading every record once has shown.

    Attributes:
        records: records in the file.
        tokens: tokens kept in all.
        scored: tokens that carry loss.
        cut: records whose end was cut off to keep to the maximum length.
        bad: records left out; ``named`` says why for the first ten.
        silent: prompts left out because all their responses have one reward.
    """

    records: int = 0
    tokens: int = 0
    scored: int = 0
    cut: int = 0
    bad: int = 0
    silent: int = 0
    named: list[str] = field(default_factory=list)


class Dataset:
    """Records of one file with their tokens: random access, ids and padded batches.

    Reading all of it once at the start finds every bad record before an hour of computing does. In memory
    stay 12 bytes per record (row and length); text and tokens are read again when they are needed.

    Args:
        records: see ``open_records``. encoder: how they become tokens. check: read every record now.
        Without it nothing is surveyed and there are no batches: enough for looking
            examples up by their ids.
        skip_bad: leave unusable records out, and count and name them, instead of refusing the file.
        skip_silent: leave prompts out whose responses all have one reward, and count them.
        progress: called with the number of records read so far, and of all.

    Attributes:
        survey: counts of the whole file.

    Raises:
        DataError: the first unusable record, by line and column; or nothing usable is left.
    """

    def __init__(
        self,
        records: Records,
        encoder: Encoder | SeveralEncoder,
        *,
        check: bool = True,
        skip_bad: bool = False,
        skip_silent: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.records = records
        self.encoder = encoder
        self.survey = Survey(records=len(records))
        self._found: dict[str, int] = {}
        self._named_ids = "id" in records[0]
        self._rows = np.arange(len(records), dtype=np.int64)
        self._lengths: np.ndarray | None = None
        self._skip_silent = skip_silent
        if check:
            self._survey(skip_bad, progress)

    def _survey(self, skip_bad: bool, progress: Callable[[int, int], None] | None) -> None:
        records = self.records
        rows: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        # Where records may be left out, a later lookup of an id must not find one that was.
        given: set[str | int] | None = set() if self._named_ids and (skip_bad or self._skip_silent) else None
        for start in range(0, len(records), _READ_AT_ONCE):
            part = range(start, min(start + _READ_AT_ONCE, len(records)))
            kept = [(row, found) for row in part if (found := self._look(row, skip_bad, given)) is not None]
            rows.append(np.array([row for row, _ in kept], dtype=np.int64))
            lengths.append(np.array([length for _, length in kept], dtype=np.int32))
            if progress is not None:
                progress(part.stop, len(records))
        self._rows = np.concatenate(rows)
        self._lengths = np.concatenate(lengths)
        if not len(self._rows):
            first = f"; the first: {self.survey.named[0]}" if self.survey.named else ", for their rewards are all alike"
            raise DataError(f"none of the {len(records)} records is usable{first}")

    @classmethod
    def open(
        cls,
        path: str,
        tokenizer: Any,
        *,
        max_length: int = 1024,
        eos: bool = True,
        encoder_decoder: bool = False,
        check: bool = True,
        skip_bad: bool = False,
        skip_silent: bool = False,
        forms: Sequence[str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Open a file and take its form from its first record: one of ``forms``, or text, a prompt, or messages."""
        records = open_records(path)
        try:
            form = form_of(records[0]) if forms is None else form_of(records[0], forms)
        except DataError as error:
            text = str(error)
            raise DataError(text if text.startswith(records.place(0)) else f"{records.place(0)}: {text}") from None
        encoder = encoder_for(tokenizer, form, max_length, eos, encoder_decoder)
        return cls(records, encoder, check=check, skip_bad=skip_bad, skip_silent=skip_silent, progress=progress)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        """The record as it was written."""
        return self.records[int(self._rows[index])]

    def id(self, index: int) -> str | int:
        """The record's `id` column as text, or, where there is none, its row in the file from 0."""
        return self._id(self.record(index), int(self._rows[index]))

    def example(self, index: int) -> Example | Several:
        """Tokens, labels and the text of each token."""
        example: Example | Several = self._encode([index])[0]
        return example

    def find(self, ids: Sequence[str | int]) -> list[int]:
        """Where examples with these ids stand.

        Raises:
            DataError: an id is not in the file.
        """
        if not self._named_ids:
            rows = np.array([int(i) for i in ids], dtype=np.int64)
            places = np.searchsorted(self._rows, rows).clip(max=len(self._rows) - 1)
            missing = np.flatnonzero(self._rows[places] != rows)
            if len(missing):
                raise DataError(_unknown(ids[int(missing[0])]))
            return [int(place) for place in places]
        wanted = {str(i) for i in ids} - self._found.keys()
        for index in range(len(self)):
            if not wanted:
                break
            try:
                name = str(self.id(index))
            except DataError:
                continue  # a record that was left out
            if name in wanted:
                wanted.remove(name)
                self._found[name] = index
        if wanted:
            raise DataError(_unknown(min(wanted)))
        return [self._found[str(i)] for i in ids]

    def fetch(self, indices: Sequence[int]) -> Batch:
        """One padded batch of these examples, in this order."""
        return self._collate(indices, self._encode(indices))

    def batches(self, *, block: int, batch_tokens: int = 4096, batch_size: int | None = None) -> Batches:
        """All examples in padded batches, sorted by length inside each run of ``block`` examples.

        Args:
            block: examples per run; no batch crosses its border.
            batch_tokens: padded tokens in a batch, at most (one long example may exceed it).
            batch_size: examples in a batch, at most.
        """
        return Batches(self, self._plan(block, batch_tokens, batch_size))

    def _look(self, row: int, skip_bad: bool, given: set[str | int] | None) -> int | None:
        """Length of a usable record in tokens, whose id none before it had; None for one that is left out."""
        place = self.records.place(row)
        try:
            record = self.records[row]
            name = self._id(record, row)
            if given is not None:
                if name in given:
                    raise DataError(f"column 'id': {name!r} was given to an earlier record: ids must differ")
                given.add(name)
            found = self.encoder.encode([record])[0]
            if isinstance(found, DataError):
                raise found
        except DataError as error:
            if self._skip_silent and isinstance(error, SilentError):
                self.survey.silent += 1
                return None
            text = str(error)
            sentence = text if text.startswith(place) else f"{place}, {text}"
            if not skip_bad:
                raise DataError(sentence) from None
            self.survey.bad += 1
            if len(self.survey.named) < _MAX_NAMED:
                self.survey.named.append(sentence)
            return None
        length = len(found.input_ids)
        self.survey.tokens += length
        self.survey.scored += found.scored
        self.survey.cut += found.cut > 0
        return length

    def _id(self, record: Record, row: int) -> str | int:
        if not self._named_ids:
            return row
        value = record.get("id")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"column 'id': {value!r}, expected text or a whole number, as in the first record")
        return str(value)

    def _encode(self, indices: Sequence[int]) -> list[Any]:
        examples = self.encoder.encode([self.record(i) for i in indices])
        for index, example in zip(indices, examples, strict=True):
            if isinstance(example, DataError):
                raise DataError(f"{self.records.place(int(self._rows[index]))} has changed: {example}")
        return list(examples)

    def _plan(self, block: int, batch_tokens: int, batch_size: int | None) -> list[np.ndarray]:
        if self._lengths is None:
            raise DataError("the data was opened without a check, so lengths are not known: open it with check=True")
        if block < 1 or batch_tokens < 1 or (batch_size is not None and batch_size < 1):
            raise DataError(f"block {block}, batch tokens {batch_tokens} and batch size {batch_size} must be positive")
        plan = []
        for start in range(0, len(self), block):
            lengths = self._lengths[start : start + block]
            order = np.argsort(-lengths, kind="stable")
            begin = 0
            while begin < len(order):
                # Longest first: the first of a batch sets the padded length of all.
                size = max(1, batch_tokens // int(lengths[order[begin]]))
                size = min(size, batch_size or size)
                plan.append((order[begin : begin + size] + start).astype(np.int64))
                begin += size
        return plan

    def _collate(self, indices: Sequence[int], examples: Sequence[Any]) -> Batch:
        return {**self.encoder.collate(examples), "ids": [self.id(i) for i in indices]}


class Batches:
    """Every batch of a data set, the same ones in the same order each time it is gone through."""

    def __init__(self, dataset: Dataset, plan: Sequence[np.ndarray]) -> None:
        self._dataset, self._plan = dataset, plan

    @property
    def rows(self) -> int:
        """Examples in all batches together."""
        return len(self._dataset)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for indices in self._plan:
            yield self._dataset.fetch(indices.tolist())


def encoder_for(
    tokenizer: Any, form: str, max_length: int = 1024, eos: bool = True, encoder_decoder: bool = False
) -> Encoder | SeveralEncoder:
    """What turns records of this form into tokens; arguments as of ``Encoder``.

    Raises:
        DataError: the model is an encoder-decoder, which several answers are not read for.
    """
    if form not in ("pair", "rollouts"):
        return Encoder(tokenizer, form, max_length, eos, encoder_decoder)
    if encoder_decoder:
        raise DataError("preference pairs and rollouts are read for causal models, and this is an encoder-decoder")
    return SeveralEncoder(tokenizer, form, max_length, eos)


def _unknown(name: str | int) -> str:
    return f"id {name!r} is not in the data: give the file that was extracted"
