"""Folders that training leaves behind: an adapter saved by PEFT, or a checkpoint of the Hugging Face Trainer.

Only tensors and JSON are read: safetensors files, and ``optimizer.pt`` and ``scheduler.pt`` with ``weights_only=True``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError

__all__ = ["load_safetensors", "load_torch", "rates", "steps", "trainer_folder", "weights_in"]

_STATE = "trainer_state.json"


def weights_in(path: Path) -> dict[str, Tensor]:
    """The weights of a .safetensors file or of a folder, by the names in the file, on the CPU.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    if path.is_file():
        return load_safetensors(path)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (path / name).is_file():
            return load_safetensors(path / name)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(_json(index).get("weight_map", {}).values()))
        return {name: tensor for file in files for name, tensor in load_safetensors(path / file).items()}
    if not path.is_dir():
        raise DataError(f"checkpoint '{path}' does not exist: give a folder that training saved")
    raise DataError(
        f"checkpoint '{path}' holds neither adapter_model.safetensors nor model.safetensors: "
        "give a folder that PEFT or the Trainer saved"
    )


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name."""
    broken = require("safetensors").SafetensorError
    try:
        return dict(require("safetensors.torch").load_file(str(path)))
    except (OSError, broken) as error:
        raise DataError(f"'{path}' cannot be read as safetensors ({error}): save the checkpoint again") from None


def load_torch(path: Path) -> Any:
    """What torch.save wrote, on the CPU; tensors and plain values only, never code.

    Raises:
        DataError: the file is missing, or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist: give a folder that the Trainer saved with its optimizer") from None
    except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"'{path}' cannot be read as tensors only ({reason}): save the optimizer's state_dict"
        ) from None


def trainer_folder(path: Path) -> Path:
    """Where the Trainer's own files lie: an adapter that is not called "default" has a folder of its own among them."""
    around = path.resolve().parent
    inside = (path / "adapter_config.json").is_file() and not (path / _STATE).is_file() and (around / _STATE).is_file()
    return around if inside else path


def steps(path: Path) -> int | None:
    """How many optimizer steps stand behind a checkpoint of the Trainer; None for any other."""
    state = trainer_folder(path) / _STATE
    return int(_json(state).get("global_step", 0)) if state.is_file() else None


def rates(path: Path, since: int) -> float | None:
    """The mean of the learning rates that the Trainer logged after step ``since`` and up to the checkpoint.

    Where it logged none, the scheduler's present one, which at the end of a linear decay is 0; None where neither says.
    """
    path = trainer_folder(path)
    state = _json(path / _STATE) if (path / _STATE).is_file() else {}
    last = int(state.get("global_step", 0))
    logged = [
        float(entry["learning_rate"])
        for entry in state.get("log_history", [])
        if "learning_rate" in entry and since < int(entry.get("step", 0)) <= last
    ]
    if logged:
        return sum(logged) / len(logged)
    if (path / "scheduler.pt").is_file():
        present = load_torch(path / "scheduler.pt")
        found = present.get("_last_lr") if isinstance(present, Mapping) else None
        return float(found[0]) if found else None
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON ({error}): save the checkpoint again") from None
