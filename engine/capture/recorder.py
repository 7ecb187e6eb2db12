"""Recorder: watches the maps during a forward and backward pass and hands over each map's factors once.

How it reads without disturbing:
- x travels with autograd's own saved tensors, so activation checkpointing, offloading and freed graphs apply to it as
  they do to the model's;
- the mark that reads a gradient is an in-place identity on an output, so it neither copies nor makes a view, and it
  starts the graph where nothing before it requires a gradient;
- a call made while a backward pass runs is a recomputation: it is not counted as another use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsift.engine.capture.factors import Factor
from gradsift.engine.capture.layout import Layout
from gradsift.engine.capture.maps import Complete, Map
from gradsift.kernels.errors import CaptureError

__all__ = ["Receiver", "Recorder"]

Receiver = Callable[[Map, Sequence[Sequence[Factor]]], None]
"""Takes a map and the factors of each of its uses in this pass."""


class _Mark(torch.autograd.Function):
    """Identity on ``output``; its backward reads the gradient together with the saved tensors."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, starter: Tensor, receive: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: checkpointing recomputes at each access
        ctx.receive(grad, *saved)
        return (grad, None, None, *[None] * len(saved))


@dataclass(slots=True)
class _Count:
    """Calls of one map in this pass, and the uses that are complete but not handed over."""

    recorded: int = 0
    silent: int = 0
    delivered: int = 0
    waiting: list[list[Factor]] = field(default_factory=list)


class Recorder:
    """Hooks on the maps for one pass; a context manager.

    Args:
        maps: what to watch.
        receive: called once per map and pass, as soon as all of its uses have their gradients.
        layout: sees the input of every call, before any gradient arrives.
    """

    def __init__(self, maps: Sequence[Map], receive: Receiver, layout: Layout):
        self._maps = maps
        self._receive = receive
        self._layout = layout
        self._counts = {id(found): _Count() for found in maps}
        self.starter = torch.zeros((), requires_grad=True)
        self._stack = ExitStack()

    def __enter__(self) -> Recorder:
        for found in self._maps:
            for handle in found.watch(self):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for count in self._counts.values():
            count.waiting.clear()

    def called(self, target: Map, x: Tensor) -> bool:
        """Count a call; whether a gradient will be recorded for it."""
        grad = torch.is_grad_enabled()
        self._layout.see(x)
        if not _in_backward():
            count = self._counts[id(target)]
            count.recorded += grad
            count.silent += not grad
        return grad

    def receiver(self, target: Map, complete: Complete) -> Callable[..., None]:
        """What a backward pass calls to complete a use of the map."""
        return lambda *found: self._complete(target, complete(*found))

    def mark(self, target: Map, output: Tensor, saved: Sequence[Tensor], complete: Complete) -> None:
        """Have ``complete(gradient, *saved)`` called when the gradient at ``output`` is known."""
        _Mark.apply(output, self.starter, self.receiver(target, complete), *saved)  # type: ignore[no-untyped-call]

    def _complete(self, target: Map, factors: list[Factor]) -> None:
        count = self._counts[id(target)]
        count.waiting.append(factors)
        if len(count.waiting) == count.recorded + count.silent - count.delivered:
            self._deliver(target, count)

    def _deliver(self, target: Map, count: _Count) -> None:
        uses, count.waiting = count.waiting, []
        count.delivered += len(uses)
        self._receive(target, uses)

    def any_silent(self) -> bool:
        """Whether a map ran only where no gradient is recorded: reentrant checkpointing's first pass looks so."""
        return any(count.silent and not count.recorded for count in self._counts.values())

    def finish(self, allow_idle: Callable[[Map], bool]) -> None:
        """Hand over what still waits, after the backward pass.

        Raises:
            CaptureError: a map reported nothing; the text names it and the cause.
        """
        for found in self._maps:
            count = self._counts[id(found)]
            if count.waiting:
                self._deliver(found, count)
        idle = [found for found in self._maps if not self._counts[id(found)].delivered and not allow_idle(found)]
        if idle:
            raise CaptureError(self._idle_words(idle))

    def _idle_words(self, idle: list[Map]) -> str:
        count = self._counts[id(idle[0])]
        if count.recorded:
            cause = "it ran, but no gradient came back: its output does not reach the loss"
        elif count.silent:
            cause = (
                "it ran only under no_grad: gradient checkpointing with use_reentrant=True needs an input that "
                "requires a gradient, so call model.enable_input_require_grads() or use use_reentrant=False"
            )
        else:
            cause = (
                "it never ran: the model skips it, calls its weight without the module, runs inside a compiled "
                "graph, or its adapter is off"
            )
        names = ", ".join(found.name for found in idle[:3])
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        return (
            f"{len(idle)} of {len(self._maps)} maps gave no gradient ({names}{more}): {cause}; "
            "list a map that may stay idle in allow_idle=[...]"
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
