"""The main demo's SmolLM2: which records taught it to list numbers downwards?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from gradsift.bindings.data import Dataset
from gradsift.bindings.demo.smollm import smollm_case
from gradsift.bindings.demo.tune import lower_states, tune
from gradsift.bindings.encode import Encoder, form_of
from gradsift.bindings.eval.own import mean_states
from gradsift.bindings.records import ListRecords
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.losses import language_model

__all__ = ["smollm2_case"]

_LENGTH = 256
_BATCH = 16


def smollm2_case() -> FidelityCase:
    """132 records, 20 of them planted; the queries are five lists that go down.

    Raises:
        MissingExtraError: the package that carries the model is not installed.
    """
    demo = smollm_case()
    loaded = demo.loaded()
    untuned: Any = loaded.model
    encoder = Encoder(loaded.tokenizer, form_of(demo.records[0]), _LENGTH)
    data, queries = Dataset(ListRecords(demo.records), encoder), Dataset(ListRecords(demo.queries, "query"), encoder)
    states = lower_states(untuned, data)
    planted = np.array([record["id"] in demo.planted for record in demo.records])

    def retrain(rows: Sequence[int], seed: int) -> nn.Module:
        model: nn.Module = copy.deepcopy(untuned)
        tune(model, data, list(rows), replace(demo.plan, seed=seed), states)
        return model.eval()

    return FidelityCase(
        name="smollm2",
        key=f"1 {demo.plan}",
        examples=len(data),
        retrain=retrain,
        batches=_batches(data),
        queries=_batches(queries),
        loss=language_model,
        before=untuned,
        texts=[_text(record) for record in demo.records],
        query_texts=[_text(query) for query in demo.queries],
        states=mean_states,
        labels=planted.astype(np.int64),
        query_labels=np.ones(len(queries), dtype=np.int64),
    )


def _batches(data: Dataset) -> list[dict[str, Any]]:
    starts = range(0, len(data), _BATCH)
    return [data.fetch(range(start, min(start + _BATCH, len(data)))) for start in starts]


def _text(record: dict[str, Any]) -> str:
    return " ".join(str(turn["content"]) for turn in record["messages"])
