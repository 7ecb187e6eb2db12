"""EK-FAC factors on disk, beside the store: written once, and refused when the model has become another one."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from gradsift.engine.curvature.ekfac import EkFac
from gradsift.engine.curvature.kronecker import KroneckerFactor
from gradsift.kernels.errors import StoreError

__all__ = ["load", "save"]

_VERSION = 2
_PARTS = tuple(field.name for field in fields(KroneckerFactor))


def save(fitted: EkFac, path: str | os.PathLike[str], belongs: Mapping[str, str]) -> None:
    """Write factors into a folder, whole or not at all.

    Args:
        path: the folder; one that is there is replaced.
        belongs: what they are factors of, such as fingerprints of model and adapter: compared by ``load``.
    """
    root = Path(path)
    root.parent.mkdir(parents=True, exist_ok=True)
    fresh = root.with_name(f"{root.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a process of this number that was killed while it wrote
    fresh.mkdir()
    names = list(fitted.factors)
    arrays = {
        f"{number}.{part}": getattr(factor, part).numpy()
        for number, factor in enumerate(fitted.factors.values())
        for part in _PARTS
    }
    np.savez(fresh / "factors.npz", **arrays)  # type: ignore[arg-type]
    description = {"version": _VERSION, "parameters": names, "examples": fitted.examples, "belongs": dict(belongs)}
    (fresh / "factors.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    if root.exists():
        shutil.rmtree(root)
    fresh.rename(root)


def load(path: str | os.PathLike[str], belongs: Mapping[str, str]) -> EkFac | None:
    """The factors in a folder; None when there is no such folder.

    Raises:
        StoreError: they are damaged, or belong to another model, adapter, loss or sample.
    """
    root = Path(path)
    if not root.exists():
        return None
    again = f"delete {root}, and they are fitted again"
    try:
        description = json.loads((root / "factors.json").read_text(encoding="utf-8"))
        version, known, names = description["version"], description["belongs"], description["parameters"]
        examples = int(description["examples"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{root} holds no EK-FAC factors that can be read ({error}): {again}") from None
    if version != _VERSION:
        raise StoreError(f"{root} holds EK-FAC factors of version {version}, expected {_VERSION}: {again}")
    for what, now in belongs.items():
        before = str(known.get(what))
        if before != now:
            raise StoreError(
                f"the EK-FAC factors in {root} were fitted to another {what} ({before[:40]}, now {now[:40]}): {again}"
            )
    try:
        with (root / "factors.npz").open("rb") as file, np.load(file, allow_pickle=False) as kept:
            factors = {
                name: KroneckerFactor(*(torch.from_numpy(kept[f"{number}.{part}"]) for part in _PARTS))
                for number, name in enumerate(names)
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreError(f"the EK-FAC factors in {root} are damaged ({error}): {again}") from None
    return EkFac(factors, examples)
