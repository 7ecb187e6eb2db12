"""Checkpoint folders as the command line names them: the adapter that they belong to, and what is read of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from gradsift.engine.capture.maps import Modules, parameters_of
from gradsift.engine.checkpoints.adam import adam_moments
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.checkpoints.folder import trainer_folder
from gradsift.engine.checkpoints.snapshots import Snapshots

__all__ = ["adapter_among", "checkpoints_from", "put_last"]


def adapter_among(folders: Sequence[str]) -> str | None:
    """The last folder, if it holds an adapter of PEFT: what a model needs to be wrapped before weights are put in."""
    return folders[-1] if folders and (Path(folders[-1]) / "adapter_config.json").exists() else None


def checkpoints_from(
    folders: Sequence[str], model: nn.Module | None = None, modules: Modules = "lora", adam: str | None = None
) -> list[Checkpoint]:
    """Checkpoints in the order given; folders of one name are called by their paths.

    Args:
        model, modules: only for moments.
        adam: the form of Adam whose updates rows are to be; None for plain gradients.
    """
    short = [trainer_folder(Path(folder)).resolve().name for folder in folders]
    called = short if len(set(short)) == len(short) else list(folders)
    return [
        Checkpoint(
            folder,
            adam=None if adam is None or model is None else adam_moments(folder, model, modules, adam),
            name=name,
        )
        for folder, name in zip(folders, called, strict=True)
    ]


def put_last(model: nn.Module, checkpoints: Sequence[Checkpoint], modules: Modules) -> None:
    """Leave the last checkpoint's weights in the model: it is what such a store calls its model."""
    Snapshots(model, checkpoints[-1:], parameters_of(model, modules)).load(0)
