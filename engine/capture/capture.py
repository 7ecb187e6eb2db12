"""Capture: one sketched gradient row per example from a single batched forward and backward pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradsift.engine.capture.accumulator import Accumulator
from gradsift.engine.capture.features import Features, TableRow
from gradsift.engine.capture.frozen import frozen, inputs_require_grad, same_randomness
from gradsift.engine.capture.layout import Layout, make_layout, owners_of
from gradsift.engine.capture.maps import Map, Modules, find_maps, uncovered_shares
from gradsift.engine.capture.names import unwrap_parallel
from gradsift.engine.capture.probe import Probe
from gradsift.engine.capture.recorder import Receiver, Recorder
from gradsift.engine.capture.tap import Tap
from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import CaptureError
from gradsift.kernels.outer import BACKENDS
from gradsift.kernels.spec import SketchSpec

__all__ = ["GROUPS", "Capture", "LossFunction", "Moments"]

logger = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Any], Tensor]
"""``loss_fn(model, batch)`` -> (n,), one loss per example."""

GROUPS = (None, "parameter", "map")


class Moments(Protocol):
    """Adam's state for every captured parameter, such as ``AdamMoments``."""

    def step(self, name: str) -> AdamStep:
        """The update of one parameter."""

    @property
    def preconditioner(self) -> dict[str, Any]:
        """What a store says of it."""


class Capture:
    """Reads per-example gradients of chosen linear maps as rows of a sketch.

    Args:
        model: any module; wrappers (PEFT, DDP, compile, checkpointing) are seen through.
        spec: the projection.
        modules: "lora", one glob, or several; see ``find_maps``.
        backend: "auto" is Triton on a GPU and torch elsewhere; a backend named explicitly never falls back.
        allow_idle: globs of maps that may give no gradient in a pass.
        groups: keep the sketches of groups of parameters apart, all drawn by one seed: "parameter" has one for each
            captured parameter (LoRA's A and B are two), "map" one for each map. Rows are then (n, groups, dim): with
            the 448 matrices of a LoRA on 7 maps of 32 layers, 448 times the memory of a joint row. Summed over groups
            they are the joint row.

    Attributes:
        spec: the projection, bound to the parameters when it is the identity.
        uncovered: trainable parameters left out: canonical name -> share of all trainable numbers.
        groups: the group of every captured parameter, name -> name, in table order; None for joint rows.

    Raises:
        CaptureError: nothing is selected, or a selected map cannot be captured truthfully.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: SketchSpec,
        modules: Modules = "lora",
        backend: str = "auto",
        allow_idle: Sequence[str] = (),
        groups: str | None = None,
    ):
        if groups not in GROUPS:
            raise ValueError(f"groups is {groups!r}, expected None, 'parameter' or 'map'")
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
        self.model = model
        self.backend = backend
        self.maps = find_maps(model, modules)
        self.spec = spec.bind(tuple((row.name, row.shape) for row in self.table))
        self.uncovered = uncovered_shares(model, self.maps)
        self.groups = None if groups is None else _groups(self.maps, groups)
        self._allow_idle = tuple(allow_idle)
        self._input_grads = False
        self.probed = False
        self.conservation_checked = False
        if self.uncovered:
            logger.warning(
                "%.2g%% of the trainable parameters are not captured: %s%s",
                100 * sum(self.uncovered.values()),
                ", ".join(list(self.uncovered)[:4]),
                ", ..." if len(self.uncovered) > 4 else "",
            )

    @property
    def table(self) -> tuple[TableRow, ...]:
        """The captured parameters: canonical name, full shape, scale."""
        return tuple(row for found in self.maps for row in found.table)

    @property
    def group_names(self) -> list[str]:
        """The groups in the order of a row's parts; empty for joint rows."""
        return list(dict.fromkeys((self.groups or {}).values()))

    def accumulator(self, layout: Layout, adam: Moments | None = None) -> Accumulator:
        """Where the rows of one pass come together."""
        places = {name: i for i, name in enumerate(self.group_names)}
        groups = None if self.groups is None else {name: places[group] for name, group in self.groups.items()}
        return Accumulator(self.spec, layout, self.backend, groups, None if adam is None else adam.step)

    def __call__(
        self,
        batch: Any,
        loss_fn: LossFunction,
        segments: Tensor | Sequence[int] | None = None,
        batch_axis: int = 0,
        adam: Moments | None = None,
    ) -> Features:
        """One row per example.

        Args:
            batch: whatever ``loss_fn`` takes.
            loss_fn: one loss per example, each from its own tokens only. Where the model sees other rows than one per
                example (an example's noised copies, its crops), ``loss_fn.owners(batch)`` gives the example of each
                row, shape (rows,), or None.
            segments: offsets (n + 1,) of the examples in packed tokens.
            batch_axis: the axis of activations along which examples lie, when they are not packed.
            adam: moments (``adam_moments``): rows are of Adam's update from each example alone instead of its gradient,
                and ``grad_norm`` is the update's norm. An example whose gradient is zero has a row of zeros, and so has
                a map that gives no gradient in this batch (``allow_idle``): its optimizer would skip it.

        Returns:
            Features of n rows. Model, gradients, modes and hooks are left as they were, also after an error.

        Raises:
            CaptureError: losses are not per example, a map gives no gradient, or (checked on the first batch of two
                or more) one example's loss reaches another example's rows; or Adam is asked for where a map's gradient
            comes in several backward passes.
        """
        with frozen(self.model):
            layout = self.layout(batch, loss_fn, segments, batch_axis)
            rows = self.accumulator(layout, adam)
            loss = self._run(batch, loss_fn, layout, rows.receive, torch.sum)
            if not self.probed and len(loss) > 1:
                with same_randomness(self.model):
                    self._probe(batch, loss_fn, layout, loss)
        kind = getattr(loss_fn, "kind", None)
        applied = None if adam is None else adam.preconditioner
        groups = tuple(self.group_names)
        return Features(rows.values, loss.float(), rows.grad_norm, self.spec, self.table, kind, applied, groups)

    def factors(
        self,
        batch: Any,
        loss_fn: LossFunction,
        receive: Callable[[Layout], Receiver],
        segments: Tensor | Sequence[int] | None = None,
        batch_axis: int = 0,
    ) -> Tensor:
        """One pass whose factors are handed over as they are, instead of becoming rows.

        Args:
            receive: makes the receiver of this pass, which is told which row is whose.
            batch, loss_fn, segments, batch_axis: as of a call, as are the errors.

        Returns:
            the losses, (n,), detached.
        """
        with frozen(self.model):
            layout = self.layout(batch, loss_fn, segments, batch_axis)
            return self._run(batch, loss_fn, layout, receive(layout), torch.sum)

    def tap(
        self,
        segments: Tensor | Sequence[int] | None = None,
        batch_axis: int = 0,
        scale: float = 1.0,
        owners: Tensor | Sequence[int] | None = None,
    ) -> Tap:
        """Rows as a by-product of the caller's own forward and backward pass; see ``Tap``.

        Args:
            segments, batch_axis: as of a call.
            owners: the example of each row that the model sees, shape (rows,); None for one row each. The largest
                says how many examples there are.
        """
        return Tap(self, make_layout(segments, batch_axis, owners), scale)

    def layout(
        self, batch: Any, loss_fn: LossFunction, segments: Tensor | Sequence[int] | None, batch_axis: int
    ) -> Layout:
        """Which row is whose in a pass of this loss over this batch."""
        return make_layout(segments, batch_axis, owners_of(loss_fn, batch))

    def may_idle(self, found: Map) -> bool:
        """Whether a map is listed in ``allow_idle``."""
        return any(fnmatchcase(found.name, pattern) for pattern in self._allow_idle)

    @contextmanager
    def recorded(self, receive: Receiver, layout: Layout) -> Iterator[Recorder]:
        """Hooks on the maps for one pass."""
        for found in self.maps:
            found.check()
        with ExitStack() as stack:
            if self._input_grads:
                stack.enter_context(inputs_require_grad(self.model))
            yield stack.enter_context(Recorder(self.maps, receive, layout))

    def _losses(self, batch: Any, loss_fn: LossFunction, layout: Layout) -> Tensor:
        loss = loss_fn(unwrap_parallel(self.model), batch)
        if not isinstance(loss, Tensor) or loss.ndim != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise CaptureError(
                f"loss_fn returned {got}, expected one loss per example, shape (n,): do not reduce over the batch"
            )
        layout.expect(len(loss))
        return loss

    def _run(
        self,
        batch: Any,
        loss_fn: LossFunction,
        layout: Layout,
        receive: Receiver,
        reduce: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """One forward and backward pass; the losses, detached."""
        with self.recorded(receive, layout) as recorder, warnings.catch_warnings():
            if not self.probed:
                warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            loss = self._losses(batch, loss_fn, layout)
            again = recorder.any_silent() and not self._input_grads
            if not again:
                if loss.requires_grad:
                    reduce(loss).backward()  # type: ignore[no-untyped-call]
                recorder.finish(self.may_idle)
        if again:  # reentrant checkpointing: nothing is recorded unless its input requires a gradient
            self._input_grads = True
            return self._run(batch, loss_fn, layout, receive, reduce)
        return loss.detach()

    def _probe(self, batch: Any, loss_fn: LossFunction, layout: Layout, loss: Tensor) -> None:
        """On the first batch of two or more, one example's loss must reach no other example's rows."""
        counted = loss.nonzero().flatten()
        index = int(counted[-1]) if len(counted) else len(loss) - 1
        probe = Probe(layout)
        self._run(batch, loss_fn, layout, probe.receive, lambda losses: losses[index])
        probe.check(index)
        self.probed = True


def _groups(maps: Sequence[Map], kind: str) -> dict[str, str]:
    """The group of every parameter."""
    return {name: found.name if kind == "map" else name for found in maps for name in found.parameters}
