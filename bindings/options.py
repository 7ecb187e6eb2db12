"""Options that several commands have, with what their help says and what they select."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gradsift.bindings.space import Space

__all__ = [
    "AdamForm",
    "AsJson",
    "AtCheckpoints",
    "Budget",
    "ByAdam",
    "Corrected",
    "Correction",
    "CurvatureRows",
    "Damping",
    "Device",
    "ExactRows",
    "Groups",
    "HeldOut",
    "HowReduced",
    "HowScored",
    "Kind",
    "LossName",
    "LossOption",
    "ModelKind",
    "OtherAdapter",
    "OtherData",
    "OtherModel",
    "Precision",
    "Reference",
    "RowGroups",
    "Rule",
    "Seconds",
    "SelectBy",
    "Store",
    "StoreDtype",
    "StorePrecision",
    "TrainedBy",
    "exact_method",
    "layers",
]


class Kind(StrEnum):
    """Kinds of models."""

    lm = "lm"
    diffusion = "diffusion"


class Groups(StrEnum):
    """What a row has a part for."""

    parameter = "parameter"
    map = "map"


class AdamForm(StrEnum):
    """Where Adam's eps stands."""

    less = "less"
    torch = "torch"


class Correction(StrEnum):
    """What a query is multiplied by before rows are scored exactly."""

    none = "none"
    fisher = "fisher"
    ekfac = "ekfac"
    ggn = "ggn"


class LossName(StrEnum):
    """Losses that the command line takes gradients of."""

    language_model = "language_model"
    dpo = "dpo"
    policy_gradient = "policy_gradient"


class Precision(StrEnum):
    """Numbers of a model."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StorePrecision(StrEnum):
    """Numbers of a store."""

    float32 = "float32"
    float16 = "float16"


ModelKind = Annotated[
    Kind, typer.Option(help="lm, a language model; or diffusion: --kind diffusion --help shows its options.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a GPU when there is one.")]
Store = Annotated[Path, typer.Argument(help="A store that `gradsift extract` wrote.", show_default=False)]
OtherModel = Annotated[str | None, typer.Option("--model", help="Where the model is now, if it moved.")]
OtherAdapter = Annotated[str | None, typer.Option("--adapter", help="Where the adapter is now, if it moved.")]
CurvatureRows = Annotated[
    int, typer.Option(help="Rows of the curvature sample, which the default scorer needs; 0 for none.")
]
StoreDtype = Annotated[StorePrecision, typer.Option(help="Of the store: float16 halves it, at 2e-4 relative error.")]
TrainedBy = Annotated[
    LossName,
    typer.Option(
        help="What was trained with: language_model; dpo, on columns prompt, chosen and rejected, with the model "
        "without its adapter as reference; or policy_gradient (GRPO), on prompt, responses and rewards."
    ),
]
LossOption = Annotated[
    list[str] | None,
    typer.Option(help="Of that loss, such as beta=0.1 or aggregate=sequence; may be repeated.", show_default=False),
]
RowGroups = Annotated[
    Groups | None,
    typer.Option(help="Keep each parameter, or each map, apart: as many times the bytes; scorer datainf needs it."),
]
AtCheckpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        help="A folder that PEFT or the Trainer saved; may be repeated: rows at each of them, weighed by its learning "
        "rate, at the cost of as many extractions.",
    ),
]
ByAdam = Annotated[
    AdamForm | None,
    typer.Option(
        help="Rows of Adam's updates by the checkpoints' optimizer.pt instead of gradients, for scorer less: less, as "
        "its authors have them, or torch, as the optimizer makes them."
    ),
]
HowScored = Annotated[
    str,
    typer.Option(help="fisher corrects for curvature; dot and cosine are plain; `gradsift methods` prints all."),
]
ExactRows = Annotated[
    int, typer.Option(min=1, help="Curvature rows behind --exact fisher answers, at most: fewer are faster.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="How much to choose: 5%, or a number of examples.  \\[default: 5%, or what the method finds]",
        show_default=False,
    ),
]
SelectBy = Annotated[str, typer.Option(help="top, tarot, bids, groups, diverse, order, vog or lobass.")]
HowReduced = Annotated[
    str | None,
    typer.Option(
        help="Of top: max lets each task bring in examples of its own; mean wants what helps all; rank fuses their "
        "ranks.  \\[default: max]",
        show_default=False,
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        help="Of bids: balance or gain. Of groups: mixture or bandit. Of tarot: fixed_size, or otm, which finds how "
        "much to choose.",
        show_default=False,
    ),
]
Reference = Annotated[
    Path | None,
    typer.Option(help="Of lobass: a store of the same data under a model tuned on it.", show_default=False),
]
Corrected = Annotated[
    Correction | None,
    typer.Option(
        help="Score exactly, along the query after this curvature: none, fisher, ekfac or ggn.  "
        "\\[with --exact: fisher or none, as the scorer]",
        show_default=False,
    ),
]
Damping = Annotated[
    float | None,
    typer.Option(min=1e-6, help="k of lambda = k * trace(F) / n: 1, or what --held-out says.", show_default=False),
]
HeldOut = Annotated[
    str | None,
    typer.Option(help="Data that was not trained on, as for extract: it chooses the damping.", show_default=False),
]
Seconds = Annotated[float, typer.Option(help="About how long the rankings may take.")]
OtherData = Annotated[str | None, typer.Option("--train", help="Where the training data is now, if it moved.")]


def exact_method(method: Correction | None, exact: bool, scorer: str, space: Space) -> str | None:
    """The correction that exact scores are taken along; None when there are none."""
    if method is not None:
        return method.value
    if not exact:
        return None
    return "fisher" if scorer == "fisher" and space.store.curvature is not None else "none"


def layers(modules: list[str] | None) -> str | list[str]:
    """What --modules, given so often, selects."""
    return "lora" if modules is None or modules == ["lora"] else modules
