"""Canonical names: what a module or parameter is called when every wrapper around it is taken away.

A sketch depends on the names of parameters, so the same weights must carry the same name under DDP, FSDP,
torch.compile, activation checkpointing and PEFT. Wrappers are recognised by type, never by the spelling of a path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from torch import nn

__all__ = ["NamedModule", "all_parameters", "only_adapter", "parameter_names", "unwrap_parallel", "walk"]

NamedModule = tuple[str, str, nn.Module]
"""Canonical name, name as ``named_modules`` gives it, module."""

_WRAPPERS = (
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("peft.peft_model", "PeftModel", "base_model"),
    ("peft.mixed_model", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "base_layer"),
)


def loaded_type(module: str, name: str) -> type | None:
    """A class of a library that is imported already; None when it is not, so that nothing can be an instance."""
    return getattr(sys.modules.get(module), name, None)


def is_instance_of(obj: object, module: str, name: str) -> bool:
    """isinstance by the name of a class, without importing its library."""
    cls = loaded_type(module, name)
    return cls is not None and isinstance(obj, cls)


def unwrap_parallel(model: nn.Module) -> nn.Module:
    """The module inside DDP or DataParallel: a frozen pass must not start their gradient reduction."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


def walk(model: nn.Module) -> Iterator[NamedModule]:
    """Every module once, with its canonical and its plain name; a shared module has the name of its first place."""
    yield from _walk(model, "", "", set(), only_adapter(model))


def only_adapter(model: nn.Module) -> str | None:
    """The adapter that all LoRA layers apply, whose name canonical names leave out; None where there are several."""
    adapters = {name for module in model.modules() for name in active_adapters(module)}
    return adapters.pop() if len(adapters) == 1 else None


def _walk(module: nn.Module, name: str, plain: str, seen: set[int], adapter: str | None) -> Iterator[NamedModule]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, plain, module
    for added, path, child in _children(module, adapter):
        yield from _walk(child, _join(name, added), _join(plain, path), seen, adapter)


def _children(module: nn.Module, adapter: str | None) -> Iterator[NamedModule]:
    """Children with what each adds to the canonical and to the plain name."""
    copy = _trained_copy(module)
    if copy is not None:
        yield "", f"modules_to_save.{copy}", getattr(module, "modules_to_save")[copy]  # noqa: B009
        return
    inner = {child for library, cls, child in _WRAPPERS if is_instance_of(module, library, cls)}
    lora = is_instance_of(module, "peft.tuners.lora.layer", "LoraLayer")
    for path, child in module.named_children():
        if lora and path.startswith("lora_") and isinstance(child, nn.ModuleDict):
            for key, part in child.named_children():
                yield path if key == adapter else f"{path}.{key}", f"{path}.{key}", part
        else:
            yield "" if path in inner else path, path, child


def _trained_copy(module: nn.Module) -> str | None:
    """The adapter whose trained copy stands in for a module of PEFT's ``modules_to_save``, if one does."""
    if not is_instance_of(module, "peft.utils.other", "ModulesToSaveWrapper"):
        return None
    copies = getattr(module, "modules_to_save", {})
    active = [name for name in getattr(module, "active_adapters", []) if name in copies]
    return active[0] if active and not getattr(module, "disable_adapters", False) else None


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name and child else name or child


def active_adapters(module: nn.Module) -> list[str]:
    """The LoRA adapters that this module applies now; empty for anything that is no LoRA layer."""
    if not is_instance_of(module, "peft.tuners.lora.layer", "LoraLayer"):
        return []
    known = {*getattr(module, "lora_A", {}), *getattr(module, "lora_embedding_A", {})}
    return [name for name in getattr(module, "active_adapters", []) if name in known]


def all_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter once. ``model.parameters()`` builds names on its way, which is felt in every pass."""
    modules, stack = {id(model)}, [model]
    found: dict[int, nn.Parameter] = {}
    while stack:
        module = stack.pop()
        found.update((id(p), p) for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None and id(child) not in modules:
                modules.add(id(child))
                stack.append(child)
    return list(found.values())


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Canonical name of every parameter, by ``id``."""
    names: dict[int, str] = {}
    for name, _, module in walk(model):
        for key, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), f"{name}.{key}" if name else key)
    return names
