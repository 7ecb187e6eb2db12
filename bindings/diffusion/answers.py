"""Answers of `gradsift query` about a picture: the most and least influential images, as text, JSON and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from rich.console import Console
from rich.text import Text
from torch import Tensor

from gradsift.bindings.curvature import choose_damping, correct, curvature_of, how_exact, summary
from gradsift.bindings.describe import rows_text
from gradsift.bindings.diffusion.dataset import Dataset
from gradsift.bindings.diffusion.grid import Row, Tile, draw
from gradsift.bindings.diffusion.workspace import Workspace
from gradsift.bindings.render import number, table
from gradsift.engine.answers.gradient import gradient
from gradsift.engine.answers.rescore import Rescorer
from gradsift.engine.answers.search import SIGN, TopK, topk
from gradsift.engine.curvature.corrected import Corrected
from gradsift.kernels.errors import DataError

__all__ = ["Asker"]

_AT_ONCE = 4
"""Training images that are scored exactly in one batch."""

_HEADINGS = {
    True: ("Most influential training images", "training on them makes the model draw more like this"),
    False: ("Least influential", "the lowest scores; below zero, training on them makes the model draw less like this"),
}


class Asker:
    """Asks one store about a picture, or about a set of pictures as one, and shows the answer.

    Args:
        space: the store with its pipeline and images.
        questions: the query; several images are one query, the mean of their gradients.
        scorer: as of ``topk``; it finds the short list.
        method: let exact gradients order the short list, along the query's gradient after this correction, and say
            which regions pull; None for the sketch alone.
        sample: curvature rows behind an exact answer, at most.
        damping: k of the correction; unseen: images that were not trained on, which choose it.
    """

    def __init__(
        self,
        space: Workspace,
        questions: Dataset,
        scorer: str,
        method: str | None,
        sample: int,
        damping: float | None = None,
        unseen: Dataset | None = None,
    ) -> None:
        self._space, self._questions, self._method = space, questions, method
        self._scorer = cast(Literal["fisher", "dot", "cosine"], scorer)
        self._features = space.capture(questions)
        self._corrected: list[Corrected] = []
        self._rescorer = None if method is None else self._exactly(method, sample, damping, unseen)

    def _exactly(self, method: str, sample: int, damping: float | None, unseen: Dataset | None) -> Rescorer:
        """Exact scores along the query's mean gradient; of a plain cosine over several parts, part by part."""
        space = self._space
        if method != "none" and self._scorer == "cosine" and space.loss.parts is not None:
            raise DataError(
                f"--method {method} corrects the gradient of the summed loss, but --scorer cosine asks about each "
                "timestep alone: use --scorer fisher or dot"
            )
        apart = method == "none" and self._scorer == "cosine" and space.loss.parts is not None
        losses = [space.loss.part(k) for k in range(space.loss.measurements)] if apart else [space.summed]
        vectors = [self._mean_gradient(each) for each in losses]
        if method != "none":
            curvature = curvature_of(space, sample)
            if unseen is not None:
                choose_damping(curvature, space, unseen)
            self._corrected = correct(curvature, space, vectors, method, damping)
        if apart:
            tokens = [each.token_losses for each in losses]
            return Rescorer(space.model, self._fetch, tokens, [vectors], modules=space.modules)
        along = self._corrected or vectors
        return Rescorer(space.model, self._fetch, space.summed.token_losses, along, modules=space.modules)

    def _mean_gradient(self, loss: Any) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        for index in range(len(self._questions)):
            part = gradient(self._space.model, self._questions.fetch([index]), loss, self._space.modules)
            total = {name: total[name] + g if total else g for name, g in part.items()}
        return {name: g / len(self._questions) for name, g in total.items()}

    def _fetch(self, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(rows), _AT_ONCE):
            yield self._space.fetch(rows[start : start + _AT_ONCE])

    def ask(self, k: int, largest: bool) -> TopK:
        """The k most influential images; or, with ``largest=False``, those that pull the other way."""
        return topk(
            self._space.store,
            self._features,
            k,
            self._scorer,
            largest,
            as_set=len(self._questions) > 1,
            rescore=self._rescorer,
            method="none" if self._rescorer else None,  # the vectors are as they are meant to be
        )

    def print(self, console: Console, answers: Sequence[TopK]) -> None:
        """What was asked, then a table per answer."""
        store = self._space.store
        how = how_exact(self._method, self._corrected) or rows_text(store)
        headline = f"  {len(store):,} images, {answers[0].scorer}, {how}"
        console.print(Text.assemble((str(store.path), "bold"), headline), highlight=False)
        console.print(f"query  {self._described()}, loss {self._loss():.4g}", style="bold", highlight=False)
        for top in answers:
            console.print()
            title = _HEADINGS[top.largest][0].lower()
            rows = [
                (
                    place,
                    number(row["score"]),
                    f"{row['loss']:.4g}",
                    Text.assemble(row["id"], (f"  {_said(row)}", "dim")),
                )
                for place, row in enumerate(self._rows(top), start=1)
            ]
            console.print(table(("", "score", "loss", title), rows, wide=title))
        console.print()
        console.print(SIGN, style="dim", highlight=False)

    def to_json(self, answers: Sequence[TopK]) -> dict[str, Any]:
        """The same as plain values."""
        found: dict[str, Any] = {
            "store": str(self._space.store.path),
            "scorer": answers[0].scorer,
            "exact": self._rescorer is not None,
            "method": self._method,
            "curvature": [summary(v) for v in self._corrected],
            "sign": SIGN,
            "query": [self._questions.record(i) for i in range(len(self._questions))],
            "loss": self._loss(),
        }
        for top in answers:
            found["most" if top.largest else "least"] = self._rows(top)
        return found

    def draw(self, answers: Sequence[TopK], path: Path) -> None:
        """The same as a picture."""
        rows = []
        for top in answers:
            tiles = []
            for place, row in enumerate(self._rows(top), start=1):
                pixels = self._space.data.picture(self._space.index(row["row"])).pixels
                heat = None if top.tokens is None else np.asarray(row["regions"])
                tiles.append(Tile(pixels, [f"{place}.  {number(row['score'])}", row["id"], _said(row)], heat))
            heading, sentence = _HEADINGS[top.largest]
            mapped = "" if top.tokens is None else "; below each: which of its regions do"
            rows.append(Row(heading, sentence + mapped, tiles))
        asked = Tile(_mosaic(self._questions), [self._described(), self._words()])
        how = "exact gradients" if self._rescorer else f"sketched gradients ({self._space.store.spec.dim} numbers each)"
        note = f"Score: how much training on an image lowers the loss on this picture ({answers[0].scorer}, {how})."
        draw("Which training images made the model draw this?", asked, rows, path, note)

    def _loss(self) -> float:
        loss = self._features.loss
        return float("nan") if loss is None else float(loss.mean())

    def _described(self) -> str:
        first = Path(self._questions.id(0)).name
        return first if len(self._questions) == 1 else f"{first} and {len(self._questions) - 1} more, as one"

    def _words(self) -> str:
        said = dict.fromkeys(_said(self._questions.record(i)) for i in range(len(self._questions)))
        return "; ".join(word for word in said if word)

    def _rows(self, top: TopK) -> list[dict[str, Any]]:
        rows = []
        for place, row in enumerate(top.rows[0].tolist()):
            found: dict[str, Any] = {
                **self._space.data.record(self._space.index(row)),
                "row": row,
                "score": float(top.scores[0, place]),
                "loss": float(self._space.store.loss[row]),
            }
            if top.tokens is not None:
                found["regions"] = top.tokens[0, place].tolist()
            rows.append(found)
        return rows


def _said(record: Mapping[str, Any]) -> str:
    """A caption in quotation marks, or a class."""
    if record.get("text"):
        return f"“{record['text']}”"
    return f"class {record['label']}" if record.get("label") is not None else ""


def _mosaic(questions: Dataset) -> np.ndarray:
    """The query's image; of several the first four, or nine, as one square."""
    side = 1 if len(questions) == 1 else 2 if len(questions) <= 4 else 3
    pictures = [questions.picture(i).pixels for i in range(min(len(questions), side * side))]
    if side == 1:
        return pictures[0]
    line = max(1, len(pictures[0]) // 40)
    pictures = [np.pad(p, ((line, line), (line, line), (0, 0)), constant_values=255) for p in pictures]
    pictures += [np.full_like(pictures[0], 255)] * (side * side - len(pictures))
    return np.concatenate([np.concatenate(pictures[i * side : (i + 1) * side], axis=1) for i in range(side)])
