"""Maps: the linear maps whose per-example gradients are captured, how they are chosen, and what is refused.

A map owns one or two parameters and knows where its two factors are read. The gradient of a parameter (p, q) for one
example is the sum over its tokens of g x^T; LoRA's A takes (x, u) and B takes (h, g), where h = A x and u is the
gradient that reaches h. The tokens of a convolution are the patches that it sees.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradsift.engine.capture.factors import Factor, factor_of
from gradsift.engine.capture.features import TableRow
from gradsift.engine.capture.fused import FusedLora, Override, is_plain
from gradsift.engine.capture.names import active_adapters, is_instance_of, parameter_names, walk
from gradsift.kernels.errors import CaptureError

__all__ = ["Complete", "Map", "Watcher", "find_maps", "parameters_of", "uncovered_shares"]

Modules = str | Sequence[str]
Complete = Callable[..., list[Factor]]


class Watcher(Protocol):
    """What a map tells while the model runs."""

    starter: Tensor
    """A scalar that requires a gradient: what takes it as an input starts the graph."""

    def called(self, target: Map, x: Tensor) -> bool:
        """The map computes on x (.., d); False when no gradient is recorded now."""

    def receiver(self, target: Map, complete: Complete) -> Callable[..., None]:
        """What to call in the backward pass, with the arguments of ``complete``."""

    def mark(self, target: Map, output: Tensor, saved: Sequence[Tensor], complete: Complete) -> None:
        """Call ``complete(gradient at output, *saved)`` in the backward pass."""


class Handle(Protocol):
    """What undoes a hook."""

    def remove(self) -> None:
        """Undo it."""


class Map(ABC):
    """A linear map with the parameters that it owns.

    Attributes:
        name: canonical name of the module.
        kind: "lora", "linear", "conv1d" (transformers' ``Conv1D``, a linear map) or "conv2d".
        parameters: canonical parameter name -> parameter.
        scale: LoRA's scaling; 1 for other maps.
        modules: the modules that apply it; several when they share their weight.
    """

    kind: str

    def __init__(self, name: str, module: nn.Module, parameters: dict[str, nn.Parameter], scale: float = 1.0):
        self.name = name
        self.modules = [module]
        self.parameters = parameters
        self.scale = scale

    @property
    def table(self) -> list[TableRow]:
        """A row per parameter."""
        return [TableRow(name, tuple(p.shape), self.scale) for name, p in self.parameters.items()]

    def check(self) -> None:  # noqa: B027 - most maps cannot be switched off
        """Raise when the map would compute something else than its parameters say."""

    @abstractmethod
    def watch(self, watcher: Watcher) -> Sequence[Handle]:
        """Hook the modules; the handles undo it."""


class LinearMap(Map):
    """``nn.Linear``: weight (d_out, d_in)."""

    kind = "linear"

    def watch(self, watcher: Watcher) -> Sequence[Handle]:
        """Read x at the input and g at the output."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if watcher.called(self, args[0]):
                watcher.mark(self, output, [args[0]], partial(self.factors, output.dtype))

        return [module.register_forward_hook(hook) for module in self.modules]

    def factors(self, dtype: torch.dtype, g: Tensor, x: Tensor) -> list[Factor]:
        """The factors as the map itself multiplied them: x in the dtype of the product."""
        (name,) = self.parameters
        return [Factor(name, x.to(dtype), g)]


class Conv1DMap(LinearMap):
    """transformers' ``Conv1D``: weight (d_in, d_out), so the roles of x and g are exchanged."""

    kind = "conv1d"

    def factors(self, dtype: torch.dtype, g: Tensor, x: Tensor) -> list[Factor]:
        """As of a linear map, transposed."""
        (name,) = self.parameters
        return [Factor(name, g, x.to(dtype))]


class Conv2dMap(Map):
    """``nn.Conv2d``: weight (o, c / groups, kh, kw)."""

    kind = "conv2d"

    def watch(self, watcher: Watcher) -> Sequence[Handle]:
        """Read x at the input and g at the output."""
        return [module.register_forward_hook(self._hook(watcher, module)) for module in self.modules]

    def _hook(self, watcher: Watcher, module: nn.Module) -> Callable[..., None]:
        (name,) = self.parameters
        factor = factor_of(module, self.name)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if watcher.called(self, _channels_last(args[0])):
                dtype = output.dtype
                watcher.mark(self, output, [args[0]], lambda g, x: [factor(name, x.to(dtype), g)])

        return hook


class LoraMap(Map):
    """One adapter of one LoRA layer of PEFT, on a linear map: A (r, d_in) and B (d_out, r); or on a convolution:
    A (r, c / groups, kh, kw) and B (o, r / groups, 1, 1).

    x is read at the layer's input and g at its output: on a low-precision base PEFT casts adapters up, and the copies
    that A and B would see are never kept. Only behind an active dropout is x read at A.
    """

    kind = "lora"

    def __init__(self, name: str, layer: Any, adapter: str, parameters: dict[str, nn.Parameter]):
        super().__init__(name, layer, parameters, float(layer.scaling[adapter]))
        self.layer = layer
        self.adapter = adapter
        self.factors: list[Callable[..., Factor]] = []

    @property
    def table(self) -> list[TableRow]:
        """Rows of A and B, with the scaling that is in force now."""
        self.scale = float(self.layer.scaling[self.adapter])
        return super().table

    def check(self) -> None:
        """Refuse a layer whose adapter is merged or switched off: it computes, but not with A and B."""
        if getattr(self.layer, "merged_adapters", None):
            raise CaptureError(
                f"{self.name}: the adapter is merged into the base weight, so A and B get no gradient: "
                "call model.unmerge_adapter() first"
            )
        if getattr(self.layer, "disable_adapters", False):
            raise CaptureError(f"{self.name}: adapters are disabled: enable them before capturing")
        if self.adapter not in self.layer.active_adapters:
            raise CaptureError(
                f"{self.name}: adapter {self.adapter!r} is no longer active: make a new Capture after set_adapter"
            )

    def watch(self, watcher: Watcher) -> Sequence[Handle]:
        """Three hooks: the layer's input, A's output, the layer's output; and a fused forward where it is the same."""
        inputs: list[Tensor] = []
        uses: list[_LoraUse] = []
        pair = [self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]]
        self.factors = [factor_of(module, self.name) for module in pair]
        is_convolution = isinstance(pair[0], nn.Conv2d)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._stands_aside():
                return
            self.check()
            inputs[:] = [args[0] if args else kwargs["x"]]
            uses.clear()

        def down(_: nn.Module, args: tuple[Any, ...], h: Tensor) -> None:
            x = args[0] if self._drops() else inputs[0]
            if not watcher.called(self, _channels_last(x) if is_convolution else x):
                return
            use = _LoraUse(self, h.dtype)
            uses.append(use)
            watcher.mark(self, h, [x, h], use.complete)

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if kwargs.get("adapter_names") is not None:  # set by a hook of PEFT's that runs after `enter`
                raise CaptureError(
                    f"{self.name}: adapter_names mixes adapters within a batch: give one batch per adapter"
                )
            for use in uses:
                if output.requires_grad:
                    output.register_hook(use.receive)
            inputs.clear()
            uses.clear()

        fused = [Override(self.layer, self._fused(watcher))] if is_plain(self.layer, self.adapter) else []
        return [
            *fused,
            self.layer.register_forward_pre_hook(enter, with_kwargs=True),
            pair[0].register_forward_hook(down),
            self.layer.register_forward_hook(leave, with_kwargs=True),
        ]

    def _fused(self, watcher: Watcher) -> Callable[..., Tensor]:
        """The layer's forward as one function; calls that it does not cover take the usual way, hooks and all."""
        layer, forward = self.layer, self.layer.forward
        a, b = self.parameters.values()
        scale = float(layer.scaling[self.adapter])
        down, up = self.parameters

        def complete(g: Tensor, u: Tensor, x: Tensor, h: Tensor) -> list[Factor]:
            return [Factor(down, x, u), Factor(up, h, g, scale)]

        receive = watcher.receiver(self, complete)

        def fused(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._stands_aside():
                return forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            plain = not args and all(value is None for value in kwargs.values())
            if not plain or x.dtype != a.dtype or torch.is_autocast_enabled(x.device.type):
                return forward(x, *args, **kwargs)  # type: ignore[no-any-return]
            watcher.called(self, x)
            y: Tensor = FusedLora.apply(x, watcher.starter, layer.base_layer, a, b, scale, receive)  # type: ignore[no-untyped-call]
            return y

        return fused

    def _stands_aside(self) -> bool:
        """Whether this is a pass of the reference model: adapters are off, and nothing could have a gradient."""
        return not torch.is_grad_enabled() and bool(getattr(self.layer, "disable_adapters", False))

    def _drops(self) -> bool:
        dropout = self.layer.lora_dropout[self.adapter]
        return bool(dropout.training and getattr(dropout, "p", 0.0) > 0.0)


class _LoraUse:
    """One call of a LoRA map: g arrives at the layer's output first, then u at A's output completes it."""

    def __init__(self, owner: LoraMap, dtype: torch.dtype):
        self.owner = owner
        self.dtype = dtype
        self.scale = float(owner.layer.scaling[owner.adapter])
        self.g: Tensor | None = None

    def receive(self, g: Tensor) -> None:
        self.g = g if self.g is None else self.g + g

    def complete(self, u: Tensor, x: Tensor, h: Tensor) -> list[Factor]:
        g, self.g = self.g, None
        if g is None:
            raise CaptureError(f"{self.owner.name}: a gradient reached A but not the layer's output: unknown variant")
        a, b = self.owner.parameters
        down, up = self.owner.factors
        return [down(a, x.to(self.dtype), u), up(b, h, g.to(self.dtype), self.scale)]


def _channels_last(x: Tensor) -> Tensor:
    """Images (n, c, h, w) as (n, h, w, c): what a linear map calls tokens (.., d)."""
    return x.movedim(1, -1) if x.ndim > 1 else x


def find_maps(model: nn.Module, modules: Modules = "lora") -> list[Map]:
    """The maps that a selection names, in the order of the model.

    Args:
        modules: "lora" for the pairs of every active LoRA adapter of PEFT; else one glob or several, matched against
            canonical and plain module names: ``nn.Linear``, ``nn.Conv2d``, transformers' ``Conv1D``, and LoRA layers
            (their pair). A subclass is taken to compute what its base class does with its weight: where it does not,
            the tap's conservation and ``check`` say so.

    Raises:
        CaptureError: nothing matches; or a match cannot be captured truthfully, with its name and the cause.
    """
    patterns = None if modules == "lora" else [modules] if isinstance(modules, str) else list(modules)
    named = list(walk(model))
    names = parameter_names(model)
    maps: list[Map] = []
    inside_lora: set[int] = set()
    for name, plain, module in named:
        if patterns is not None and not any(fnmatchcase(n, p) for n in (name, plain) for p in patterns):
            continue
        if id(module) in inside_lora:
            continue
        if is_instance_of(module, "peft.tuners.lora.layer", "LoraLayer"):
            maps += _lora_maps(name, module, names)
            inside_lora.update(map(id, module.modules()))
        elif patterns is not None and (plain_map := _plain_map(name, module, names)) is not None:
            maps.append(plain_map)
    if not maps:
        raise CaptureError(_nothing_matches(modules, named))
    maps = _merge_shared(maps)
    _refuse_outside_uses(maps, named)
    for found in maps:
        found.check()
    return maps


def parameters_of(model: nn.Module, modules: Modules = "lora") -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of every captured parameter, in table order."""
    return {name: p for found in find_maps(model, modules) for name, p in found.parameters.items()}


def uncovered_shares(model: nn.Module, maps: Iterable[Map]) -> dict[str, float]:
    """Trainable parameters that no map owns: canonical name -> share of all trainable numbers."""
    owned = {id(p) for found in maps for p in found.parameters.values()}
    names = parameter_names(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in trainable)
    shares: dict[str, float] = {}
    for parameter in trainable:
        if id(parameter) not in owned:  # nested wrappers of PEFT can give two parameters one name
            name = names.get(id(parameter), "?")
            shares[name] = shares.get(name, 0.0) + parameter.numel() / total
    return shares


def _lora_maps(name: str, layer: Any, names: dict[int, str]) -> list[Map]:
    maps: list[Map] = []
    for adapter in active_adapters(layer):
        _refuse_variant(name, layer, adapter)
        weights = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
        maps.append(LoraMap(name, layer, adapter, {names[id(w)]: w for w in weights}))
    return maps


def _refuse_variant(name: str, layer: Any, adapter: str) -> None:
    """Everything that has a LoRA's shape but another formula is refused by its name."""
    cause = None
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
    if getattr(layer, "use_dora", {}).get(adapter):
        cause = "DoRA divides by the norm of the merged weight"
    elif variant is not None:
        cause = f"the LoRA variant {type(variant).__name__} has another formula"
    elif is_instance_of(layer, "peft.tuners.lora.layer", "ParamWrapper"):
        cause = (
            f"LoRA on the parameter {getattr(layer, 'parameter_name', '?')!r} of {type(base).__name__} is added to the "
            "weight itself (as on fused experts), so no activation of it can be read"
        )
    elif is_instance_of(layer, "peft.tuners.lora.layer", "MultiheadAttention"):
        cause = "PEFT merges the adapter of nn.MultiheadAttention in its forward"
    elif adapter not in layer.lora_A or not isinstance(layer.lora_A[adapter], nn.Linear | nn.Conv2d):
        cause = f"{type(layer).__name__} on {type(base).__name__} is not LoRA on a linear map or nn.Conv2d"
    elif not isinstance(layer.lora_B[adapter], nn.Linear | nn.Conv2d):
        cause = f"its B is a {type(layer.lora_B[adapter]).__name__}"
    if cause is not None:
        raise CaptureError(
            f"{name} ({type(layer).__name__}) cannot be captured: {cause}; "
            "leave it out by naming the other modules in modules=[...], or train it as plain LoRA"
        )


def _plain_map(name: str, module: nn.Module, names: dict[int, str]) -> Map | None:
    kind: type[Map]
    if isinstance(module, nn.Linear):
        kind, expected = LinearMap, 2
    elif isinstance(module, nn.Conv2d):
        kind, expected = Conv2dMap, 4
    elif is_instance_of(module, "transformers.pytorch_utils", "Conv1D"):
        kind, expected = Conv1DMap, 2
    else:
        return None
    weight: Any = module.weight
    if not isinstance(weight, nn.Parameter) or weight.ndim != expected or not weight.is_floating_point():
        raise CaptureError(
            f"{name} ({type(module).__name__}) holds a packed weight of {getattr(weight, 'dtype', '?')}: "
            "its gradient is not defined, so train a LoRA on it"
        )
    return kind(name, module, {names[id(weight)]: weight})


def _merge_shared(maps: list[Map]) -> list[Map]:
    """Maps that share their weight are one map with several modules."""
    by_weight: dict[tuple[int, ...], Map] = {}
    for found in maps:
        key = tuple(id(p) for p in found.parameters.values())
        first = by_weight.setdefault(key, found)
        if first is not found:
            if isinstance(found, LoraMap):
                raise CaptureError(f"{found.name} shares its LoRA weights with {first.name}: tied LoRA is refused")
            first.modules += found.modules
    return list(by_weight.values())


def _refuse_outside_uses(maps: list[Map], named: list[tuple[str, str, nn.Module]]) -> None:
    """A weight that is also used elsewhere has a gradient that its map alone cannot give."""
    owners = {id(p): found for found in maps for p in found.parameters.values()}
    inside = {id(m) for found in maps for module in found.modules for m in module.modules()}
    for name, _, module in named:
        if id(module) in inside:
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in owners:
                raise CaptureError(
                    f"the weight of {owners[id(parameter)].name} is tied to {name} ({type(module).__name__}), "
                    "whose use is not captured: leave it out of modules=[...]"
                )


def _nothing_matches(modules: Modules, named: list[tuple[str, str, nn.Module]]) -> str:
    known = [name for name, _, module in named if isinstance(module, nn.Linear | nn.Conv2d)]
    layers = [m for _, _, m in named if is_instance_of(m, "peft.tuners.tuners_utils", "BaseTunerLayer")]
    tuners = sorted({type(m).__module__.removeprefix("peft.tuners.").split(".")[0] for m in layers})
    if modules == "lora":
        found = (
            f"the model has {', '.join(tuners)} layers of PEFT"
            if tuners
            else "the model has no LoRA layer that is active"
        )
        return (
            f"modules='lora' selects nothing: {found}; attach an adapter with PEFT, or give a glob such as '*.q_proj'"
        )
    examples = ", ".join(known[:4]) or "none"
    return f"modules={modules!r} matches no linear map and no nn.Conv2d; there are, for example, {examples}"
