"""Frozen: a model as capture needs it for one pass, and exactly as it was afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradsift.engine.capture.names import all_parameters

__all__ = ["eager", "evaluating", "frozen", "inputs_require_grad", "same_randomness"]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside, so none is computed or stored; flags are restored.

    Gradients are recorded inside even if the caller switched that off.
    """
    flags = [(p, p.requires_grad) for p in all_parameters(model)]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eager())
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer would skip its linear maps
        stack.callback(_restore, flags)
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled modules run as they were written: a graph compiled before the hooks were set never calls them."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def inputs_require_grad(model: nn.Module) -> Iterator[None]:
    """Embeddings return outputs that require a gradient: reentrant checkpointing records nothing without one."""

    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        if torch.is_grad_enabled() and output.is_floating_point():
            output.requires_grad_(True)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def same_randomness(model: nn.Module) -> Iterator[None]:
    """Random states are put back, so that a trial pass does not change what the real one draws."""
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is None:
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device.index or 0], device_type=device.type):
            yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() for a while, so that passes see the same dropout, none; then every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
