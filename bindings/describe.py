"""What a store and a data set are, in facts: for `gradsift info`, and around an extraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.data import Dataset
from gradsift.bindings.render import bytes_text, facts
from gradsift.engine.scorers.stores import summed_tokens
from gradsift.engine.store.reader import FeatureStore

if TYPE_CHECKING:
    from gradsift.bindings.diffusion.dataset import Dataset as Images
    from gradsift.bindings.diffusion.pipelines import Pipeline
    from gradsift.engine.losses import Diffusion

_PARTS_SHOWN = 12
"""Parts of a row whose norms are printed."""

__all__ = ["describe", "print_image_survey", "print_info", "print_survey", "rows_text"]


def describe(store: FeatureStore) -> dict[str, Any]:
    """The facts of a store as plain values."""
    norms = np.asarray(store.grad_norm, dtype=np.float64).reshape(len(store), len(store.parts))
    quantiles = np.nanquantile(norms, [0.05, 0.5, 0.95], axis=0).T.tolist() if len(norms) else []
    loss = np.asarray(store.loss, dtype=np.float64)
    tokens = None if store.loss_tokens is None else int(store.loss_tokens.sum())
    summed = summed_tokens(store)
    terms = len(loss) if summed is None else max(summed.sum(), 1)
    curvature = store.metadata.get("curvature") or {}
    return {
        "path": str(store.path),
        "complete": store.complete,
        "examples": len(store),
        "dim": store.spec.dim,
        "seed": store.spec.seed,
        "dtype": store.metadata["dtype"],
        "parameters": len(store.table),
        "numbers": int(sum(np.prod(row.shape) for row in store.table)),
        "curvature_rows": int(curvature.get("rows") or 0),
        "loss_kind": store.metadata["loss"]["kind"],
        "loss_tokens": tokens,
        "mean_loss": float(loss.sum() / terms) if len(loss) else None,
        "grad_norm": quantiles[0] if len(quantiles) == 1 else None,
        "parts": [
            {"checkpoint": part["checkpoint"], "timestep": part["timestep"], "group": part["group"], "grad_norm": norm}
            for part, norm in zip(store.parts, quantiles, strict=False)
        ],
        "compacted": _compacted(store),
        "bytes": sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file()),
        "notes": store.metadata.get("notes") or {},
    }


def rows_text(store: FeatureStore) -> str:
    """What answers of a store rest on: ``sketches of 4096 numbers``, or ``codes of 128 bytes``."""
    about = store.metadata.get("compacted")
    return f"sketches of {store.spec.dim} numbers" if about is None else f"codes of {about['bytes']} bytes"


def _compacted(store: FeatureStore) -> dict[str, Any] | None:
    """What a compacted store keeps of a row, and how well that answers."""
    about = store.metadata.get("compacted")
    if about is None:
        return None
    kept = {key: about[key] for key in ("source", "bytes", "axes", "bits", "metric", "outside", "recall")}
    return {**kept, "appended": sum(added["rows"] for added in about.get("appended", []))}


def _compaction(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The same in words."""
    recall = about["recall"]
    later = f", {about['appended']:,} examples added later" if about["appended"] else ""
    return [
        ("compacted", f"{about['bytes']} bytes per example: {about['axes']} numbers of {about['bits']} bits, a scale"),
        (
            "recall@10",
            f"{recall['alone']:.3f} alone, {recall['listed']:.3f} in a list of 100 ({recall['scorer']}, "
            f"{recall['queries']} queries, {recall['asked']}{later})",
        ),
        ("made of", about["source"]),
    ]


def print_info(console: Console, store: FeatureStore, verified: bool) -> None:
    """The facts of a store for people."""
    found = describe(store)
    notes = found["notes"]
    state = "" if found["complete"] else ", unfinished: run the same extract command again to finish it"
    first, last = store.table[0].name, store.table[-1].name
    pairs = [
        ("store", f"{found['path']}  ({bytes_text(found['bytes'])}{state})"),
        ("checksums", "every byte is as it was written" if verified else None),
        ("examples", f"{found['examples']:,}"),
        ("sketch", f"{found['dim']} numbers of {found['dtype']}, seed {found['seed']}"),
        *(_compaction(found["compacted"]) if found["compacted"] else ()),
        ("gradients of", f"{found['numbers']:,} numbers in {found['parameters']} parameters"),
        ("", f"{first} … {last}"),
        ("curvature", f"{found['curvature_rows']:,} rows" if found["curvature_rows"] else "none"),
        ("model", notes.get("model")),
        ("adapter", notes.get("adapter") or notes.get("lora")),
        ("data", notes.get("data")),
        ("loss on", notes.get("trained_on") or found["loss_kind"]),
    ]
    if found["mean_loss"] is not None:
        unit = "example" if summed_tokens(store) is None else "token"
        pairs.append(("mean loss", f"{found['mean_loss']:.3f} per {unit}"))
    applied = store.metadata.get("preconditioner")
    if applied:
        pairs.append(("rows of", f"Adam's updates, in the form of {applied['form']}"))
    what = "update" if applied else "gradient"
    for part in found["parts"][:_PARTS_SHOWN]:
        low, middle, high = part["grad_norm"]
        where = "" if part["timestep"] is None else f" at timestep {part['timestep']:g}"
        where += "" if part["checkpoint"] is None else f" at {part['checkpoint']}"
        where += "" if part["group"] is None else f" of {part['group']}"
        pairs.append((f"{what} norm{where}", f"{middle:.3g} (5 % below {low:.3g}, 5 % above {high:.3g})"))
    if len(found["parts"]) > _PARTS_SHOWN:
        pairs.append(("", f"and {len(found['parts']) - _PARTS_SHOWN:,} more parts (--json prints all)"))
    facts(console, [(name, value) for name, value in pairs if value is not None])


def print_image_survey(console: Console, images: Images, pipeline: Pipeline, loss: Diffusion) -> None:
    """What was read and loaded, what is measured, and what was enlarged or left out."""
    survey, size = images.survey, images.encoder.resolution
    prompts = f", {survey.prompts:,} prompts" if survey.prompts else ""
    pairs = [
        ("data", f"{len(images):,} images at {size} x {size}{prompts}"),
        ("model", pipeline.family.name),
        ("lora", pipeline.lora),
        ("measured", loss.kind),
    ]
    if pipeline.family.encode is not None:
        pairs.append(("", "every image with its prompt, never without (as training drops it now and then)"))
    if survey.cropped:
        pairs.append(("cropped", f"{survey.cropped:,} images to the middle of their longer side"))
    if survey.enlarged:
        pairs.append(("enlarged", f"{survey.enlarged:,} images smaller than that (--resolution)"))
    if survey.bad:
        pairs.append(("left out", f"{survey.bad:,} images"))
    facts(console, [(name, value) for name, value in pairs if value])
    _print_named(console, survey.named, survey.bad)


def print_survey(console: Console, examples: Dataset) -> None:
    """What was read, what is trained on, and what was cut or left out."""
    survey = examples.survey
    longest = examples.encoder.max_length
    pairs = [
        ("data", f"{len(examples):,} examples, {survey.tokens:,} tokens"),
        ("loss on", f"{examples.encoder.trained_on}: {survey.scored:,} tokens"),
    ]
    if survey.cut:
        pairs.append(("cut", f"{survey.cut:,} examples to their first {longest} tokens (--max-length)"))
    if survey.bad:
        pairs.append(("left out", f"{survey.bad:,} records"))
    if survey.silent:
        pairs.append(("left out", f"{survey.silent:,} prompts whose responses all have one reward: they teach nothing"))
    facts(console, pairs)
    _print_named(console, survey.named, survey.bad)


def _print_named(console: Console, named: Sequence[str], bad: int) -> None:
    """Why the first few were left out."""
    for sentence in named:
        console.print(f"  [dim]{escape(sentence)}[/dim]", highlight=False)
    if bad > len(named):
        console.print(f"  [dim]and {bad - len(named):,} more[/dim]", highlight=False)
