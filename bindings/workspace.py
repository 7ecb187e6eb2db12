"""A store together with the model and the data it was made from, as its notes remember them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradsift.bindings.checkpoints import checkpoints_from, put_last
from gradsift.bindings.data import Dataset, encoder_for
from gradsift.bindings.encode import form_of
from gradsift.bindings.losses import forms_of, loss_of
from gradsift.bindings.models import Loaded, load
from gradsift.bindings.records import ListRecords, Record, open_records
from gradsift.bindings.space import Examples, Loss, Space
from gradsift.engine.losses import language_model
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import DataError

__all__ = ["Notes", "Workspace", "remembered"]

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
        checkpoints: folders at which rows were taken, in order; absolute. None for the model as it is.
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
    checkpoints: list[str] | None = None


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


class Workspace(Space):
    """A store of a language model that can be asked: its model is loaded, its examples can be read.

    Args:
        store: made by `gradsift extract`.
        notes: where things are, see ``remembered``.
        device: see ``models.load``.
    """

    data: Dataset

    def __init__(self, store: FeatureStore, notes: Notes, device: str | None = None) -> None:
        self.notes = notes
        self.loaded: Loaded = load(
            notes.model, notes.adapter, tokenizer=notes.tokenizer, dtype=notes.dtype, device=device
        )
        places = {"model": notes.model, "adapter": notes.adapter or notes.model}
        checkpoints = checkpoints_from(notes.checkpoints or [])
        if checkpoints:
            put_last(self.loaded.model, checkpoints, notes.modules)
        loss = loss_of(store)
        data = self._open(notes.data, forms_of(loss))
        super().__init__(store, self.loaded.model, loss, notes.modules, data, places, checkpoints=checkpoints)

    def loss_for(self, questions: Examples) -> Loss:
        """The rows' own loss for records of their form; that of a language model for a text, whatever the rows are."""
        form = getattr(questions, "encoder", self.data.encoder).form
        return self.loss if form in forms_of(self.loss) else language_model

    def _open(self, path: str, forms: Sequence[str], records: Any = None, check: bool = False) -> Dataset:
        records = open_records(path) if records is None else records
        try:
            form = form_of(records[0], forms)
        except DataError as error:
            raise DataError(f"{records.place(0)}: {error}") from None
        encoder = encoder_for(
            self.loaded.tokenizer, form, self.notes.max_length, self.notes.eos, self.loaded.encoder_decoder
        )
        return Dataset(records, encoder, check=check)

    def questions(self, path: str) -> Dataset:
        """Queries or targets from a file, all of them checked."""
        return self._open(path, tuple(dict.fromkeys((*forms_of(language_model), *forms_of(self.loss)))), check=True)

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
        return self._open("", forms_of(language_model), ListRecords([record], "query"), check=True)

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
