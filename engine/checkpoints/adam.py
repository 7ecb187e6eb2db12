"""adam_moments: the state of an Adam optimizer by parameter name, from wherever training left it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.engine.checkpoints.folder import load_torch, trainer_folder, weights_in
from gradsift.engine.checkpoints.moments import AdamMoments
from gradsift.engine.checkpoints.order import indices_of
from gradsift.engine.checkpoints.spellings import spellings
from gradsift.kernels.errors import DataError

__all__ = ["adam_moments"]


class _Found(NamedTuple):
    """One parameter's state, and the options of its group."""

    state: Mapping[str, Any]
    group: Mapping[str, Any]


def adam_moments(source: Any, model: nn.Module, modules: Modules = "lora", form: str = "less") -> AdamMoments:
    """Moments of every captured parameter.

    Args:
        source: one of
            a ``torch.optim.AdamW``, or ``Adam`` without weight decay, that holds this model's parameters;
            its ``state_dict()``, or a file that ``torch.save`` wrote of it;
            a checkpoint folder of the Hugging Face Trainer (``optimizer.pt``);
            a .safetensors file of ``exp_avg.NAME`` and ``exp_avg_sq.NAME``, as ``AdamMoments.save`` writes it.
            A state_dict has numbers where names should be: it is matched with the parameters in torch's order over one
            group, or in that of the Trainer, which puts those with weight decay before those without; counts and
            shapes must fit, and where two orders fit that would give a captured parameter different moments, it is
            refused. Files are read with ``weights_only=True``.
        model: with the captured parameters.
        modules: as of ``Capture``.
        form: "less" or "torch", see ``AdamMoments``.

    Raises:
        DataError: a captured parameter has no moments, or what is there is no plain Adam.
    """
    captured = parameters_of(model, modules)
    if isinstance(source, str | PathLike):
        path = Path(source)
        if path.suffix == ".safetensors":
            moments = AdamMoments.load(path, form)
            _check(captured, moments.first, str(path))
            first, second = ({name: found[name] for name in captured} for found in (moments.first, moments.second))
            return replace(moments, first=first, second=second)
        found = _from_file(path, model, captured)
    elif isinstance(source, Mapping):
        found = _from_state(source, model, captured, [], "the optimizer's state_dict")
    elif hasattr(source, "param_groups") and hasattr(source, "state"):
        # Where the groups do not say how weight decay is applied, as in older versions of torch, the class does.
        coupled = isinstance(source, torch.optim.Adam) and not isinstance(source, torch.optim.AdamW)
        said = {"decoupled_weight_decay": False} if coupled else {}
        pairs = [(p, {**said, **group}) for group in source.param_groups for p in group["params"]]
        found = {id(p): _Found(source.state[p], group) for p, group in pairs if source.state.get(p)}
    else:
        raise DataError(
            f"Adam moments cannot be read from a {type(source).__name__}, expected a torch.optim.AdamW, its "
            "state_dict, a checkpoint folder of the Trainer, or a .safetensors file"
        )
    return _collected(captured, found, form)


def _from_file(path: Path, model: nn.Module, captured: Mapping[str, nn.Parameter]) -> dict[int, _Found]:
    if path.is_dir():
        file = trainer_folder(path) / "optimizer.pt"
        state = load_torch(file)
        known = spellings(model)
        saved = [known[name] for name in weights_in(path) if name in known]
        return _from_state(state, model, captured, saved, f"'{file}'")
    return _from_state(load_torch(path), model, captured, [], f"'{path}'")


def _from_state(
    state: Any, model: nn.Module, captured: Mapping[str, nn.Parameter], saved: Iterable[Tensor], where: str
) -> dict[int, _Found]:
    """By ``id`` of the parameter."""
    if not (isinstance(state, Mapping) and {"state", "param_groups"} <= state.keys()):
        raise DataError(f"{where} is no state of a torch optimizer: expected a mapping of 'state' and 'param_groups'")
    places = indices_of(state, model, captured, list(saved), where)
    groups = {index: group for group in state["param_groups"] for index in group["params"]}
    return {
        owner: _Found(state["state"][index], groups[index])
        for owner, index in places.items()
        if state["state"].get(index)
    }


def _collected(captured: Mapping[str, nn.Parameter], found: Mapping[int, _Found], form: str) -> AdamMoments:
    own = {name: found[id(p)] for name, p in captured.items() if id(p) in found}
    _check(captured, own, "the optimizer's state")
    first, second, steps = {}, {}, {}
    options: list[tuple[float, float, float]] = []
    for name, (state, group) in own.items():
        _refuse_other(name, state, group, tuple(captured[name].shape))
        first[name], second[name] = (state[key].detach().float().clone() for key in ("exp_avg", "exp_avg_sq"))
        steps[name] = int(state.get("step", 0))
        options.append((*map(float, group["betas"]), float(group["eps"])))  # type: ignore[arg-type]
        if options[-1] != options[0]:
            raise DataError(
                f"{name} is in a group with betas and eps {options[-1]} and {next(iter(own))} in one with "
                f"{options[0]}: expected the same for all, which one row is made with"
            )
    return AdamMoments(first, second, steps, *options[0], form)


def _refuse_other(name: str, state: Mapping[str, Any], group: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    cause = None
    moments = [state.get(key) for key in ("exp_avg", "exp_avg_sq")]
    if not all(isinstance(m, Tensor) and m.is_floating_point() and m.numel() for m in moments):
        cause = f"has {', '.join(map(str, state))} and not exp_avg and exp_avg_sq"
    elif any(tuple(m.shape) != shape for m in moments if m is not None):
        cause = f"has moments of shape {tuple(moments[0].shape)} for a parameter {shape}"  # type: ignore[union-attr]
    elif group.get("amsgrad") or "max_exp_avg_sq" in state:
        cause = "is AMSGrad's, which divides by the largest second moment"
    elif "momentum_decay" in group or ("decoupled_weight_decay" in group and "amsgrad" not in group):
        cause = "is NAdam's or RAdam's, which make another step of the moments"
    elif group.get("decoupled_weight_decay") is False and group.get("weight_decay"):
        cause = f"has weight decay {group['weight_decay']} mixed into the gradients, as Adam does and AdamW does not"
    elif group.get("maximize"):
        cause = "is of an optimizer that maximizes"
    elif "betas" not in group or "eps" not in group:
        cause = "does not say its betas and eps"
    if cause is None and not all(bool(torch.isfinite(m).all()) for m in moments if m is not None):
        cause = "is not finite"
    if cause is not None:
        raise DataError(
            f"the optimizer's state of {name} {cause}: expected that of torch.optim.AdamW, or Adam without decay"
        )


def _check(captured: Mapping[str, nn.Parameter], found: Mapping[str, Any], where: str) -> None:
    missing = [name for name in captured if name not in found]
    if missing:
        raise DataError(
            f"{where} has no moments for {len(missing)} of {len(captured)} captured parameters, such as {missing[0]}: "
            "give the optimizer that trained this model, after at least one step"
        )
