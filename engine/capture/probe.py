"""Probe: does one example's loss reach only its own rows?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gradsift.engine.capture.factors import Factor
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Map
from gradsift.kernels.errors import CaptureError

__all__ = ["Probe"]

_LEAK = 1e-6
"""Share of the largest product that other examples' rows may show: what is left of exact zeros after rounding."""


class Probe:
    """A ``Receiver`` that keeps, per parameter, the largest |x_t| |g_t| among each example's rows."""

    def __init__(self, layout: Layout):
        self._layout = layout
        self._peaks: list[tuple[Map, Tensor]] = []

    def receive(self, target: Map, uses: Sequence[Sequence[Factor]]) -> None:
        """Weigh the rows of one map."""
        for use in uses:
            for factor in use:
                self._peaks.append((target, self._layout.peaks(factor.weights(), target.name)))

    def check(self, index: int) -> None:
        """Raise when the loss of example ``index`` touched rows of another.

        Raises:
            CaptureError: naming the map and the likely cause.
        """
        for target, peaks in self._peaks:
            others = peaks.clone()
            others[index] = 0
            if others.max() > _LEAK * peaks.max():
                raise CaptureError(
                    f"{target.name}: the loss of example {index} reaches rows of example {int(others.argmax())}: "
                    + self._layout.leak
                )
