"""Checks of the model: its adapter, the maps that cannot be captured, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import nn

from gradsift.engine.capture.maps import Map, Modules, find_maps
from gradsift.engine.capture.names import active_adapters, is_instance_of, walk
from gradsift.engine.check.case import Case
from gradsift.engine.check.loss import loss_tokens
from gradsift.engine.check.parts import repeatable
from gradsift.engine.check.report import Result, Verdict
from gradsift.engine.extraction.fingerprints import sums_tokens
from gradsift.kernels.errors import CaptureError

__all__ = ["Selection", "adapter", "coverage", "select"]

_HARM = 1.1
"""An adapter that raises the loss of its own examples by more than a tenth was hardly trained on them."""

_ENOUGH, _HALF = 0.95, 0.5


class Selection:
    """The maps that can be captured, and what is refused.

    Attributes:
        modules: a selection that leaves out what is refused.
        maps: what it selects; none when everything is refused.
        refused: map name -> why.
        nothing: why the selection is empty, where no single map is to blame.
    """

    def __init__(self, modules: Modules, maps: list[Map], refused: dict[str, str], nothing: str = ""):
        self.modules = modules
        self.maps = maps
        self.refused = refused
        self.nothing = nothing

    def result(self, silent: Sequence[Map] = (), cause: str = "") -> Result:
        """The check "maps"; the ``silent`` ones gave no gradient, because of ``cause``."""
        if self.nothing:
            return Result("maps", "fail", self.nothing)
        total = len(self.maps) + len(self.refused)
        if self.refused:
            causes: dict[str, list[str]] = {}
            for name, text in self.refused.items():
                causes.setdefault(text, []).append(name)
            words = "; ".join(f"{_some(names)}: {text}" for text, names in causes.items())
            return Result(
                "maps", "fail", f"{len(self.refused)} of {total} maps refused: {words}", len(self.refused), 0.0
            )
        if silent:
            return Result("maps", "fail", cause, len(silent), 0.0)
        return Result("maps", "ok", f"all {total} maps that are selected report their gradients", 0.0, 0.0)


def select(model: nn.Module, modules: Modules) -> Selection:
    """Find the maps, one by one where some are refused."""
    try:
        return Selection(modules, find_maps(model, modules), {})
    except CaptureError as error:
        first = str(error)
    patterns = None if modules == "lora" else [modules] if isinstance(modules, str) else list(modules)
    kept: list[str] = []
    refused: dict[str, str] = {}
    for name in _candidates(model, patterns):
        try:
            find_maps(model, [escape(name)])
            kept.append(escape(name))
        except CaptureError as error:
            refused[name] = _cause(str(error), name)
    try:
        return Selection(kept, find_maps(model, kept) if kept else [], refused, "" if refused else first)
    except CaptureError as error:  # it takes several maps to see this one, such as a weight that two share
        return Selection([], [], refused, str(error))


def adapter(case: Case) -> Result:
    """The state of the LoRA layers, and whether the adapter does anything good."""
    layers = [(n, m) for n, _, m in walk(case.model) if is_instance_of(m, "peft.tuners.lora.layer", "LoraLayer")]
    if not layers:
        return Result("adapter", "skip", "the model has no LoRA layer")
    merged = [name for name, layer in layers if getattr(layer, "merged_adapters", None)]
    if merged:
        return Result(
            "adapter",
            "fail",
            f"the adapter is merged into the base weights of {len(merged)} of {len(layers)} layers, so A and B get no "
            "gradient: call model.unmerge_adapter()",
        )
    off = [name for name, layer in layers if getattr(layer, "disable_adapters", False)]
    if off:
        return Result(
            "adapter",
            "fail",
            f"adapters are disabled in {len(off)} of {len(layers)} layers: call model.enable_adapter_layers()",
        )
    if not any(active_adapters(layer) for _, layer in layers):
        return Result("adapter", "fail", "no adapter is active in any LoRA layer: call model.set_adapter(name)")
    return _trained(case, [layer for _, layer in layers])


def _trained(case: Case, layers: list[Any]) -> Result:
    """Whether the loss is lower with the adapter than without: with random weights it is not."""
    active = sorted({name for layer in layers for name in active_adapters(layer)})
    several = f"{len(active)} adapters are active ({', '.join(active)}), and rows hold the gradients of all of them"
    pairs = [layer.lora_B[name].weight for layer in layers for name in active_adapters(layer) if name in layer.lora_B]
    zero = sum(not bool(weight.any()) for weight in pairs)
    if pairs and zero == len(pairs):
        return Result(
            "adapter",
            "warn",
            "every lora_B is zero: the adapter is untrained (as new), it changes nothing, and the gradient of every "
            "lora_A is zero; give the trained adapter if there is one",
        )
    with torch.no_grad(), repeatable(case.model):
        on = float(case.loss_fn(case.model, case.batch).sum())
        with _switched_off(case.model):
            off = float(case.loss_fn(case.model, case.batch).sum())
    tokens = loss_tokens(case, case.batch) if sums_tokens(case.loss_fn) else 0
    unit = "per token" if tokens else "per example"
    count = tokens or len(case.singles)
    effect = f"{off / count:.3f} without the adapter, {on / count:.3f} with it"
    ratio = on / off if off > 0 else 1.0
    if ratio > _HARM:
        return Result(
            "adapter",
            "fail",
            f"the adapter makes its own examples worse (loss {unit}: {effect}): its weights look random, or belong to "
            "another model or other data",
            ratio,
            _HARM,
        )
    if ratio >= 1:
        return Result(
            "adapter", "warn", f"the adapter does not help on these examples (loss {unit}: {effect})", ratio, 1.0
        )
    if len(active) > 1:
        return Result("adapter", "warn", several, ratio, 1.0)
    if zero:
        return Result("adapter", "warn", f"{zero} of {len(pairs)} lora_B are zero: they were not trained", ratio, 1.0)
    return Result("adapter", "ok", f"loss {unit}: {effect}", ratio, 1.0)


def coverage(case: Case, left: dict[str, float], explicit: bool) -> Result:
    """How much of what is trained the rows see.

    Args:
        left: trainable parameters that are left out, with their shares.
        explicit: the user chose the maps, so leaving some out is no mistake.
    """
    if not any(p.requires_grad for p in case.model.parameters()):
        return Result(
            "coverage",
            "warn",
            "no parameter of the model is trainable, so what training would change is unknown: load the adapter with "
            "is_trainable=True",
        )
    captured = [(name, p) for found in case.maps for name, p in found.parameters.items()]
    numbers = sum(p.numel() for _, p in captured)
    frozen = [name for name, p in captured if not p.requires_grad]
    share = 1 - sum(left.values())
    if frozen:
        text = f"{len(frozen)} captured parameters are frozen, so training would not change them: {_some(frozen)}"
        return Result("coverage", "warn", text, share, _ENOUGH)
    if not left:
        return Result("coverage", "ok", f"every trainable number is captured ({numbers:,})", 1.0, _ENOUGH)
    names = ", ".join(f"{name} ({part:.1%})" for name, part in sorted(left.items(), key=lambda kv: -kv[1])[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    text = (
        f"{share:.1%} of the trainable numbers are captured, and nothing is said of what the rest learns: {names}{more}"
    )
    if share >= _ENOUGH:
        return Result("coverage", "ok", text, share, _ENOUGH)
    verdict: Verdict = "warn" if explicit or share >= _HALF else "fail"
    return Result("coverage", verdict, text, share, _ENOUGH)


def _candidates(model: nn.Module, patterns: list[str] | None) -> Iterator[str]:
    """Names of modules that a selection means."""
    inside: set[int] = set()
    for name, raw, module in walk(model):
        if id(module) in inside:
            continue
        lora = is_instance_of(module, "peft.tuners.lora.layer", "LoraLayer")
        wanted = patterns is None or any(fnmatchcase(n, p) for n in (name, raw) for p in patterns)
        if lora:
            inside.update(map(id, module.modules()))
        plain = isinstance(module, nn.Linear | nn.Conv2d)
        plain = plain or is_instance_of(module, "transformers.pytorch_utils", "Conv1D")
        if wanted and (lora or (patterns is not None and plain)):
            yield name


def _cause(text: str, name: str) -> str:
    """A refusal without the map's own name, so that equal ones can be told together."""
    _, found, cause = text.partition(": ")
    return cause if found and text.startswith(name) else text


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """Adapters do nothing inside.

    PEFT's own switch also changes which parameters require gradients, so its flag is set directly.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if is_instance_of(module, "peft.tuners.tuners_utils", "BaseTunerLayer")
        or is_instance_of(module, "peft.utils.other", "AuxiliaryTrainingWrapper")
    ]
    before = [(layer, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in before:
            layer._disable_adapters = flag
