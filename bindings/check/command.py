"""`gradsift check`: is gradsift right about this model, on a few of the user's own examples?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from gradsift.bindings.dispatch import OfKind
from gradsift.bindings.options import AsJson, Device, Kind, ModelKind, Precision, Seconds, layers
from gradsift.bindings.render import status
from gradsift.kernels.errors import DataError

if TYPE_CHECKING:
    from gradsift.bindings.data import Dataset
    from gradsift.engine.check.batches import Batch
    from gradsift.engine.check.report import Report

__all__ = ["app", "check"]

_ONE_BY_ONE = 8
"""Examples that are compared with autograd one at a time."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(name="check", cls=OfKind, context_settings={"help_option_names": ["-h", "--help"]})
def check(
    model: Annotated[
        str, typer.Option(help="Folder, Hugging Face id, or .gguf file of the base model.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option(help="The training data, as for extract; a few examples are read.", show_default=False)
    ],
    kind: ModelKind = Kind.lm,
    adapter: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the LoRA adapter.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="If it is not beside the adapter or the model.")] = None,
    dim: Annotated[int, typer.Option(help="Numbers per example, a multiple of 64.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the sketch.")] = 0,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Layers to capture: lora, or a glob such as '*.q_proj'; may be repeated.  [default: lora]"),
    ] = None,
    examples: Annotated[int, typer.Option(min=2, help="Examples to rank, spread over the data; 8 go one by one.")] = 64,
    seconds: Seconds = 60.0,
    max_length: Annotated[int, typer.Option(help="Tokens kept per example; the end is cut.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, padding included.")] = 4096,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the model: float32 on a CPU, as saved on a GPU.", show_default=False)
    ] = None,
    eos: Annotated[
        bool, typer.Option("--eos/--no-eos", help="Close text and completions with the end-of-sequence token.")
    ] = True,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a few of your own examples that gradsift is right about your model.

    [bold]gradsift check --model HuggingFaceTB/SmolLM2-135M --adapter ./adapter --data train.jsonl[/bold]

    Rows are compared with plain autograd, one example at a time; in sum, with the gradient of a
    batch; with themselves, alone and in a batch, and in another precision. The sketch's ranking is
    compared with the exact one, the loss with the model's own. It says what the loss trains on,
    which layers are refused and why, and what is trained but left out.

    Exit code 0: nothing is wrong. 1: something is, and it is named. 2: the input cannot be read.

    [bold]... --dim 1024[/bold]   would shorter rows do?

    [bold]... --dtype bfloat16 --device cuda:0[/bold]   as you are going to run extract
    """
    from gradsift.bindings.check.render import masked, print_report
    from gradsift.bindings.data import Dataset
    from gradsift.bindings.hush import hush
    from gradsift.bindings.models import load
    from gradsift.engine.check.run import check as run
    from gradsift.kernels.spec import SketchSpec

    spec = SketchSpec(dim=dim, seed=seed)
    hush()
    with status() as tell:
        tell("loading the model")
        loaded = load(model, adapter, tokenizer=tokenizer, dtype=dtype and dtype.value, device=device)
        if adapter is not None:
            train: Any = loaded.model  # adapters are loaded frozen; what was trained is what must be covered
            train.set_adapter(train.active_adapter)
        dataset = Dataset.open(
            data,
            loaded.tokenizer,
            max_length=max_length,
            eos=eos,
            encoder_decoder=loaded.encoder_decoder,
            check=False,
        )
        rows = np.unique(np.linspace(0, len(dataset) - 1, examples).round().astype(int)).tolist()
        report = run(
            loaded.model,
            _batches(dataset, rows, batch_tokens),
            spec=spec,
            modules=layers(modules),
            examples=_ONE_BY_ONE,
            pool=len(rows),
            seconds=seconds,
            progress=lambda name: tell(f"checking: {name}"),
        )
    if as_json:
        typer.echo(json.dumps(_to_json(report, dataset, spec.dim, model, adapter, data)))
    else:
        console = Console()
        print_report(console, report, len(dataset), spec.dim, masked(console, dataset, rows[0]))
    if not report.ok:
        raise typer.Exit(1)


def _batches(dataset: Dataset, rows: list[int], batch_tokens: int) -> list[Batch]:
    """Examples in the order of the file, a few in a batch, of whatever lengths they have.

    Raises:
        DataError: a record cannot be used, by line and column.
    """
    groups: list[list[int]] = [[]]
    longest = 0
    for row in rows:
        try:
            (example,) = dataset.encoder.encode([dataset.record(row)])
            if isinstance(example, DataError):
                raise example
        except DataError as error:
            place, text = dataset.records.place(row), str(error)
            raise DataError(text if text.startswith(place) else f"{place}, {text}") from None
        longest = max(longest, len(example.input_ids))
        full = len(groups[-1]) == _ONE_BY_ONE or (len(groups[-1]) + 1) * longest > batch_tokens
        if full and len(groups[-1]) > 1:
            groups.append([])
            longest = len(example.input_ids)
        groups[-1].append(row)
    return [dataset.fetch(group) for group in groups]


def _to_json(report: Report, dataset: Dataset, dim: int, model: str, adapter: str | None, data: str) -> dict[str, Any]:
    return {
        "model": model,
        "adapter": adapter,
        "data": str(Path(data)),
        "records": len(dataset),
        "trained_on": dataset.encoder.trained_on,
        "dim": dim,
        **report.to_dict(),
    }
