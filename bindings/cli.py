"""The command line: extract, query, select, info here; check and demo are loaded when they are called."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.dispatch import Commands, OfKind
from gradsift.bindings.hush import hush
from gradsift.bindings.memory import keep_freed_memory
from gradsift.bindings.options import (
    AsJson,
    AtCheckpoints,
    Budget,
    ByAdam,
    Corrected,
    CurvatureRows,
    Damping,
    Device,
    ExactRows,
    HeldOut,
    HowReduced,
    HowScored,
    Kind,
    LossName,
    LossOption,
    ModelKind,
    OtherAdapter,
    OtherData,
    OtherModel,
    Precision,
    Reference,
    RowGroups,
    Rule,
    SelectBy,
    Store,
    StoreDtype,
    StorePrecision,
    TrainedBy,
    exact_method,
    layers,
)
from gradsift.kernels.errors import DataError, GradsiftError

if TYPE_CHECKING:
    from gradsift.bindings.workspace import Workspace

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Which training examples made this model do that?

    [bold]gradsift extract[/bold] --model MODEL --adapter ADAPTER --data train.jsonl --out train.zarr
    [bold]gradsift query[/bold] train.zarr --prompt "What is the capital of Nigeria?"
    """.replace("\n    [", "\n\n    ["),
)


@app.command(cls=OfKind)
def extract(
    model: Annotated[
        str, typer.Option(help="Folder, Hugging Face id, or .gguf file of the base model.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Training data, .jsonl, .csv or .parquet, with columns text, or prompt and completion, or messages; "
            "and id, if wanted.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The store to write: a new folder, or one to finish.", show_default=False)],
    kind: ModelKind = Kind.lm,
    adapter: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the LoRA adapter.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="If it is not beside the adapter or the model.")] = None,
    dim: Annotated[int, typer.Option(help="Numbers per example, a multiple of 64.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the sketch.")] = 0,
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Layers to capture: lora, or a glob such as '*.q_proj'; may be repeated.  \\[default: lora]"),
    ] = None,
    loss: TrainedBy = LossName.language_model,
    loss_option: LossOption = None,
    curvature: CurvatureRows = 2000,
    groups: RowGroups = None,
    checkpoint: AtCheckpoints = None,
    adam: ByAdam = None,
    max_length: Annotated[int, typer.Option(help="Tokens kept per example; the end is cut.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a batch, padding included.")] = 4096,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch, at most.")] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the model: float32 on a CPU, as saved on a GPU.", show_default=False)
    ] = None,
    store_dtype: StoreDtype = StorePrecision.float32,
    eos: Annotated[
        bool, typer.Option("--eos/--no-eos", help="Close text and completions with the end-of-sequence token.")
    ] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unusable records out, and name them.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Sketch the gradient of every training example into a store.

    [bold]gradsift extract --model ./base --adapter ./adapter --data train.jsonl --out train.zarr[/bold]

    Every line of the data is checked first; a bad one is named by number and column.
    Stopped at any moment, the same command goes on where it was.

    [dim]longer rows in half the bytes[/dim]
    [bold]gradsift extract ... --dim 8192 --store-dtype float16[/bold]

    [dim]a model without an adapter: name its layers[/dim]
    [bold]gradsift extract ... --modules '*.q_proj' --modules '*.v_proj'[/bold]

    [dim]preference pairs, as DPO trained on them[/dim]
    [bold]gradsift extract ... --data pairs.jsonl --loss dpo --loss-option beta=0.1[/bold]

    [dim]for scorer less: Adam's updates at the checkpoints of a warm-up run[/dim]
    [bold]gradsift extract ... --checkpoint run/checkpoint-100 --checkpoint run/checkpoint-200 --adam less[/bold]
    """
    from gradsift.bindings.checkpoints import adapter_among, checkpoints_from
    from gradsift.bindings.data import Dataset
    from gradsift.bindings.describe import describe, print_survey
    from gradsift.bindings.losses import forms_of, loss_named
    from gradsift.bindings.models import load
    from gradsift.bindings.render import bytes_text, ticking
    from gradsift.bindings.space import absolute
    from gradsift.bindings.workspace import Notes
    from gradsift.engine.capture.maps import parameters_of
    from gradsift.engine.extraction.extract import extract as run
    from gradsift.engine.store.format import read_description
    from gradsift.kernels.spec import SketchSpec

    folders = [str(absolute(folder)) for folder in checkpoint or []]
    if adam is not None and not folders:
        raise DataError("--adam needs --checkpoint: folders with the optimizer's state")
    adapter = adapter or adapter_among(folders)
    spec = SketchSpec(dim=dim, seed=seed)
    loss_fn = loss_named(loss.value, loss_option or ())
    read_description(out)
    hush()
    loaded = load(model, adapter, tokenizer=tokenizer, dtype=dtype and dtype.value, device=device)
    with ticking("checking the data") as progress:
        examples = Dataset.open(
            data,
            loaded.tokenizer,
            max_length=max_length,
            eos=eos,
            encoder_decoder=loaded.encoder_decoder,
            skip_bad=skip_bad,
            skip_silent=True,
            forms=forms_of(loss_fn),
            progress=progress,
        )
    survey, trained_on = examples.survey, examples.encoder.trained_on
    if not as_json:
        print_survey(Console(), examples)
    selected = layers(modules)
    notes = Notes(
        model=str(absolute(model)),
        data=str(absolute(data)),
        adapter=absolute(adapter),
        tokenizer=absolute(tokenizer),
        dtype=dtype and dtype.value,
        modules=selected,
        max_length=max_length,
        eos=eos,
        trained_on=trained_on,
        checkpoints=folders or None,
    )
    checkpoints = checkpoints_from(folders, loaded.model, selected, adam and adam.value) or None
    parts = 1 if groups is None else len(parameters_of(loaded.model, selected))
    block = _block(len(examples), dim * parts * max(1, len(folders)))
    store = run(
        loaded.model,
        examples.batches(block=block, batch_tokens=batch_tokens, batch_size=batch_size),
        loss_fn,
        out,
        spec=spec,
        modules=selected,
        dtype=store_dtype.value,
        block=block,
        curvature=curvature,
        groups=groups and groups.value,
        checkpoints=checkpoints,
        notes=asdict(notes),
    )
    if as_json:
        print(json.dumps({**describe(store), "survey": asdict(survey)}))
        return
    console, made = Console(), describe(store)
    console.print(
        f"[green]done[/green]  {escape(str(out))}: {len(store):,} examples, "
        f"{made['curvature_rows']:,} curvature rows, {bytes_text(made['bytes'])}"
    )
    ask = '--prompt "..."' if examples.encoder.form != "text" else '--text "..."'
    console.print(f"next  gradsift query {escape(str(out))} {escape(ask)}", highlight=False)


@app.command(cls=OfKind)
def query(
    store: Store,
    text: Annotated[str | None, typer.Option(help="Text whose loss is to be explained.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A prompt; without --completion, the model's own answer is explained.")
    ] = None,
    completion: Annotated[str | None, typer.Option(help="The answer to --prompt that is to be explained.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of queries, of the same columns as training data.")] = None,
    k: Annotated[int, typer.Option("-k", help="Examples to show per query.")] = 10,
    least: Annotated[bool, typer.Option("--least", help="Also show those that push the query's loss up most.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Order a short list by exact gradients; the sketch only finds it.")
    ] = False,
    scorer: HowScored = "fisher",
    method: Corrected = None,
    sample: ExactRows = 256,
    damping: Damping = None,
    held_out: HeldOut = None,
    whole: Annotated[bool, typer.Option("--whole", help="Show long texts whole.")] = False,
    model: OtherModel = None,
    adapter: OtherAdapter = None,
    train: OtherData = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Which training examples made the model do this?

    [dim]why does it answer what it answers?[/dim]
    [bold]gradsift query train.zarr --prompt "What is the capital of Nigeria?"[/bold]

    [dim]why would it say that? by exact gradients, the five strongest[/dim]
    [bold]gradsift query train.zarr --prompt "Capital of Nigeria?" --completion " Lagos" --exact -k 5[/bold]

    [dim]along the query after an EK-FAC or Gauss-Newton curvature, damped as unseen data says[/dim]
    [bold]gradsift query train.zarr --prompt "..." --method ekfac --held-out valid.jsonl[/bold]

    [dim]many questions at once, for a program[/dim]
    [bold]gradsift query train.zarr --data failures.jsonl --least --json > why.json[/bold]

    A positive score means that training on the example lowers the query's loss.
    Words are coloured by their exact share in the inner product with the query's gradient.
    """
    from gradsift.bindings.answers import Asker
    from gradsift.engine.scorers.registry import scorer_of

    if (text is not None) + (prompt is not None) + (data is not None) != 1:
        raise DataError("give exactly one of --text, --prompt and --data: what is to be explained")
    if completion is not None and prompt is None:
        raise DataError("--completion is given without --prompt: give both, or --text")
    scorer_of(scorer)
    space = _workspace(store, model, adapter, train, device)
    questions = space.questions(data) if data is not None else space.question(text, prompt, completion)
    how = exact_method(method, exact, scorer, space)
    unseen = None if held_out is None else space.questions(held_out)
    asker = Asker(space, questions, scorer, how, sample, damping, unseen)
    answers = [asker.ask(k, largest=True)]
    if least:
        answers.append(asker.ask(k, largest=False))
    if as_json:
        print(json.dumps(asker.to_json(answers), default=str))
    else:
        asker.print(Console(), answers, whole)


@app.command(cls=OfKind)
def select(
    store: Store,
    out: Annotated[Path, typer.Option(help="JSONL file to write.", show_default=False)],
    targets: Annotated[
        str | None,
        typer.Option(help="Examples of what the model should do, in the columns of training data.", show_default=False),
    ] = None,
    budget: Budget = None,
    method: SelectBy = "top",
    scorer: HowScored = "fisher",
    tasks: Annotated[
        str | None, typer.Option(help="Column of the targets that names the task of each.", show_default=False)
    ] = None,
    reduce: HowReduced = None,
    rule: Rule = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="Column of the training data: domains, for groups, or classes, for vog. For groups also a number "
            "of clusters.",
            show_default=False,
        ),
    ] = None,
    reference: Reference = None,
    model: OtherModel = None,
    adapter: OtherAdapter = None,
    train: OtherData = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Choose the training examples that help the targets most, as JSONL ready to train on.

    [bold]gradsift select train.zarr --targets validation.jsonl --budget 5% --out chosen.jsonl[/bold]

    [dim]a few shots of several tasks: each may bring in examples of its own, or all get their share[/dim]
    [bold]gradsift select train.zarr --targets shots.jsonl --tasks task --scorer cosine --out chosen.jsonl[/bold]
    [bold]gradsift select train.zarr --targets shots.jsonl --tasks task --method bids --out chosen.jsonl[/bold]

    [dim]in which shares to mix the domains of the data[/dim]
    [bold]gradsift select train.zarr --targets shots.jsonl --method groups --labels domain --out mix.jsonl[/bold]

    Each line is the original record with its id, score and reason, best first. `gradsift methods` tells what there is.
    """
    from gradsift.bindings.selection import Choosing, report, write_selection
    from gradsift.engine.store.reader import FeatureStore

    choosing = Choosing(method, scorer, budget, tasks, labels, reference, rule, reduce)
    choosing.before_reading(len(FeatureStore.open(store)), targets is not None)
    space = _workspace(store, model, adapter, train, device)
    asked = None if targets is None else space.questions(targets)
    report(write_selection(space, asked, choosing, out), out, len(space.store), as_json)


@app.command()
def info(
    store: Store,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything and compare it with its checksums.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a store holds, and what it was made from.

    [bold]gradsift info train.zarr[/bold]

    [bold]gradsift info train.zarr --verify[/bold]   is every byte as it was written?
    """
    from gradsift.bindings.describe import describe, print_info
    from gradsift.engine.store.reader import FeatureStore

    opened = FeatureStore.open(store, unfinished=True)
    if verify:
        opened.verify()
    if as_json:
        print(json.dumps({**describe(opened), "verified": verify, "metadata": opened.metadata}))
    else:
        print_info(Console(), opened, verify)


def main() -> None:
    """Run the command line; every expected error is one sentence on stderr and exit code 2."""
    _quiet()
    keep_freed_memory()
    try:
        app()
    except GradsiftError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on where it was", 130)
    except OSError as error:
        _fail(str(error), 2)


def _fail(sentence: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error[/red]  {escape(sentence)}")
    sys.exit(code)


def _quiet() -> None:
    """Warnings of this library go to stderr, one a line; those of others only when they are errors."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[_Notes()])
    logging.getLogger("gradsift").setLevel(logging.WARNING)
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when torch imports tqdm
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[yellow]note[/yellow]   {escape(self.format(record))}")


def _workspace(store: Path, model: str | None, adapter: str | None, train: str | None, device: str | None) -> Workspace:
    from gradsift.bindings.workspace import Notes, Workspace, remembered
    from gradsift.engine.store.reader import FeatureStore

    opened = FeatureStore.open(store)
    hush()
    notes = Notes(model, train, adapter) if model and train else remembered(opened)
    notes = replace(notes, model=model or notes.model, adapter=adapter or notes.adapter, data=train or notes.data)
    return Workspace(opened, notes, device)


def _block(examples: int, numbers: int) -> int:
    """Examples that are sorted by length and committed together: 16 MB, less for small data."""
    return max(1, min((1 << 22) // numbers, max(64, -(-examples // 16))))
