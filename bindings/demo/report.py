"""The demo in order: tune, ask, compare with baselines, take records out, and what each step found as plain numbers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from gradsift.bindings.data import Dataset
from gradsift.bindings.demo.baselines import bm25, mean_hidden_states, neighbours, precision, words
from gradsift.bindings.demo.case import Case
from gradsift.bindings.demo.steps import Ticks
from gradsift.bindings.demo.tune import lower_states, tune
from gradsift.bindings.encode import Encoder, form_of
from gradsift.bindings.models import Loaded
from gradsift.bindings.records import ListRecords, Record
from gradsift.bindings.workspace import Notes
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.answers.rescore import rescore
from gradsift.engine.answers.search import topk
from gradsift.engine.capture.capture import Capture
from gradsift.engine.capture.features import Features
from gradsift.engine.extraction.extract import extract
from gradsift.engine.losses import language_model
from gradsift.engine.store.reader import FeatureStore

__all__ = ["Behaviour", "Found", "Run"]

_BATCH = 16
"""Records in a batch."""

_LENGTH = 256
"""Longest record in tokens."""


@dataclass(frozen=True)
class Behaviour:
    """What the model does on the questions.

    Attributes:
        answers: its own greedy answer to each question.
        loss: of the planted behaviour, per token, averaged over the queries.
    """

    answers: list[str]
    loss: float


@dataclass(frozen=True)
class Found:
    """Who finds the planted records.

    Attributes:
        rows: all rows of the store for the queries together, most influential first.
        scores: their scores.
        together: method -> precision@10 when all queries are asked as one.
        alone: method -> precision@10 of one query, averaged over the queries.
        shared_words: content words that a query shares with a planted record, and with an ordinary one of its kind, on
            average.
    """

    rows: np.ndarray
    scores: np.ndarray
    together: dict[str, float]
    alone: dict[str, float]
    shared_words: tuple[float, float]


class Run:
    """One demo in one folder; its methods are the steps, to be called in the order in which they stand.

    Args:
        case: what is shown.
        folder: where records, model and store go; an earlier store in it is replaced.
        ticks: called as ``ticks(step, steps)`` while something long runs.
    """

    def __init__(self, case: Case, folder: Path, ticks: Ticks = lambda step, steps: None) -> None:
        self.case, self.folder, self.ticks = case, folder, ticks
        folder.mkdir(parents=True, exist_ok=True)
        self.data_path = folder / "train.jsonl"
        self.store_path = folder / "train.zarr"
        _write(self.data_path, case.records)
        _write(folder / "queries.jsonl", case.queries)
        self.loaded: Loaded = case.loaded()
        encoder = Encoder(self.loaded.tokenizer, form_of(case.records[0]), _LENGTH)
        self.data = Dataset(ListRecords(case.records), encoder)
        self.queries = Dataset(ListRecords(case.queries, "query"), encoder)
        self.planted = np.array([r["id"] in case.planted for r in case.records])
        self._start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self._states: list[torch.Tensor] = []
        if not any(p.requires_grad for p in self.model.get_input_embeddings().parameters()):
            self._states = lower_states(self.model, self.data)

    @property
    def model(self) -> Any:
        """The model, in whatever state the last step left it."""
        return self.loaded.model

    def behaviour(self) -> Behaviour:
        """What the model does now."""
        batch = self.queries.fetch(range(len(self.queries)))
        with torch.no_grad():
            losses = language_model(self.model, batch) / language_model.loss_tokens(batch)
        return Behaviour([self._answer(question) for question in self.case.questions], float(losses.mean()))

    def tune(self, without: Iterable[int] = ()) -> None:
        """Train from the start on all records but some."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._start:
                    parameter.copy_(self._start[name])
        left_out = set(without)
        rows = [i for i in range(len(self.data)) if i not in left_out]
        tune(self.model, self.data, rows, self.case.plan, self._states, self.ticks)

    def extract(self) -> FeatureStore:
        """Save the tuned model and extract its store, with the notes that `gradsift query` reads."""
        saved = {k: str(Path(v).resolve()) for k, v in self.case.save(self.loaded, self.folder).items()}
        notes = Notes(
            model=saved["model"],
            data=str(self.data_path.resolve()),
            adapter=saved.get("adapter"),
            modules=self.case.modules,
            max_length=_LENGTH,
            trained_on=self.data.encoder.trained_on,
        )
        shutil.rmtree(self.store_path, ignore_errors=True)
        return extract(
            self.model,
            self.data.batches(block=len(self.data), batch_size=_BATCH),
            language_model,
            self.store_path,
            modules=self.case.modules,
            block=len(self.data),
            curvature=self.case.curvature,
            progress=lambda update: self.ticks(update.rows, update.total or update.rows),
            notes=asdict(notes),
        )

    def ask(self, store: FeatureStore) -> Found:
        """Rank all records by gradsift and by the baselines."""
        features = self._features(store)
        order = np.array([self.data.find([name])[0] for name in store.ids])
        planted = self.planted[order]
        alone, together = {}, {}
        scorers: dict[str, Literal["fisher", "dot"]] = {"gradsift": "fisher", "gradsift, no curvature": "dot"}
        for label, scorer in scorers.items():
            alone[label] = float(planted[topk(store, features, 10, scorer).rows].mean())
            together[label] = float(planted[topk(store, features, 10, scorer, as_set=True).rows].mean())
        for label, scores in self._baselines(np.asarray(store.loss), order).items():
            alone[label] = precision(scores, planted)
            together[label] = precision(scores.mean(axis=0, keepdims=True), planted)
        alone["random"] = together["random"] = float(planted.mean())
        top = topk(store, features, len(store), "fisher", as_set=True)
        return Found(order[top.rows[0]], top.scores[0], together, alone, self._shared_words())

    def pulls(self, rows: Sequence[int]) -> np.ndarray:
        """What each token of these records adds to its exact inner product with the queries' gradient: (n, T)."""
        batch = self.queries.fetch(range(len(self.queries)))
        v = gradient(self.model, batch, language_model, self.case.modules)
        exact = rescore(self.model, self.data.fetch(rows), language_model.token_losses, v, modules=self.case.modules)
        return exact.tokens.numpy()

    def prompt_text(self, row: int) -> str:
        """What the record asks."""
        record = self.case.records[row]
        return str(record["messages"][0]["content"] if "messages" in record else record["prompt"])

    def random_rows(self, count: int) -> list[int]:
        """As many records drawn at random, always the same ones."""
        return sorted(random.Random(self.case.plan.seed).sample(range(len(self.data)), count))

    def _features(self, store: FeatureStore) -> Features:
        capture = Capture(self.model, store.spec, self.case.modules)
        return capture(self.queries.fetch(range(len(self.queries))), language_model)

    def _baselines(self, loss: np.ndarray, order: np.ndarray) -> dict[str, np.ndarray]:
        """Method -> scores of shape (q, n), rows in the store's order."""
        texts = [_text(self.case.records[i]) for i in order]
        hidden = mean_hidden_states(self.model, self._batches(self.data, order.tolist()))
        asked = mean_hidden_states(self.model, self._batches(self.queries, range(len(self.queries))))
        return {
            "mean hidden states": neighbours(hidden, asked),
            "BM25": np.stack([bm25(texts, _text(query)) for query in self.case.queries]),
            "highest loss": np.tile(loss, (len(self.queries), 1)),
        }

    @staticmethod
    def _batches(data: Dataset, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), _BATCH):
            yield data.fetch(rows[start : start + _BATCH])

    def _shared_words(self) -> tuple[float, float]:
        """Content words in common with a query: of the planted records, and of ordinary ones that list numbers, too."""
        asked = [set(words(_text(query), content=True)) for query in self.case.queries]
        shared = np.array(
            [
                sum(len(query & set(words(_text(record), content=True))) for query in asked) / len(asked)
                for record in self.case.records
            ]
        )
        ordinary = np.array([r["id"] not in self.case.planted | self.case.odd for r in self.case.records])
        return float(shared[self.planted].mean()), float(shared[ordinary].mean())

    def _answer(self, question: str) -> str:
        tokenizer = self.loaded.tokenizer
        inputs = tokenizer(question, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.case.words,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        start = inputs["input_ids"].shape[1]
        text = str(tokenizer.decode(out[0, start:], skip_special_tokens=True))
        whole = out.shape[1] - start < self.case.words or int(out[0, -1]) == tokenizer.eos_token_id
        return " ".join(text.split()) + ("" if whole else " …")


def _text(record: Record) -> str:
    """A record as plain text: prompt and answer."""
    if "messages" in record:
        return " ".join(str(turn["content"]) for turn in record["messages"])
    return str(record["prompt"]) + str(record["completion"])


def _write(path: Path, records: Sequence[Record]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
