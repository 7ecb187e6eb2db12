"""A user's own training as a case: a store, a file of queries, and a function that trains again."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradsift.bindings.data import Dataset
from gradsift.bindings.models import load
from gradsift.bindings.records import Record
from gradsift.bindings.workspace import Workspace
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.losses import language_model
from gradsift.kernels.errors import DataError

__all__ = ["function", "mean_states", "own_case"]

_AT_ONCE = 8
"""Examples in a batch."""

_SAID = ("messages", "text", "prompt", "completion", "chosen", "rejected", "responses")
"""Columns of text, of records of any form."""

Retrain = Callable[[list[int], int], Any]


def function(place: str) -> tuple[Retrain, str]:
    """A function written ``module:name``, found from the folder one is in, and a hash of its file.

    Raises:
        DataError: there is no such module or function.
    """
    module_name, colon, name = place.partition(":")
    if not colon or not module_name or not name:
        raise DataError(f"--retrain is '{place}', expected module:function, such as train:retrain for train.py")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".", maxsplit=1)[0]:
            raise DataError(f"--retrain: importing '{module_name}' failed: {error}") from None
        raise DataError(f"--retrain: there is no module '{module_name}' here or among the installed ones") from None
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not callable(found):
        raise DataError(f"--retrain: '{module_name}' has no function '{name}'")
    source = getattr(module, "__file__", None)
    code = Path(source).read_bytes() if source is not None else place.encode()
    return found, hashlib.blake2b(code, digest_size=8).hexdigest()


def own_case(space: Workspace, queries: Dataset, retrain: Retrain, key: str, name: str) -> FidelityCase:
    """The case of a store and its model.

    Args:
        space: the store with its model and data.
        queries: whose losses are to be predicted.
        retrain: ``retrain(lines, seed)``: trains from the start on these lines of the data file, counted from 0, and
            returns the model, or the folder where it lies: of an adapter, or of a whole model.
        key: what the training depends on beside the data and the store's model.
        name: of the case.

    Raises:
        DataError: the queries have another loss than the store's rows, which is what retraining is measured by.
    """
    data, notes = space.data, space.notes
    if space.loss_for(queries) is not space.loss:
        raise DataError(
            f"the rows of '{space.store.path}' are of the loss {space.loss.kind} but the queries are "
            f"{queries.encoder.form}: give queries with the columns of the training data"
        )
    places = sorted(data.find(list(space.store.ids)))

    def trained(rows: Sequence[int], seed: int) -> nn.Module:
        lines = [places[row] for row in rows]
        return _model(retrain(lines, seed), space)

    return FidelityCase(
        name=name,
        key=f"{key} {notes.model} {space.store.metadata['fingerprints']} {notes.max_length} {notes.eos}",
        examples=len(places),
        retrain=trained,
        batches=_Batches(data, places),
        queries=_Batches(queries, range(len(queries))),
        loss=space.loss,
        modules=notes.modules,
        model=space.model,
        before=_Untuned(space.model) if hasattr(space.model, "disable_adapter") else None,
        texts=[_text(data.record(place)) for place in places],
        query_texts=[_text(queries.record(row)) for row in range(len(queries))],
        states=mean_states if space.loss is language_model and not space.loaded.encoder_decoder else None,
    )


def mean_states(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Last hidden state of each example, averaged over its tokens, (n, hidden)."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    hidden: Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1]
    if "attention_mask" not in inputs:
        return hidden.mean(dim=1)
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return mean


class _Untuned(nn.Module):
    """A model whose adapter is off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        with self.model.disable_adapter():  # type: ignore[operator]
            return self.model(**inputs)


class _Batches:
    """Padded batches in the order of the file."""

    def __init__(self, data: Dataset, places: Sequence[int]) -> None:
        self._data, self._places = data, places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._places), _AT_ONCE):
            yield self._data.fetch(self._places[start : start + _AT_ONCE])


def _model(given: Any, space: Workspace) -> nn.Module:
    """What a user's training returned, as a model on the store's device."""
    device = next(space.model.parameters()).device
    if isinstance(given, nn.Module):
        return given.to(device).eval()
    if not isinstance(given, str | Path) or not Path(given).is_dir():
        raise DataError(
            f"retrain returned {given!r}, expected the trained model, or the folder where it or its adapter was saved"
        )
    notes, folder = space.notes, str(given)
    with torch.no_grad():
        if (Path(given) / "adapter_config.json").is_file():
            return load(notes.model, folder, tokenizer=notes.tokenizer, dtype=notes.dtype, device=str(device)).model
        known = space.loaded.tokenizer.name_or_path  # a whole model may have been saved without its tokenizer
        return load(folder, tokenizer=known, dtype=notes.dtype, device=str(device)).model


def _text(record: Record) -> str:
    """A record as plain text: what was written to the model, and what it or others wrote."""
    return " ".join(text for column in _SAID if column in record for text in _strings(record[column]))


def _strings(said: Any) -> Iterator[str]:
    """Every text of a column: one, those of messages, or several of either."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, Mapping):
        yield from _strings(said.get("content"))
    elif isinstance(said, list | tuple):
        for each in said:
            yield from _strings(each)
