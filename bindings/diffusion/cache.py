"""A folder of tensors by the content they were made from: what is stale is never found, what is there is whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from gradsift.engine.extras import require

__all__ = ["Cache", "content_key"]

_ENTRIES, _BYTES = 32, 64 << 20
"""Entries, and bytes, after which a file is written."""

Tensors = dict[str, Tensor]


class Cache:
    """Named tensors by key, a few dozen entries per safetensors file, written beside and renamed into place.

    Args:
        folder: made when the first file is; None for a cache that forgets everything.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        safetensors = require("safetensors")
        self._open = safetensors.safe_open
        self._save = require("safetensors.torch").save_file
        self._files: dict[bytes, Path] = {}
        self._pending: dict[bytes, Tensors] = {}
        self._handle: tuple[Path, Any] | None = None
        if folder is not None and folder.is_dir():
            for file in sorted(folder.glob("*.safetensors")):
                with suppress(safetensors.SafetensorError), safetensors.safe_open(file, "pt") as handle:
                    self._files.update({key: file for key in map(_key, handle.keys())})

    def get(self, key: bytes, make: Callable[[], Tensors]) -> Tensors:
        """What was kept under a key, or what ``make`` gives, to be kept."""
        if key in self._pending:
            return self._pending[key]
        if key in self._files:
            return self._read(key)
        made = {name: value.contiguous() for name, value in make().items()}
        if self._folder is not None:
            self._pending[key] = made
            size = sum(v.numel() * v.element_size() for entry in self._pending.values() for v in entry.values())
            if len(self._pending) >= _ENTRIES or size >= _BYTES:
                self.flush()
        return made

    def flush(self) -> None:
        """Write what waits."""
        if self._folder is None or not self._pending:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        flat = {f"{key.hex()}:{name}": v for key, entry in self._pending.items() for name, v in entry.items()}
        file = self._folder / f"{content_key(*sorted(self._pending)).hex()}.safetensors"
        beside = file.with_suffix(".tmp")
        self._save(flat, beside)
        beside.replace(file)
        self._files.update(dict.fromkeys(self._pending, file))
        self._pending = {}

    def prune(self, keys: set[bytes]) -> None:
        """Remove the files that hold none of these."""
        wanted = {file for key, file in self._files.items() if key in keys}
        for file in {*self._files.values()} - wanted:
            file.unlink()
        self._files = {key: file for key, file in self._files.items() if file in wanted}

    def _read(self, key: bytes) -> Tensors:
        file = self._files[key]
        if self._handle is None or self._handle[0] != file:
            self._handle = file, self._open(file, "pt")
        prefix = f"{key.hex()}:"
        handle = self._handle[1]
        mine = [name for name in list(handle.keys()) if name.startswith(prefix)]
        return {name.removeprefix(prefix): handle.get_tensor(name) for name in mine}


def content_key(*parts: str | bytes) -> bytes:
    """16 bytes that stand for all of these, in this order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.digest()


def _key(name: str) -> bytes:
    return bytes.fromhex(name.partition(":")[0])
