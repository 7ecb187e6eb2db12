"""Stored rollouts: prompts with their responses, whose rewards become advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsift.engine.losses.language import counted_labels
from gradsift.kernels.errors import DataError, ShapeError

__all__ = ["COLUMNS", "Rollouts", "advantages_of", "read_rollouts"]

COLUMNS = frozenset({"ids", "owners", "rewards", "advantages", "old_logprobs", "ref_logprobs", "drawn"})
"""Columns that the model does not see."""

_STABILISER = 1e-4
"""Added to a group's standard deviation, as TRL does."""


class Rollouts(NamedTuple):
    """Responses to prompts, on the CPU.

    Attributes:
        inputs: what the model sees, with ``labels``.
        owners: the prompt of each response, int64 (rows,).
        places: which of its prompt's responses each is, int64 (rows,).
        sizes: responses of each prompt, int64 (n,).
        counted: which labels carry loss, at their own place, bool (rows, T).
    """

    inputs: dict[str, Any]
    owners: Tensor
    places: Tensor
    sizes: Tensor
    counted: Tensor


def read_rollouts(batch: Mapping[str, Any], model: nn.Module | None = None) -> Rollouts:
    """The rollouts of a batch; see ``PolicyGradient``.

    Args:
        model: whose labels they are, as of ``counted_labels``.

    Raises:
        DataError: a column is missing, or a prompt has no response.
        ShapeError: owners are not one prompt per response.
    """
    for column, what in (
        ("input_ids", "prompt and response, (rows, tokens)"),
        ("labels", "the response's tokens, -100 at the prompt"),
        ("owners", "the prompt of each row, integers (rows,)"),
    ):
        if batch.get(column) is None:
            raise DataError(f"the batch has no {column}: give {what}")
    owners = torch.as_tensor(batch["owners"]).cpu()
    rows = len(batch["input_ids"])
    if owners.shape != (rows,) or owners.is_floating_point() or owners.dtype == torch.bool or bool((owners < 0).any()):
        raise ShapeError(
            f"owners has shape {tuple(owners.shape)} and {owners.dtype} for {rows} rows, expected the number of each "
            "row's prompt, from 0 on"
        )
    owners = owners.to(torch.int64)
    named = batch.get("ids")
    sizes = torch.bincount(owners, minlength=0 if named is None else len(named))
    if named is not None and len(sizes) > len(named):
        raise ShapeError(f"owners name prompt {len(sizes) - 1} but the batch has {len(named)} ids: give one per prompt")
    if bool((sizes == 0).any()):
        bare = int((sizes == 0).nonzero()[0])
        raise DataError(f"prompt {bare if named is None else named[bare]!r} has no response: leave it out")
    order = torch.argsort(owners, stable=True)
    places = torch.empty_like(owners)
    places[order] = torch.arange(rows) - (sizes.cumsum(0) - sizes)[owners[order]]
    inputs = {name: value for name, value in batch.items() if name not in COLUMNS}
    return Rollouts(inputs, owners, places, sizes, counted_labels(inputs, model).cpu())


def advantages_of(batch: Mapping[str, Any], rollouts: Rollouts, scale: bool) -> Tensor:
    """How much better each response is than its prompt's others: as given, or from rewards; float64 (rows,).

    From rewards: minus the mean of the group and, if ``scale``, over its standard deviation (with Bessel's
    correction) plus 1e-4.

    Raises:
        DataError: the batch has neither; or a group of rewards has one response.
        ShapeError: they are not one number per response.
    """
    found = next((name for name in ("advantages", "rewards") if batch.get(name) is not None), None)
    if found is None:
        raise DataError("the batch has neither rewards nor advantages: give one number for each response")
    owners, sizes = rollouts.owners, rollouts.sizes
    values = torch.as_tensor(batch[found]).detach().cpu().to(torch.float64)
    if values.shape != owners.shape:
        raise ShapeError(
            f"{found} has shape {tuple(values.shape)}, expected one number for each of {len(owners)} responses"
        )
    if not bool(values.isfinite().all()):
        raise DataError(f"{found} of response {int((~values.isfinite()).nonzero()[0])} is not finite: give a number")
    if found == "advantages":
        return values
    if bool((sizes == 1).any()):
        raise DataError(
            f"prompt {int((sizes == 1).nonzero()[0])} has one response, so its reward has nothing to be compared with: "
            "give advantages instead of rewards, or more responses"
        )
    mean = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, owners, values) / sizes
    apart = values - mean[owners]
    if not scale:
        return apart
    variance = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, owners, apart.square()) / (sizes - 1)
    return apart / (variance.sqrt() + _STABILISER)[owners]
