"""Tap: rows as a by-product of somebody else's training step, and the check that they add up to its gradient."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from gradsift.engine.capture.features import Features
from gradsift.engine.capture.frozen import eager, frozen, same_randomness
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.names import unwrap_parallel
from gradsift.engine.capture.probe import Probe
from gradsift.engine.capture.replay import Replay
from gradsift.kernels.errors import CaptureError
from gradsift.kernels.sketch import sketch_dense

if TYPE_CHECKING:
    from gradsift.engine.capture.capture import Capture

__all__ = ["Tap"]

logger = logging.getLogger(__name__)


class Tap:
    """A context in which the caller runs one forward and backward pass, or several that belong to the same examples.

    Row i is example i's additive share of the loss that was backwarded. On a capture's first tap the rows are summed
    and compared with the sketch of the parameter gradients that autograd hands over, before any reduction or clipping;
    and the model's first call is repeated once, to see that an example's output depends on its own rows alone.

    Args:
        scale: multiplies rows and norms, to undo the caller's mean, token count, accumulation or loss scaling.

    Attributes:
        values: float32, shape (n, dim), or (n, groups, dim), after the block.
        grad_norm: float32, shape (n,), or (n, groups), after the block.
        conservation: |sum of rows - S grad| over the root sum of squares of the rows; None where it was not checked.

    Raises:
        CaptureError: at the end of the block, when a map gave no gradient, the rows do not add up, or examples share
            rows.
    """

    values: Tensor
    grad_norm: Tensor

    def __init__(self, capture: Capture, layout: Layout, scale: float):
        self._capture = capture
        self._scale = scale
        self._layout = layout
        self._rows = capture.accumulator(layout)
        self._replay = Replay(unwrap_parallel(capture.model))
        self._totals: dict[torch.device, Tensor] = {}
        self._stack = ExitStack()
        self.conservation: float | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(eager())
            self._recorder = stack.enter_context(self._capture.recorded(self._rows.receive, self._layout))
            if not self._capture.conservation_checked:
                self._watch_gradients(stack)
            if not self._capture.probed:
                stack.callback(self._replay.watch().remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None:
                return
            self._recorder.finish(self._capture.may_idle)
        values, norm = self._rows.values, self._rows.grad_norm
        if not self._capture.conservation_checked:
            self._check_conservation(values)
        if not self._capture.probed and len(values) > 1:
            self._check_separation(len(values) - 1)
        self._replay.forget()
        self.values = values * self._scale
        self.grad_norm = norm * abs(self._scale)

    @property
    def features(self) -> Features:
        """The rows with their spec and table."""
        groups = tuple(self._capture.group_names)
        return Features(self.values, None, self.grad_norm, self._capture.spec, self._capture.table, groups=groups)

    def _watch_gradients(self, stack: ExitStack) -> None:
        """Sketch every captured parameter's gradient as it arrives, before hooks of DDP or an optimizer see it."""
        spec = self._capture.spec
        for found in self._capture.maps:
            for name, parameter in found.parameters.items():
                if not parameter.requires_grad:
                    continue

                def hook(grad: Tensor, name: str = name) -> None:
                    if grad.device not in self._totals:
                        self._totals[grad.device] = torch.zeros(1, spec.dim, dtype=torch.float64, device=grad.device)
                    sketch_dense(grad.reshape(1, -1), spec, name, tuple(grad.shape), self._totals[grad.device])

                stack.callback(parameter.register_hook(hook).remove)

    def _check_conservation(self, values: Tensor) -> None:
        frozen = [n for m in self._capture.maps for n, p in m.parameters.items() if not p.requires_grad]
        if frozen:
            logger.warning(
                "conservation is not checked: %d captured parameters are frozen (%s)", len(frozen), frozen[0]
            )
            return
        total = sum(
            (t.cpu() for t in self._totals.values()),
            torch.zeros(1, self._capture.spec.dim, dtype=torch.float64),
        )
        rows = values.detach().double().cpu().view(len(values), -1, self._capture.spec.dim).sum(1)
        scale = max(float(rows.square().sum().sqrt()), float(total.norm()))
        self.conservation = float((rows.sum(0) - total[0]).norm()) / scale if scale else 0.0
        tolerance = _tolerance(self._capture)
        if not self.conservation <= tolerance:
            raise CaptureError(
                f"rows do not add up to the gradient of this backward pass (they are {self.conservation:.1e} apart, "
                f"expected at most {tolerance:.0e}): a captured weight is used in a way that no map reports"
            )
        self._capture.conservation_checked = True
        logger.info("conservation holds: rows add up to the gradient within %.1e", self.conservation)

    def _check_separation(self, index: int) -> None:
        """The last example's output, weighted at random, must reach the last example's rows only."""
        probe = Probe(self._layout)
        model = self._capture.model
        with frozen(model), same_randomness(model), self._capture.recorded(probe.receive, self._layout) as recorder:
            output = self._replay.output()
            part = None if output is None else self._layout.part(output, index)
            if part is None or not part.requires_grad:
                logger.warning(
                    "whether examples keep to their own rows is not checked: the model's output does not say"
                )
                return
            (part.float() * torch.randn(part.shape, device=part.device)).sum().backward()  # type: ignore[no-untyped-call]
            recorder.finish(lambda _: True)
        probe.check(index)
        self._capture.probed = True


def _tolerance(capture: Capture) -> float:
    """float32 sums differ by rounding only; low precision by what its weight gradients lose."""
    dtypes = {p.dtype for found in capture.maps for p in found.parameters.values()}
    low = (
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") or dtypes - {torch.float32, torch.float64}
    )
    return 2e-2 if low else 1e-4
