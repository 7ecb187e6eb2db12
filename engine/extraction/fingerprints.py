"""Fingerprints: what a batch, a model, an adapter and a loss were, in a few bytes each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.kernels.errors import DataError

__all__ = ["adapter_fingerprint", "batch_hash", "loss_kind", "model_fingerprint", "sums_tokens"]

_SAMPLE = 4096
"""Numbers read of each frozen tensor: enough to tell checkpoints apart, milliseconds for billions of parameters."""


def batch_hash(batch: Mapping[str, Any]) -> bytes:
    """16 bytes of blake2b over everything in a batch: tensors and arrays by dtype, shape and bytes; text, numbers,
    None and any nesting of lists and mappings by value.

    Raises:
        DataError: the batch holds something whose content cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, batch, "batch")
    return digest.digest()


def _feed(digest: hashlib.blake2b, value: Any, where: str) -> None:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        _feed_array(digest, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _feed_array(digest, value.dtype.name, value.shape, value.tobytes())
    elif isinstance(value, Mapping):
        digest.update(b"{%d" % len(value))
        for key in sorted(value, key=str):
            _feed(digest, str(key), where)
            _feed(digest, value[key], f"{where}[{key!r}]")
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        digest.update(b"[%d" % len(value))
        for i, item in enumerate(value):
            _feed(digest, item, f"{where}[{i}]")
    elif value is None or isinstance(value, str | bytes | bool | int | float | complex | np.generic):
        plain = value.item() if isinstance(value, np.generic) else value
        data = plain if isinstance(plain, bytes) else repr(plain).encode("utf-8", "surrogatepass")
        digest.update(b"%s:%d:" % (type(plain).__name__.encode(), len(data)))
        digest.update(data)
    else:
        raise DataError(
            f"{where} is a {type(value).__name__}, whose content cannot be compared when the extraction is resumed: "
            "give tensors, arrays, text or numbers"
        )


def _feed_array(digest: hashlib.blake2b, dtype: str, shape: tuple[int, ...], data: Any) -> None:
    digest.update(f"<{dtype}{list(shape)}".encode())
    digest.update(data)


def adapter_fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Hash of the captured parameters, every byte of them: names, dtypes, shapes and values, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in parameters.items():
        _feed(digest, name, name)
        _feed(digest, parameter, name)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module, captured: Sequence[Tensor] = ()) -> str:
    """Hash of a model without its captured parameters.

    It covers what every leaf module is, and of each parameter and buffer the dtype, the shape and up to 4,096
    numbers evenly spread over it, not all: an edit of single weights may go unnoticed. Names are left out, so that
    wrappers such as DDP or ``torch.compile`` change nothing.
    """
    digest = hashlib.blake2b(digest_size=16)
    skip = {id(parameter) for parameter in captured}
    for module in model.modules():
        if next(module.children(), None) is None:
            digest.update(f"{type(module).__qualname__}({module.extra_repr()})".encode())
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in skip or tensor.is_meta:
            continue
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLE)
        digest.update(str(tuple(tensor.shape)).encode())
        _feed(digest, flat[::stride][: _SAMPLE + 1], "parameter")
    return digest.hexdigest()


def loss_kind(loss_fn: Callable[..., Any]) -> str:
    """What a loss is called in a store: its ``kind`` if it has one, else the name of its code."""
    kind = getattr(loss_fn, "kind", None)
    if isinstance(kind, str):
        return kind
    named = loss_fn if hasattr(loss_fn, "__qualname__") else type(loss_fn)
    return f"{named.__module__}.{named.__qualname__}"


def sums_tokens(loss_fn: Callable[..., Any]) -> bool:
    """Whether a loss is a sum over the tokens that it counts: so, unless its ``sums_tokens`` says that it is a mean."""
    return hasattr(loss_fn, "loss_tokens") and bool(getattr(loss_fn, "sums_tokens", True))
