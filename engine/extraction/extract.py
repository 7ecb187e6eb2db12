"""extract: every example of a data set to one row of a store, resumable after any kind of stop."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradsift.engine.capture.capture import Capture, LossFunction
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import Modules
from gradsift.engine.checkpoints.checkpoint import Checkpoint
from gradsift.engine.checkpoints.snapshots import Snapshots
from gradsift.engine.extraction.batches import Batch, as_batch, expected_rows, shuffles
from gradsift.engine.extraction.curvature_plan import CurvaturePlan
from gradsift.engine.extraction.fingerprints import adapter_fingerprint, loss_kind, model_fingerprint, sums_tokens
from gradsift.engine.extraction.passes import Extraction, parts_of
from gradsift.engine.extraction.progress import Progress, reporting
from gradsift.engine.store.format import FORMAT, SIGN, read_description
from gradsift.engine.store.ids import id_kind, read_ids
from gradsift.engine.store.reader import FeatureStore
from gradsift.engine.store.writer import StoreWriter
from gradsift.kernels.errors import DataError, StoreError
from gradsift.kernels.spec import SketchSpec

__all__ = ["extract"]

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 16 << 20
"""Features per block unless told otherwise: large enough that opening a file costs a few per cent of reading it."""

_SHARE = 16
"""Small data has at least this many blocks, so that a stop costs at most that share of the work."""

_SMALLEST_BLOCK = 64


def extract(
    model: nn.Module,
    loader: Iterable[Batch],
    loss_fn: LossFunction,
    path: str | PathLike[str],
    *,
    spec: SketchSpec | None = None,
    modules: Modules = "lora",
    dtype: str = "float32",
    block: int | None = None,
    curvature: int = 2000,
    progress: bool | Progress = True,
    backend: str = "auto",
    allow_idle: Sequence[str] = (),
    batch_axis: int = 0,
    notes: Mapping[str, Any] | None = None,
    checkpoints: Sequence[Checkpoint] | None = None,
    groups: str | None = None,
) -> FeatureStore:
    """Write the sketched gradient of every example, then a curvature sample, to a store on disk.

    Stopped at any moment, even by ``kill -9`` or a full disk, the same call goes on after the last whole block, and
    the store ends up the same, byte for byte (on a GPU: with deterministic algorithms). A finished store is compared
    with the data, and damaged blocks are computed anew. The model runs in ``eval()`` (dropout off; models of
    transformers then do no gradient checkpointing either) and every module gets its mode back.

    Args:
        loader: any re-iterable of batches, such as a ``DataLoader`` or a list; a batch is a mapping. ``batch["ids"]``
            names its examples (text or integers, none twice; row numbers without it), ``batch["segments"]``
            are the offsets of examples that are packed in one row. ``loader.rows``, if it has that, is their number.
        loss_fn: ``loss_fn(model, batch)`` -> (n,), one loss per example. Used when it has them:
            ``loss_tokens(batch)`` -> (n,), with ``sums_tokens`` False where the loss is no sum over them but a mean;
            ``kind``, and ``sampled(model, batch, seeds)`` -> (n,), without which there is no curvature sample;
            ``settings``, JSON from which it can be made again, kept in the store; and ``parts``, a mapping for each of
            K parts that are to be kept apart (their ``timestep`` is stored): its losses and those of ``sampled`` are
            then (n * K,), example-major, and rows are (n, K, dim).
        path: a folder that is absent, empty, or holds an earlier run of this call.
        spec: the projection, ``SketchSpec()`` unless given.
        modules: what to capture, see ``Capture``.
        dtype: ``"float32"``, or ``"float16"`` with a scale per row: half the bytes, 2e-4 relative error.
        block: examples that are committed together; 16 MiB of features, or less for small data, unless given.
        curvature: rows of gradients of labels sampled from the model, 0 for none. They come from batches spread
            evenly over the data; with fewer examples than rows, up to 8 draws of each.
        progress: True for a bar on a terminal, False for nothing, or a function that takes ``Update``.
        backend: see ``Capture``.
        allow_idle: see ``Capture``.
        batch_axis: see ``Capture``.
        notes: anything JSON can hold that a reader of the store should know, such as where the data lies; kept as
            ``store.metadata["notes"]`` and not compared when the extraction is resumed.
        checkpoints: take every row at each of them, all through one sketch: rows are (n, checkpoints * K * groups,
            dim), those of the first checkpoint first, and ``store.parts`` says which is which. Their weights are put
            into the model for a while. With ``adam`` an example's row is of the update by the gradient of its mean
            loss per token, where the loss is a sum over tokens, else of its loss. ``store.loss`` is of the last
            checkpoint, ``store.checkpoint_loss`` of all. Rows of the curvature sample are plain gradients also where
            examples' are of Adam's updates, with labels drawn from the model as it is at each checkpoint. Costs as
            many passes as there are checkpoints.
        groups: as of ``Capture``: one part for each captured parameter or map.

    Raises:
        StoreError: the path holds something else, was begun with other settings or other data (the text says which),
            or cannot be written.
        DataError: ids come twice, do not fit, or are missing under a shuffling loader; a loss or gradient is not
            finite (the text names the example); a checkpoint does not fit the model.
        CaptureError: see ``Capture``.
    """
    root = Path(path)
    if dtype not in ("float32", "float16"):
        raise StoreError(f"dtype is {dtype!r}, expected 'float32' or 'float16'")
    if block is not None and block < 1:
        raise StoreError(f"block is {block}, expected at least one example")
    if isinstance(loader, Iterator):
        raise DataError(
            f"the loader is a {type(loader).__name__}, which can be read only once: give a list or a DataLoader"
        )
    old = read_description(root)
    with evaluating(model), ExitStack() as stack:
        capture = Capture(model, spec or SketchSpec(), modules, backend=backend, allow_idle=allow_idle, groups=groups)
        snapshots = None
        if checkpoints is not None:
            snapshots = Snapshots(model, checkpoints, _captured(capture))
            stack.enter_context(snapshots.mounted())
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            raise DataError("the loader gave no batch: there is nothing to extract")
        total = expected_rows(loader)
        sampling = curvature > 0 and hasattr(loss_fn, "sampled")
        parts = _parts(capture, loss_fn, snapshots)
        description = {
            **_about(capture, loss_fn, snapshots),
            "parts": parts,
            "block": block or (old or {}).get("block") or _block_rows(capture.spec.dim * len(parts), dtype, total),
            "dtype": dtype,
            "ids": id_kind(read_ids(as_batch(first))),
            "curvature": {"requested": curvature, "rows": None} if sampling else None,
            "notes": dict(notes or {}),
        }
        with StoreWriter(root, description) as writer, reporting(progress) as report:
            job = Extraction(writer, capture, loss_fn, batch_axis, shuffles(loader), snapshots)
            plan = CurvaturePlan(curvature, capture.spec.seed) if sampling else None
            rows = job.examples(chain([first], batches), total, plan, report)
            drawn = job.labels(loader, plan.finish(), report) if plan is not None else None
            writer.finish(rows, drawn)
    if curvature and not sampling:
        logger.warning(
            "%s has no curvature sample: the loss %s cannot sample labels (it has no .sampled)",
            root,
            loss_kind(loss_fn),
        )
    return FeatureStore.open(root)


def _captured(capture: Capture) -> dict[str, nn.Parameter]:
    return {name: p for found in capture.maps for name, p in found.parameters.items()}


def _parts(capture: Capture, loss_fn: LossFunction, snapshots: Snapshots | None) -> list[dict[str, Any]]:
    """What each part of a row is: checkpoints, within them parts of the loss, within them groups of parameters."""
    pairs: list[tuple[str | None, float | None]] = [(None, None)]
    if snapshots is not None:
        pairs = list(zip(snapshots.names, snapshots.learning_rates, strict=True))
    groups: list[str | None] = [*capture.group_names] or [None]
    empty = {"timestep": None, "dim": capture.spec.dim, "norm": "exact"}
    return [
        {"checkpoint": name, "learning_rate": rate, "group": group, **empty, **part}
        for name, rate in pairs
        for part in parts_of(loss_fn)
        for group in groups
    ]


def _fingerprints(capture: Capture) -> dict[str, str]:
    """Of the model as it is now."""
    captured = _captured(capture)
    return {
        "model": model_fingerprint(capture.model, list(captured.values())),
        "adapter": adapter_fingerprint(captured),
    }


def _checkpoints(capture: Capture, snapshots: Snapshots) -> list[dict[str, Any]]:
    """What each checkpoint was; the last stays loaded."""
    found = []
    for number, adam in enumerate(snapshots.adam):
        snapshots.load(number)
        found.append(
            {
                "name": snapshots.names[number],
                "learning_rate": snapshots.learning_rates[number],
                "fingerprints": _fingerprints(capture),
                "adam": None if adam is None else adam.fingerprint,
            }
        )
    return found


def _about(capture: Capture, loss_fn: LossFunction, snapshots: Snapshots | None) -> dict[str, Any]:
    """The part of the description that model, capture, loss and checkpoints decide."""
    captured = _captured(capture)
    checkpoints = None if snapshots is None else _checkpoints(capture, snapshots)
    device = next(iter(captured.values())).device.type
    versions = {"gradsift": version("gradsift"), "torch": torch.__version__, "device": device}
    return {
        "format": FORMAT,
        "complete": False,
        "rows": None,
        "spec": json.loads(capture.spec.to_json()),
        "table": [{"name": row.name, "shape": list(row.shape), "scale": row.scale} for row in capture.table],
        "preconditioner": None if snapshots is None else snapshots.preconditioner,
        "checkpoints": checkpoints,
        "loss": {
            "kind": loss_kind(loss_fn),
            "tokens": hasattr(loss_fn, "loss_tokens"),
            "sums_tokens": sums_tokens(loss_fn),
            "settings": getattr(loss_fn, "settings", None),
        },
        "fingerprints": _fingerprints(capture),
        "sign": SIGN,
        "versions": versions,
    }


def _block_rows(numbers: int, dtype: str, total: int | None) -> int:
    """Examples per block, for that many numbers per example."""
    rows = max(1, _BLOCK_BYTES // (numbers * (4 if dtype == "float32" else 2)))
    if total is not None:
        rows = min(rows, max(_SMALLEST_BLOCK, -(-total // _SHARE)))
    return rows
