"""check: on a few examples of somebody's own model, everything that must hold before an answer can be believed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from torch import Tensor, nn

from gradsift.engine.capture.capture import LossFunction
from gradsift.engine.capture.frozen import eager, evaluating
from gradsift.engine.capture.maps import Modules, uncovered_shares
from gradsift.engine.check import loss as check_loss
from gradsift.engine.check import model as check_model
from gradsift.engine.check import retrieval as check_retrieval
from gradsift.engine.check import rows as check_rows
from gradsift.engine.check.batches import Batch, segments_of, take, without_padding
from gradsift.engine.check.case import BlockedError, Case
from gradsift.engine.check.parts import kind_of
from gradsift.engine.check.report import KindRow, Report, Result
from gradsift.engine.losses import language_model
from gradsift.kernels.errors import DataError, GradsiftError
from gradsift.kernels.spec import SketchSpec

__all__ = ["CHECKS", "check"]

logger = logging.getLogger(__name__)

CHECKS = (
    "loss",
    "labels",
    "adapter",
    "maps",
    "coverage",
    "mode",
    "features",
    "conservation",
    "batch",
    "isolation",
    "precision",
    "sketch",
)
"""Every check, in the order in which they run."""

PerKind = dict[str, float]
Outcome = Result | tuple[Result, PerKind]


def check(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_fn: LossFunction = language_model,
    *,
    spec: SketchSpec | None = None,
    modules: Modules = "lora",
    examples: int = 8,
    pool: int = 64,
    seconds: float = 60.0,
    backend: str = "auto",
    allow_idle: Sequence[str] = (),
    batch_axis: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Try a model on a few examples: does capture see its true gradients, and what will a sketch make of them?

    The model runs in the mode in which it is, and is left as it was found. Where two captures of the same batch differ
    (dropout), the checks after that one run in ``eval()``, so that one cause fails one check.

    Args:
        batches: some of the user's batches, as ``extract`` takes them: mappings; tensors, or lists of tensors, work
            too. The first with two examples or more is looked at one by one; all are ranked.
        loss_fn: one loss per example.
        spec: the projection, ``SketchSpec()`` unless given.
        modules: what to capture, see ``Capture``.
        examples: how many are looked at one by one, at most.
        pool: how many are ranked by exact gradients, by the sketch and in low precision, at most.
        seconds: about how long the rankings may take; at least one batch is ranked.
        backend: see ``Capture``.
        allow_idle: see ``Capture``.
        batch_axis: see ``Capture``.
        progress: called with the name of each check when it begins.

    Returns:
        A ``Report``: ``.ok``, ``.verdict``, ``.results`` (one per name in ``CHECKS``), ``.kinds``.

    Raises:
        DataError: there is no batch, or no example can be taken out of it.
    """
    chosen = check_model.select(model, modules)
    few, ranked = _examples(batches, examples, pool)
    n = _size(few)
    case = Case(
        model=model,
        loss_fn=loss_fn,
        spec=spec or SketchSpec(),
        modules=chosen.modules,
        maps=chosen.maps,
        batch=few,
        singles=[without_padding(take(few, [i], n)) for i in range(n)],
        pool=ranked,
        names=list(few["ids"]) if isinstance(few, Mapping) and "ids" in few else list(range(n)),
        batch_axis=batch_axis,
        backend=backend,
        allow_idle=tuple(allow_idle),
        seconds=seconds,
    )
    with _muted(), eager():
        return _report(case, chosen, modules != "lora", progress or (lambda _: None))


def _report(case: Case, chosen: check_model.Selection, explicit: bool, progress: Callable[[str], None]) -> Report:
    """Run everything, one check after another."""
    run = _Run(progress)
    run("loss", lambda: check_loss.loss(case))
    run("labels", lambda: check_loss.labels(case))
    run("adapter", lambda: check_model.adapter(case))
    uncovered: dict[str, float] = {}
    if run.failed("loss") or not case.maps:
        run("maps", chosen.result)
        run.skip("a loss that passes" if run.failed("loss") else "a map that can be captured")
    else:
        uncovered = _about_rows(run, case, chosen, explicit)
    shown = None if run.failed("loss") else check_loss.shown(case)
    results = tuple(run.results[name] for name in CHECKS)
    return Report(results, _kinds(case, run), uncovered, shown, (len(case.singles), sum(n for _, n in case.pool)))


def _about_rows(run: _Run, case: Case, chosen: check_model.Selection, explicit: bool) -> dict[str, float]:
    """The checks that need rows; returns what is left out."""
    uncovered = uncovered_shares(case.model, case.maps)
    run("coverage", lambda: check_model.coverage(case, uncovered, explicit))
    run("mode", lambda: check_rows.mode(case))
    with ExitStack() as stack:
        if run.failed("mode"):
            stack.enter_context(evaluating(case.model))
            case.forget()
        run("features", lambda: check_rows.features(case))
        run("maps", lambda: _maps(case, chosen))
        run("conservation", lambda: check_rows.conservation(case))
        run("batch", lambda: check_rows.batch(case))
        run("isolation", lambda: check_rows.isolation(case))
        run("precision", lambda: check_retrieval.precision(case))
        run("sketch", lambda: check_retrieval.sketch(case))
    return uncovered


@contextmanager
def _muted() -> Iterator[None]:
    """What captures would log each time they are made is in the report."""
    loggers = [logging.getLogger(f"gradsift.engine.{name}") for name in ("capture", "gradient", "tap")]
    before = [logger.disabled for logger in loggers]
    for muted in loggers:
        muted.disabled = True
    try:
        yield
    finally:
        for muted, flag in zip(loggers, before, strict=True):
            muted.disabled = flag


class _Run:
    """Runs checks by name and keeps what each finds; a check that raises has failed."""

    def __init__(self, progress: Callable[[str], None]):
        self.results: dict[str, Result] = {}
        self.columns: dict[str, PerKind] = {}
        self._progress = progress

    def __call__(self, name: str, act: Callable[[], Outcome]) -> None:
        """Run one check."""
        self._progress(name)
        try:
            outcome = act()
        except BlockedError:
            outcome = Result(name, "skip", "needs rows that another check could not compute")
        except GradsiftError as error:
            outcome = Result(name, "fail", str(error))
        except Exception as error:  # what a model under test raises is a finding, and the other checks still count
            logger.debug("check %s", name, exc_info=True)
            first = next(iter(str(error).splitlines()), "")
            outcome = Result(name, "fail", f"the model raises {type(error).__name__}: {first}")
        self.results[name], self.columns[name] = outcome if isinstance(outcome, tuple) else (outcome, {})

    def failed(self, name: str) -> bool:
        """Whether a check that ran found something wrong."""
        return self.results[name].verdict == "fail"

    def skip(self, need: str) -> None:
        """All checks that have not run do not."""
        for name in CHECKS:
            if name not in self.results:
                self.results[name], self.columns[name] = Result(name, "skip", f"needs {need}"), {}


def _examples(batches: Iterable[Batch], examples: int, pool: int) -> tuple[Batch, list[tuple[Batch, int]]]:
    """A few examples of the first batch that has two, and the pool for rankings."""
    few: Batch = None
    ranked: list[tuple[Batch, int]] = []
    count = 0
    for batch in islice(batches, pool):
        n = _size(batch)
        if few is None or (_size(few) < 2 <= n):
            few = batch if n <= examples else take(batch, range(examples), n)
        keep = min(n, pool - count)
        if keep:
            ranked.append((batch if keep == n else take(batch, range(keep), n), keep))
            count += keep
        if count >= pool:
            break
    if few is None:
        raise DataError("there is no batch to check: give at least one example")
    return few, ranked


def _size(batch: Batch) -> int:
    """Examples in a batch: by its segments, or along the first axis of its first tensor."""
    segments = segments_of(batch)
    if segments is not None:
        return len(segments) - 1
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    first = next((value for value in values if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise DataError(f"a batch is a {type(batch).__name__} without a tensor: examples must lie along a first axis")
    return len(first)


def _maps(case: Case, chosen: check_model.Selection) -> Result:
    """Refused maps, and those that gave no gradient on any example."""
    silent = [m for m in case.unreported() if not any(fnmatchcase(m.name, p) for p in case.allow_idle)]
    return chosen.result(silent, check_rows.idle_cause(case) if silent else "")


def _kinds(case: Case, run: _Run) -> tuple[KindRow, ...]:
    """One row per kind of map, in the order of the model."""
    rows = []
    energy = check_rows.energy(case)
    for kind in dict.fromkeys(kind_of(found.name) for found in case.maps):
        maps = [found for found in case.maps if kind_of(found.name) == kind]
        numbers = sum(p.numel() for found in maps for p in found.parameters.values())
        columns: dict[str, Any] = {
            name: run.columns[name].get(kind) for name in ("features", "conservation", "batch", "precision", "sketch")
        }
        rows.append(KindRow(kind, len(maps), numbers, energy.get(kind), **columns))
    return tuple(rows)
