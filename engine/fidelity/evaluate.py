"""evaluate: does it predict retraining, on your model? Every method beside the baselines, on the same retrainings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from gradsift.engine.fidelity.auc import auc
from gradsift.engine.fidelity.bench import Bench
from gradsift.engine.fidelity.cache import Outcomes, Run
from gradsift.engine.fidelity.candidates import Candidate, sketched
from gradsift.engine.fidelity.case import FidelityCase
from gradsift.engine.fidelity.lds import lds, reliability, subsets
from gradsift.engine.fidelity.methods import standard
from gradsift.engine.fidelity.qld import qld, removals
from gradsift.engine.fidelity.recall import agreement, class_recall
from gradsift.engine.fidelity.result import Evaluation, Row
from gradsift.engine.fidelity.stores import own_folder
from gradsift.kernels.errors import DataError, GradsiftError

__all__ = ["REMOVED", "Progress", "evaluate", "outcomes_of"]

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

REMOVED = (
    *("random", "BM25", "nearest inputs", "exact dot", "exact fisher, k 1"),
    *("fisher, k 1, 256 B", "fisher, k 1, 256 B + exact"),
)
"""Whose best examples are removed, unless told otherwise: a retraining for each query and seed is dear."""

_TOP = 10


@dataclass(frozen=True, slots=True)
class _Scored:
    candidate: Candidate
    scores: np.ndarray | None
    truth: np.ndarray | None
    suspicion: np.ndarray | None
    bytes: int | None


def evaluate(
    case: FidelityCase,
    methods: Sequence[str | Candidate | Any] | None = None,
    cache: str | PathLike[str] = "fidelity",
    *,
    count: int = 60,
    seeds: int = 2,
    alpha: float = 0.5,
    removed: Sequence[str] = REMOVED,
    remove: float = 0.01,
    remove_queries: int = 20,
    remove_seeds: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Evaluation:
    """Measure how well methods predict what retraining does.

    LDS: the model is trained again on ``count`` random subsets under ``seeds`` seeds; per query, the Spearman
    correlation of summed scores with the measured loss. QLD: the rise of a query's loss after its best examples are
    removed and the model is trained again. Beside these, where the case can tell: how well mislabelled examples are
    found, and how many of the best are of the query's class; and how much of its exact formula a sketch keeps.

    Every outcome is kept in ``cache`` at once. A killed evaluation goes on where it was, and several processes that are
    given the same cache share the retrainings.

    Args:
        methods: names of rows as globs (``"BM25"``, ``"*fisher*"``), scorers of your own, or ``Candidate``; all that
            fit unless given.
        count, alpha, seeds: subsets, their share of the examples, and trainings of each.
        removed: names of rows, as globs, whose best examples are removed; () for none.
        remove, remove_queries, remove_seeds: the share that is removed, for how many of the first queries, and how many
            trainings without it.

    Raises:
        DataError: no method fits, or a name is unknown.
        ShapeError: the case's examples, texts or labels do not fit each other.
    """
    case.check()
    outcomes = outcomes_of(case, cache)
    with own_folder(outcomes.folder) as stores:
        bench = Bench(case, stores)
        bench.check()
        candidates = _chosen(methods, bench)  # before hours of training: a name may be wrong
        chosen = subsets(case.examples, count, alpha)
        runs: list[Run] = [(tuple(np.flatnonzero(row).tolist()), seed) for seed in range(seeds) for row in chosen]
        outcomes.want(runs)  # others may begin while this process scores
        scored, left_out = _score(candidates, bench, progress)
        losses = outcomes.get(runs, lambda done, total: progress("training on subsets", done, total), bench.queries)
        losses = losses.reshape(seeds, count, -1)
        rows = [_row(one, case, chosen, losses.mean(axis=0)) for one in scored]
    if removed and int(remove * case.examples) < 1:
        left_out["QLD"] = f"a share of {remove:g} is less than one of {case.examples} examples"
        removed = ()
    queries = min(remove_queries, losses.shape[2])
    rows = _remove(rows, scored, outcomes, removed, remove, queries, remove_seeds, progress)
    return Evaluation(
        case.name, case.examples, losses.shape[2], count, seeds, reliability(losses), tuple(rows), left_out
    )


def outcomes_of(case: FidelityCase, cache: str | PathLike[str]) -> Outcomes:
    """What retrainings of a case gave, in a folder of their own inside the cache."""
    key = case.fingerprint()
    return Outcomes(Path(cache) / f"{case.name}-{key[:12]}", key, case.measured)


def _chosen(methods: Sequence[Any] | None, bench: Bench) -> list[Candidate]:
    known = standard(bench)
    if methods is None:
        return known
    found: list[Candidate] = []
    for wanted in methods:
        if isinstance(wanted, Candidate):
            found.append(wanted)
        elif isinstance(wanted, str):
            fitting = [candidate for candidate in known if fnmatch(candidate.name.lower(), wanted.lower())]
            if not fitting:
                names = ", ".join(repr(candidate.name) for candidate in known)
                raise DataError(f"no method is called {wanted!r}, expected a glob over {names}, or a scorer")
            found += fitting
        else:
            found.append(sketched(wanted, 4096))
    return list({candidate.name: candidate for candidate in found}.values())


def _score(candidates: Sequence[Candidate], bench: Bench, progress: Progress) -> tuple[list[_Scored], dict[str, str]]:
    """Scores of all methods that fit the case, and why the others do not."""
    scored: list[_Scored] = []
    left_out: dict[str, str] = {}
    for done, candidate in enumerate(candidates):
        progress("scoring", done, len(candidates))
        try:
            scores = bench.remembered(candidate)
            suspicion = None
            if bench.case.wrong is not None:
                suspicion = _suspicion(candidate, bench, scores)
            size = None if candidate.bytes is None else candidate.bytes(bench)
            scored.append(_Scored(candidate, scores, _truth(candidate, bench), suspicion, size))
        except GradsiftError as error:
            left_out[candidate.name] = str(error)
            logger.info("%s is left out: %s", candidate.name, error)
    progress("scoring", len(candidates), len(candidates))
    if not scored:
        raise DataError(f"no method fits this case; {', '.join(f'{n}: {why}' for n, why in left_out.items())}")
    return scored, left_out


def _truth(candidate: Candidate, bench: Bench) -> np.ndarray | None:
    """The same formula's scores by exact gradients; a row that these do not fit stands without them."""
    try:
        return None if candidate.truth is None else bench.remembered(candidate.truth)
    except GradsiftError as error:
        logger.info("%s is not compared with exact gradients: %s", candidate.name, error)
        return None


def _suspicion(candidate: Candidate, bench: Bench, scores: np.ndarray | None) -> np.ndarray | None:
    if candidate.suspicion is not None:
        return candidate.suspicion(bench)
    return None if scores is None or candidate.partial else -scores.mean(axis=0)


def _row(one: _Scored, case: FidelityCase, chosen: np.ndarray, losses: np.ndarray) -> Row:
    candidate, scores = one.candidate, one.scores
    top = min(_TOP, case.examples)
    row = Row(candidate.name, candidate.family, candidate.method, one.bytes)
    if scores is not None:
        if not candidate.partial:
            row = replace(row, lds=lds(scores, chosen, losses))
        if case.labels is not None and case.query_labels is not None:
            row = replace(row, classes=class_recall(scores, case.labels, case.query_labels, top))
        if one.truth is not None:
            row = replace(row, agreement=agreement(scores, one.truth, top))
    if one.suspicion is not None and case.wrong is not None:
        row = replace(row, auc=auc(one.suspicion, case.wrong))
    return row


def _remove(
    rows: list[Row],
    scored: Sequence[_Scored],
    outcomes: Outcomes,
    names: Sequence[str],
    share: float,
    queries: int,
    seeds: int,
    progress: Progress,
) -> list[Row]:
    """Rows with the QLD of those that are named."""
    wanted = {
        place: removals(one.scores[:queries], share, seeds)
        for place, one in enumerate(scored)
        if one.scores is not None and any(fnmatch(one.candidate.name.lower(), name.lower()) for name in names)
    }
    if not wanted:
        return rows
    examples = len(next(one.scores for one in scored if one.scores is not None)[0])
    everything: list[Run] = [(tuple(range(examples)), seed) for seed in range(seeds)]
    runs = everything + [run for all_ in wanted.values() for run in all_]
    losses = outcomes.get(runs, lambda done, total: progress("training without the named", done, total))[:, :queries]
    whole, rest = losses[:seeds], losses[seeds:]
    for number, place in enumerate(wanted):
        part = rest[number * queries * seeds : (number + 1) * queries * seeds].reshape(queries, seeds, queries)
        rows[place] = replace(rows[place], qld=qld(whole, part))
    return rows
