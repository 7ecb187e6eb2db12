"""TAROT: candidates whose gradients are distributed as the targets' are, by optimal transport of whitened features.

Source: arXiv 2412.00420 and vita-epfl/TAROT. Not theirs: damping relative to the trace, float64 throughout, all
checkpoints (their code averages them and then uses the last), and the best number of neighbours per fold where their
code keeps one more.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from gradsift.engine.answers.scan import RowStore
from gradsift.engine.methods import Method
from gradsift.engine.scorers.parts import parts_of
from gradsift.engine.selectors.neighbours import Neighbours
from gradsift.engine.selectors.protocol import Choice, Targets, only_of
from gradsift.engine.selectors.rows import allowed_rows, best_first, plain_rows, settle
from gradsift.engine.selectors.transport import transport
from gradsift.engine.selectors.whitening import Whitening
from gradsift.kernels.errors import DataError, SpecError

__all__ = ["Tarot"]


class Tarot:
    """Layers of nearest rows until the budget is full; or as many as bring the distributions closest.

    Tasks only name the targets in the reasons: all targets count alike.

    Args:
        rule: "fixed_size" takes every target's nearest row, then every second nearest, and so on; the layer that
            overflows is ordered by its transport potentials, largest first. "otm" finds how many by itself: the
            targets are split into folds, and for each fold its nearest rows grow until the transport distance to the
            targets of the *other* folds no longer falls.
        damping: of the metric, in units of trace/N, see ``Whitening``.
        folds: of "otm". seed: of its shuffle.
    """

    about = Method(
        name="tarot",
        formula="rows in layers of nearest neighbours of the targets by whitened distance, the rest by OT potential",
        needs="targets (2 or more for rule='otm')",
        cost="3 passes, O(dim^2) memory, O(n dim^2) work",
        source="TAROT, arXiv 2412.00420; relative damping is ours",
        published="beats LESS, DsDm and the full data on 2 tasks; 24 % of the pool for segmentation, < .5 % for "
        "instructions",
    )

    def __init__(
        self,
        rule: Literal["fixed_size", "otm"] = "fixed_size",
        damping: float = 1.0,
        folds: int = 10,
        seed: int = 42,
    ) -> None:
        if rule not in ("fixed_size", "otm"):
            raise SpecError(f"rule is {rule!r}, expected 'fixed_size' or 'otm'")
        if folds < 2:
            raise SpecError(f"folds is {folds}, expected at least 2: one to grow by, the others to compare with")
        only_of(rule, {"folds": ("otm", folds, 10), "seed": ("otm", seed, 42)})
        self.rule, self.damping, self.folds, self.seed = rule, damping, folds, seed

    def prepare(self, store: RowStore, targets: Targets | None, scorer: Any) -> None:
        """Fit the metric; ``scorer`` has no part in it."""
        if targets is None:
            raise DataError("method 'tarot' matches the distribution of targets: give targets")
        if self.rule == "otm" and len(targets.queries.values) < 2:
            raise DataError("rule 'otm' compares targets with each other but there is one: use 'fixed_size'")
        plain_rows(store, "tarot")
        keep = np.isin(np.arange(len(store)), allowed_rows(store))
        values = parts_of(store).by_checkpoint(targets.queries.values)
        white = Whitening(store, values, keep, self.damping)
        self._targets, self._rows = targets, len(store)
        self._near = Neighbours(store, keep, white, white(values))

    def choose(self, budget: int | None) -> Choice:
        """The rows, layer by layer; their weights are transport potentials.

        With rule "otm" the budget is None, and ``facts["ratio"]`` is the share of the store that was found.
        """
        if self.rule == "otm":
            if budget is not None:
                raise DataError("rule 'otm' finds how many rows to take by itself: give budget=None")
            return self._by_distance()
        if budget is None:
            raise DataError("rule 'fixed_size' needs a budget: give one, or rule='otm'")
        return self._by_layers(budget)

    def _by_layers(self, budget: int) -> Choice:
        taken: dict[int, tuple[float, str]] = {}
        late: dict[int, tuple[float, str]] = {}
        for depth, (rows, cosines) in enumerate(self._near.layers(), start=1):
            late = self._fresh(rows, cosines, depth, taken)
            if len(taken) + len(late) > budget:
                break
            taken, late = taken | late, {}
            if len(taken) == budget:
                break
        pool = np.array([*taken, *late], dtype=np.int64)
        potentials = dict(zip(pool.tolist(), settle(transport(self._near.distances(pool)).f).tolist(), strict=True))
        filling = sorted(late, key=lambda row: (-potentials[row], row))[: budget - len(taken)]
        taken |= {row: late[row] for row in filling}
        return _choice(taken, np.array([potentials[row] for row in taken]), None)

    def _by_distance(self) -> Choice:
        count = len(self._targets.queries.values)
        order = np.random.default_rng(self.seed).permutation(count)
        taken: dict[int, tuple[float, str]] = {}
        for held in np.array_split(order, min(self.folds, count)):
            others = np.setdiff1d(order, held)
            taken |= {row: why for row, why in self._grown(held, others).items() if row not in taken}
        rows = np.array(list(taken), dtype=np.int64)
        if not len(rows):
            raise DataError("no row is nearer to a target than at a right angle, so none is chosen: give other targets")
        moved = transport(self._near.distances(rows))
        return _choice(taken, moved.f, {"ratio": len(rows) / self._rows, "distance": moved.distance})

    def _grown(self, held: np.ndarray, others: np.ndarray) -> dict[int, tuple[float, str]]:
        """The nearest rows of some targets, as many of each as still bring them closer to the other targets."""
        best: dict[int, tuple[float, str]] = {}
        least = np.inf
        for depth, (rows, cosines) in enumerate(self._near.layers(), start=1):
            near = held[cosines[held] > 0]
            grown = best | self._fresh(rows[near], cosines[near], depth, best, near)
            if not grown:
                break
            distance = transport(self._near.distances(np.array(list(grown)))[:, others]).distance
            if not distance < least:
                break
            best, least = grown, distance
        return best

    def _fresh(
        self,
        rows: np.ndarray,
        cosines: np.ndarray,
        depth: int,
        taken: dict[int, tuple[float, str]],
        which: np.ndarray | None = None,
    ) -> dict[int, tuple[float, str]]:
        """Rows of a layer that are not taken yet, nearest first: row -> its cosine and the reason."""
        fresh: dict[int, tuple[float, str]] = {}
        for place in best_first(cosines, rows).tolist():
            row, target = int(rows[place]), place if which is None else int(which[place])
            if row not in taken and row not in fresh:
                fresh[row] = (float(cosines[place]), f"neighbour {depth} of target {target}{self._task(target)}")
        return fresh

    def _task(self, target: int) -> str:
        tasks = self._targets.tasks
        return f", {tasks.text(int(tasks.index[target]))}" if tasks.named else ""


def _choice(taken: dict[int, tuple[float, str]], potentials: np.ndarray, facts: dict[str, float] | None) -> Choice:
    scores = np.array([score for score, _ in taken.values()])
    reasons = [reason for _, reason in taken.values()]
    return Choice(np.array(list(taken), dtype=np.int64), scores, reasons, potentials, facts)
