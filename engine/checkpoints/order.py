"""Which parameter a number in an optimizer's state means: it counts them in the order in which it was given them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradsift.engine.checkpoints.spellings import spellings
from gradsift.kernels.errors import DataError

__all__ = ["indices_of"]

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names that transformers' Trainer leaves without weight decay, in lower case."""

Named = Sequence[tuple[str, nn.Parameter]]


def indices_of(
    state: Mapping[str, Any],
    model: nn.Module,
    captured: Mapping[str, nn.Parameter],
    saved: Sequence[Tensor],
    where: str,
) -> dict[int, Any]:
    """``id`` of a parameter -> its number in the state.

    Names in the state decide (torch writes ``param_names`` where it was given some). Else the parameters are those that
    require a gradient now, that the checkpoint holds, that are captured, or all; in one group, or parted as the Trainer
    does; whichever fits the sizes of the groups and every shape in the state.

    Args:
        captured: the parameters that matter.
        saved: tensors of the model that the checkpoint's weights hold.
        where: what is read, for errors.

    Raises:
        DataError: no order fits, or two do that differ in a captured parameter.
    """
    groups = state["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if groups and all("param_names" in group for group in groups):
        known = spellings(model)
        names = [name for group in groups for name in group["param_names"]]
        return {id(known[name]): number for name, number in zip(names, numbers, strict=True) if name in known}
    sizes = [len(group["params"]) for group in groups if group["params"]]
    fitting: list[dict[int, Any]] = []
    for lists in _orders(model, captured, saved):
        if [len(part) for part in lists if part] != sizes:
            continue
        order = [p for part in lists for p in part]
        if all(_fits(state["state"].get(number), p) for number, p in zip(numbers, order, strict=True)):
            places = {id(p): number for number, p in zip(numbers, order, strict=True)}
            fitting.append({id(p): places[id(p)] for p in captured.values() if id(p) in places})
    if not fitting:
        raise DataError(
            f"{where} has groups of {sizes} parameters, which fits no order of this model's parameters (one group, or "
            "the Trainer's with and without weight decay): give the optimizer itself, or moments by name "
            "(AdamMoments.save)"
        )
    if any(other != fitting[0] for other in fitting):
        raise DataError(
            f"{where} fits this model's parameters in more than one order: give the optimizer itself, or moments by "
            "name (AdamMoments.save)"
        )
    return fitting[0]


def _orders(
    model: nn.Module, captured: Mapping[str, nn.Parameter], saved: Sequence[Tensor]
) -> Iterator[list[list[nn.Parameter]]]:
    """Groups of parameters that an optimizer may have been given, likely ones first."""
    named = list(model.named_parameters())
    normed = _of_norms(model)
    chosen: list[Callable[[nn.Parameter], bool]] = [
        lambda p: p.requires_grad,
        lambda p: id(p) in {id(t) for t in saved},
        lambda p: id(p) in {id(t) for t in captured.values()},
        lambda p: True,
    ]
    for wanted in chosen:
        some: Named = [(name, p) for name, p in named if wanted(p)]
        yield [[p for _, p in some]]
        for bare in (_is_bare, _was_bare):
            without = {id(p) for name, p in some if bare(name) or id(p) in normed}
            yield [[p for _, p in some if id(p) not in without], [p for _, p in some if id(p) in without]]


def _is_bare(name: str) -> bool:
    """Whether the Trainer leaves a parameter of that name without weight decay."""
    return bool(_NO_DECAY.search(name.lower()))


def _was_bare(name: str) -> bool:
    """The same before transformers 4.50."""
    return "bias" in name


def _of_norms(model: nn.Module) -> set[int]:
    """Parameters of normalisation layers by type."""
    layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm) or type(m).__name__.endswith("RMSNorm")]
    return {id(p) for layer in layers for p in layer.parameters()}


def _fits(state: Any, parameter: nn.Parameter) -> bool:
    moment = state.get("exp_avg") if isinstance(state, Mapping) else None
    return not isinstance(moment, Tensor) or moment.shape == parameter.shape
