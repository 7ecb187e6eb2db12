"""Answers of `gradsift query`: the most and least influential examples, token by token, as text or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from gradsift.bindings.curvature import choose_damping, correct, curvature_of, how_exact, summary
from gradsift.bindings.data import Dataset
from gradsift.bindings.describe import rows_text
from gradsift.bindings.render import LEGEND, coloured, number, table
from gradsift.bindings.workspace import Workspace
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.answers.rescore import Rescorer, pad_alike
from gradsift.engine.answers.search import SIGN, TopK, topk
from gradsift.engine.curvature.corrected import Corrected
from gradsift.engine.losses import IGNORE, language_model

__all__ = ["Answer", "Asker"]

_AT_ONCE = 8
"""Training examples that are scored exactly in one batch."""

_EVERYTHING = 1 << 30
"""Characters to show of a text that is shown whole."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The most or least influential examples of every query.

    Attributes:
        top: ids, rows and scores, shape (q, k).
        tokens: what each token adds to the exact score, shape (q, k, T), or (q, k, answers, T).
    """

    top: TopK
    tokens: np.ndarray


class Asker:
    """Asks one store about some queries, and shows the answers.

    Args:
        space: the store with its model and data.
        questions: the queries.
        scorer: as of ``topk``; it finds the short list.
        method: let exact gradients order the short list, along the query's gradient after this correction; None: they
            only say which tokens of the answers pull the query's loss.
        sample: curvature rows behind exact answers, at most; all of the store's unless given.
        damping: k of the correction; unseen: examples that were not trained on, which choose it.
    """

    def __init__(
        self,
        space: Workspace,
        questions: Dataset,
        scorer: str,
        method: str | None = None,
        sample: int | None = None,
        damping: float | None = None,
        unseen: Dataset | None = None,
    ) -> None:
        self._space, self._questions, self._method = space, questions, method
        self._scorer = cast(Literal["fisher", "dot", "cosine"], scorer)
        self._features = space.capture(questions)
        modules = space.modules
        self._loss_fn = space.loss_for(questions)
        vectors = [gradient(space.model, questions.fetch([i]), self._loss_fn, modules) for i in range(len(questions))]
        self._corrected: list[Corrected] = []
        if method not in (None, "none"):
            curvature = curvature_of(space, sample)
            if unseen is not None:
                choose_damping(curvature, space, unseen)
            self._corrected = correct(curvature, space, vectors, method, damping)
        self._rescorer = Rescorer(
            space.model, self._fetch, space.loss.token_losses, self._corrected or vectors, modules=modules
        )

    def _fetch(self, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(rows), _AT_ONCE):
            yield self._space.fetch(rows[start : start + _AT_ONCE])

    def ask(self, k: int, largest: bool) -> Answer:
        """The k most influential examples of each query; or, with ``largest=False``, the most harmful ones."""
        top = topk(
            self._space.store,
            self._features,
            k,
            self._scorer,
            largest,
            rescore=self._rescorer if self._method else None,
            method="none" if self._method else None,  # the vectors are as they are meant to be
        )
        if top.tokens is not None:
            return Answer(top, top.tokens)
        parts = [self._rescorer(query, rows).tokens for query, rows in enumerate(top.rows)]
        return Answer(top, torch.stack(pad_alike(parts)).numpy())

    def print(self, console: Console, answers: Sequence[Answer], whole: bool) -> None:
        """Each query, then a table per answer."""
        console.print(self._headline(answers[0].top), highlight=False)
        for query in range(len(self._questions)):
            console.print()
            console.print(self._question_line(query), style="bold", highlight=False)
            console.print(Padding(self._question_text(query, whole), (0, 0, 0, 2)), highlight=False)
            for answer in answers:
                console.print()
                console.print(self._table(console, answer, query, whole))
        console.print()
        console.print(LEGEND, highlight=False)
        if not self._method and answers[0].top.scorer == "fisher":
            note = "colours are shares of the plain inner product, without the scores' curvature: --exact has it"
            console.print(note, style="dim", highlight=False)

    def to_json(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The same as plain values."""
        queries = []
        for query in range(len(self._questions)):
            found: dict[str, Any] = {
                "id": self._questions.id(query),
                "record": self._questions.record(query),
                "loss": self._loss(query),
                "loss_tokens": self._questions.example(query).scored,
            }
            for answer in answers:
                found["most" if answer.top.largest else "least"] = self._rows(answer, query)
            queries.append(found)
        return {
            "store": str(self._space.store.path),
            "loss": self._loss_fn.kind,
            "scorer": answers[0].top.scorer,
            "exact": self._method is not None,
            "method": self._method,
            "curvature": [summary(v) for v in self._corrected],
            "sign": SIGN,
            "queries": queries,
        }

    def _rows(self, answer: Answer, query: int) -> list[dict[str, Any]]:
        store, top = self._space.store, answer.top
        rows = []
        for place, row in enumerate(top.rows[query].tolist()):
            index = self._space.index(row)
            example = self._space.data.example(index)
            shares = example.lined_up(answer.tokens[query, place])
            rows.append(
                {
                    "id": top.ids[query, place],
                    "row": row,
                    "score": float(top.scores[query, place]),
                    "loss": float(store.loss[row]),
                    "loss_tokens": None if store.loss_tokens is None else int(store.loss_tokens[row]),
                    "record": self._space.data.record(index),
                    "tokens": list(zip(example.pieces, shares, strict=True)),
                }
            )
        return rows

    def _headline(self, top: TopK) -> Text:
        store = self._space.store
        how = how_exact(self._method, self._corrected) or rows_text(store)
        return Text.assemble((str(store.path), "bold"), f"  {len(store):,} examples, {top.scorer}, {how}")

    def _loss(self, query: int) -> float:
        loss = self._features.loss
        return float("nan") if loss is None else float(loss[query])

    def _question_line(self, query: int) -> str:
        tokens = self._questions.example(query).scored
        name = self._questions.records.place(query) if len(self._questions) > 1 else "query"
        if self._loss_fn is not language_model:
            return f"{name}  loss {self._loss(query):.3f}, {tokens} tokens"
        return f"{name}  loss {self._loss(query) / tokens:.3f} per token, {tokens} tokens"

    def _question_text(self, query: int, whole: bool) -> Text:
        return self._text(self._questions, query, None, _EVERYTHING if whole else 800, marks=False)

    @staticmethod
    def _text(data: Dataset, index: int, shares: Any, limit: int, marks: bool) -> Text:
        """An example for people: tokens without loss set back, the others coloured by their shares."""
        record, example = data.record(index), data.example(index)
        pieces, dim = data.encoder.shown(record, example), example.labels == IGNORE
        text = coloured(pieces, shares, limit=limit, dim=dim, marks=marks)
        return Text.assemble((str(record["prompt"]), "dim"), " → ", text) if data.encoder.encoder_decoder else text

    def _table(self, console: Console, answer: Answer, query: int, whole: bool) -> Any:
        rows = []
        colours = console.color_system is not None
        per_token = self._space.loss is language_model
        for place, found in enumerate(self._rows(answer, query), start=1):
            shares = [share for _, share in found["tokens"]]
            index = self._space.index(found["row"])
            text = self._text(self._space.data, index, shares, _EVERYTHING if whole else 320, marks=not colours)
            tokens = (found["loss_tokens"] or 1) if per_token else 1
            rows.append((place, number(found["score"]), f"{found['loss'] / tokens:.3f}", found["id"], text))
        title = "most influential" if answer.top.largest else "pushing the other way"
        return table(("", "score", "loss/token" if per_token else "loss", "id", title), rows, wide=title)
