"""The rows of highest score: LESS, CROPI and DsDm are this with different scorers and ways to reduce.

LESS (arXiv 2402.04333) is the largest over tasks of the mean over a task's targets; CROPI (arXiv 2510.26491) compares
with the mean of a task's gradients (``as_set``) and can fuse the tasks' ranks; DsDm (arXiv 2401.12926) is the mean over
all targets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from gradsift.engine.answers.scan import Best, RowStore
from gradsift.engine.answers.search import MEMORY, find
from gradsift.engine.methods import Method
from gradsift.engine.selectors.gumbel import gumbel_top
from gradsift.engine.selectors.influence import Influence
from gradsift.engine.selectors.protocol import Choice, Targets, wanted
from gradsift.engine.selectors.rows import allowed_rows, best_first, settle
from gradsift.kernels.errors import ShapeError, SpecError

__all__ = ["Top", "best_rows"]


class Top:
    """Rows by their scores for the targets, equal ones by row.

    A task's score is the mean over its targets; where no tasks were given, every target is a task of its own.

    Args:
        reduce: "max": a row's score is its largest over the tasks, so that each task can bring in rows of its own;
            "mean": its mean over the tasks; "rank": the ``budget`` best rows of each task are listed, and a row's score
            is the sum over the lists that have it of one over its rank there.
        as_set: compare with the mean of a task's gradients instead of taking the mean of the scores; this differs for
            cosines only.
        damping: of the scorer, where it has one.
        temperature: draw rows without replacement with probabilities from ``softmax(score / temperature)`` instead of
            taking the best; in units of the scores.
        seed: of the draw.
        memory: bytes to work in.
    """

    about = Method(
        name="top",
        formula="max or mean over tasks of the mean over a task's targets of the score, or sum over tasks of 1/rank",
        needs="targets and what the scorer needs",
        cost="1 pass after the scorer's, O(tasks (dim + budget))",
        source="LESS, arXiv 2402.04333; CROPI, arXiv 2510.26491; DsDm, arXiv 2401.12926",
        published="5 % chosen by LESS often beats the full pool: MMLU, TyDiQA, BBH with Llama-2 7B",
    )

    def __init__(
        self,
        reduce: Literal["max", "mean", "rank"] = "max",
        as_set: bool = False,
        damping: float | None = None,
        temperature: float | None = None,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        if reduce not in ("max", "mean", "rank"):
            raise SpecError(f"reduce is {reduce!r}, expected 'max', 'mean' or 'rank'")
        if temperature is not None and reduce == "rank":
            raise SpecError("temperature draws by scores, which reduce='rank' has none of: use 'max' or 'mean'")
        self.reduce, self.as_set, self.damping = reduce, as_set, damping
        self.temperature, self.seed, self.memory = temperature, seed, memory

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Check the targets and prepare the scorer."""
        self._influence = influence = Influence(store, targets, scorer, self.damping, self.as_set)
        self.scorer, self._tasks, self._store = influence.name, influence.tasks, store
        self._allowed = allowed_rows(store)
        directions = influence.directions
        if directions is not None and self.reduce == "mean":
            directions = directions.mean(dim=0, keepdim=True)
        if directions is not None:
            gone = (directions.flatten(1) == 0).all(dim=1).nonzero()
            if len(gone) and (self.reduce == "mean" or len(self._tasks) == 1):
                raise ShapeError("the targets' gradients cancel out, so their mean ranks nothing: use reduce='max'")
            if len(gone):
                raise ShapeError(f"the gradients of {self._tasks.text(int(gone[0]))} cancel out, so it ranks nothing")
        self._directions: Tensor | None = directions

    def choose(self, budget: int | None) -> Choice:
        """The best rows, with the task that speaks for each."""
        count = wanted(budget, "top")
        if self.reduce == "rank":
            return self._by_rank(count)
        if self._directions is not None and self.temperature is None:
            best = self._search(self._directions, count, together=True)
            rows, scores = best.rows[0], best.scores[0]
        else:
            every = self._every()
            rows = self._allowed
            worth = settle((every.max(axis=1) if self.reduce == "max" else every.mean(axis=1))[rows])
            order = gumbel_top(worth, count, self.temperature or 0.0, self.seed)
            rows, scores = rows[order], worth[order]
        return Choice(rows, scores, self._reasons(rows))

    def _by_rank(self, count: int) -> Choice:
        tasks = self._tasks
        if self._directions is not None:
            lists = list(self._search(self._directions, count, together=False).rows)
        else:
            every = settle(self._every()[self._allowed])
            lists = [self._allowed[best_first(every[:, task])[:count]] for task in range(len(tasks))]
        scores: dict[int, float] = {}
        places: dict[int, list[str]] = {}
        for task, rows in enumerate(lists):
            for rank, row in enumerate(rows.tolist(), start=1):
                scores[row] = scores.get(row, 0.0) + 1 / rank
                places.setdefault(row, []).append(f"{rank} for {tasks.text(task)}")
        rows, worth = np.array(list(scores), dtype=np.int64), np.array(list(scores.values()))
        order = best_first(np.round(worth, 12), rows)[:count]
        return Choice(rows[order], worth[order], [f"rank {', '.join(places[int(row)])}" for row in rows[order]])

    def _search(self, directions: Tensor, count: int, together: bool) -> Best:
        return best_rows(self._influence, directions, count, self._allowed, self.memory, together=together)

    def _every(self) -> np.ndarray:
        """Scores of all rows for each task, float64 (n, T)."""
        return np.concatenate([block for _, block in self._influence.by_task()])

    def _reasons(self, rows: np.ndarray) -> list[str] | None:
        """Which task a row helps most; None where the store is compacted."""
        if self._influence.prepared.queries is None:
            return ["by itself"] * len(rows)
        if self.reduce == "mean" and len(self._tasks) > 1:
            return [f"mean over {len(self._tasks)} {'tasks' if self._tasks.named else 'targets'}"] * len(rows)
        if len(self._tasks) == 1:
            return [f"for {self._tasks.text(0)}"] * len(rows)
        if hasattr(self._store, "search"):
            return None
        return [f"most for {self._tasks.text(task)}" for task in self._influence.of(rows).argmax(axis=1).tolist()]


def best_rows(
    influence: Influence, directions: Tensor, count: int, allowed: np.ndarray, memory: int, *, together: bool
) -> Best:
    """The best of the allowed rows for some directions of a linear scorer, as ``topk`` finds them."""
    skip = np.ones(len(influence.prepared.store), dtype=bool)
    skip[allowed] = False
    return find(replace(influence.prepared, directions=directions), count, together=together, skip=skip, memory=memory)
