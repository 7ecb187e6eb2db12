"""A store together with the model and the data it was made from, as its notes remember them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsift.bindings.data import Batch, Dataset
from gradsift.bindings.encode import Encoder, form_of
from gradsift.bindings.models import Loaded, load
from gradsift.bindings.records import ListRecords, Record, open_records
from gradsift.engine.capture.capture import Capture
from gradsift.engine.capture.features import Features
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.extraction.fingerprints import adapter_fingerprint, model_fingerprint
from gradsift.engine.losses import language_model
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["Notes", "Workspace", "absolute", "remembered"]

_AT_ONCE = 8
"""Queries in a batch."""

_NEW_TOKENS = 48
"""Length of an answer that the model writes itself when a query is only a prompt."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What a command line store remembers of its making.

    Attributes:
        model, adapter, tokenizer, data: paths or hub ids; local paths are absolute.
        dtype: of the model.
        modules: what was captured.
        max_length, eos: how records became tokens, see ``Encoder``.
        trained_on: what carries loss, in words.
    """

    model: str
    data: str
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: str | None = None
    modules: str | list[str] = "lora"
    max_length: int = 1024
    eos: bool = True
    trained_on: str = ""


def remembered(store: FeatureStore) -> Notes:
    """The notes of a store that `gradsift extract` wrote.

    Raises:
        DataError: it was made from Python and has none.
    """
    notes: Mapping[str, Any] = store.metadata.get("notes") or {}
    known = {name: notes[name] for name in Notes.__dataclass_fields__ if name in notes}
    if not {"model", "data"} <= known.keys():
        raise DataError(
            f"'{store.path}' does not say which model and data it was made from, as stores written by "
            "`gradsift extract` do: give --model, --adapter and --train"
        )
    return Notes(**known)


class Workspace:
    """A store that can be asked: its model is loaded, its examples can be read.

    Args:
        store: made by `gradsift extract`.
        notes: where things are, see ``remembered``.
        device: see ``models.load``.
    """

    def __init__(self, store: FeatureStore, notes: Notes, device: str | None = None) -> None:
        self.store, self.notes = store, notes
        self.loaded: Loaded = load(
            notes.model, notes.adapter, tokenizer=notes.tokenizer, dtype=notes.dtype, device=device
        )
        self._compare()
        self.data = self._open(notes.data)

    def _compare(self) -> None:
        """Refuse a model or adapter that has changed since: its gradients would have nothing to do with the rows."""
        captured = parameters_of(self.model, self.notes.modules)
        now = {
            "adapter": adapter_fingerprint(captured),
            "model": model_fingerprint(self.model, list(captured.values())),
        }
        for what, before in self.store.metadata["fingerprints"].items():
            if now[what] != before:
                place = self.notes.adapter if what == "adapter" and self.notes.adapter else self.notes.model
                raise DataError(
                    f"the {what} '{place}' is not the one that '{self.store.path}' was extracted with "
                    f"(fingerprint {before[:8]}, now {now[what][:8]}): give that one, or extract again"
                )

    @property
    def model(self) -> nn.Module:
        """The model with its adapter."""
        return self.loaded.model

    def _open(self, path: str, records: Any = None, check: bool = False) -> Dataset:
        records = open_records(path) if records is None else records
        try:
            form = form_of(records[0])
        except DataError as error:
            raise DataError(f"{records.place(0)}: {error}") from None
        encoder = Encoder(
            self.loaded.tokenizer, form, self.notes.max_length, self.notes.eos, self.loaded.encoder_decoder
        )
        return Dataset(records, encoder, check=check)

    def questions(self, path: str) -> Dataset:
        """Queries or targets from a file, all of them checked."""
        return self._open(path, check=True)

    def question(self, text: str | None, prompt: str | None, completion: str | None) -> Dataset:
        """One query typed in; a prompt alone is answered by the model first, and that answer is the query."""
        chat = self.data.encoder.form == "messages" and text is None
        if text is not None:
            record: Record = {"text": text}
        else:
            completion = self._answer(str(prompt), chat) if completion is None else completion
            record = {"prompt": prompt, "completion": completion}
            if chat:
                record = {"messages": _turns(str(prompt), completion)}
        return self._open("", ListRecords([record], "query"), check=True)

    def capture(self, questions: Dataset) -> Features:
        """Features of the queries, in their order."""
        capture = Capture(self.model, self.store.spec, self.notes.modules)
        starts = range(0, len(questions), _AT_ONCE)
        groups = [range(start, min(start + _AT_ONCE, len(questions))) for start in starts]
        parts = [capture(questions.fetch(group), language_model) for group in groups]
        return Features(
            torch.cat([part.values for part in parts]),
            torch.cat([part.loss for part in parts if part.loss is not None]),
            torch.cat([part.grad_norm for part in parts]),
            parts[0].spec,
            parts[0].table,
            parts[0].loss_kind,
        )

    def index(self, row: int) -> int:
        """Where the example of a row of the store stands in the data."""
        return self.data.find([self.store.ids[row]])[0]

    def fetch(self, rows: Sequence[int]) -> Batch:
        """The examples of these rows of the store, as one batch in their order."""
        return self.data.fetch(self.data.find([self.store.ids[row] for row in rows]))

    def _answer(self, prompt: str, chat: bool) -> str:
        tokenizer = self.loaded.tokenizer
        if chat:
            turns = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            out = self.model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=pad
            )
        start = 0 if self.loaded.encoder_decoder else inputs["input_ids"].shape[1]
        answer = str(tokenizer.decode(out[0, start:], skip_special_tokens=True))
        if not answer.strip():
            raise DataError("the model answers this prompt with nothing: give the answer to explain as --completion")
        return answer


def _turns(prompt: str, completion: str) -> list[Record]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def absolute(place: str | None) -> str | None:
    """A local path that holds from any folder; a hub id as it is."""
    return str(Path(place).resolve()) if place is not None and Path(place).exists() else place
