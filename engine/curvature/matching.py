"""Whether a curvature sample and a store belong together: same parameters, same weights, same sketch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from gradsift.engine.capture.features import table_difference
from gradsift.engine.capture.maps import Modules, find_maps
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import SpecError, StoreError
from gradsift.kernels.spec import SketchSpec

__all__ = ["at_one_checkpoint", "of_plain_gradients", "same_parameters", "same_sketch", "same_weights"]


def at_one_checkpoint(store: FeatureStore) -> None:
    """Refuse rows of several checkpoints with a StoreError: a curvature is that of one."""
    checkpoints = {part.get("checkpoint") for part in store.parts}
    if len(checkpoints) > 1:
        raise StoreError(
            f"'{store.path}' holds rows of {len(checkpoints)} checkpoints, whose gradients are no parts of one: "
            "give a store of one of them, or make a Curvature there with rows=None"
        )


def of_plain_gradients(store: FeatureStore) -> None:
    """Refuse rows after Adam with a SpecError."""
    if store.metadata.get("preconditioner"):
        raise SpecError(
            f"'{store.path}' holds gradients after Adam, expected the plain ones that a curvature is compared with: "
            "extract it without Adam moments"
        )


def same_parameters(store: FeatureStore, model: nn.Module, modules: Modules) -> None:
    """Refuse a selection of other parameters than the store's with a SpecError."""
    table = [row for found in find_maps(model, modules) for row in found.table]
    difference = table_difference(table, store.table)
    if difference is not None:
        raise SpecError(
            f"the curvature would be one of other parameters than '{store.path}' holds: {difference}; give the model, "
            "adapter and modules that it was extracted with"
        )


def same_weights(store: FeatureStore, now: Mapping[str, str]) -> None:
    """Refuse another model or adapter than the store's with a SpecError.

    Args:
        now: fingerprints of "model" and "adapter".
    """
    for what, before in (store.metadata.get("fingerprints") or {}).items():
        if now[what] != before:
            raise SpecError(
                f"the {what} is not the one that '{store.path}' was extracted with (fingerprint {before[:8]}, now "
                f"{now[what][:8]}): give that one, or extract again"
            )


def same_sketch(store: FeatureStore, rows: Tensor, spec: SketchSpec | None) -> None:
    """Refuse curvature rows of another sketch than the store's with a SpecError.

    Args:
        rows: (N, dim) or (N, parts, dim).
        spec: what they were drawn by; where that is not known only their size is compared.
    """
    if rows.shape[-1] != store.spec.dim or spec not in (None, store.spec):
        got = f"have dim {rows.shape[-1]}" if spec is None else f"were drawn by {spec.to_json()}"
        raise SpecError(
            f"the curvature rows {got} but '{store.path}' is drawn by {store.spec.to_json()}: give the Curvature rows "
            "of that sketch, such as rows=store.curvature"
        )
