"""`gradsift extract --kind diffusion`, and `gradsift query` and `select` of a store that it wrote."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

from gradsift.bindings.options import (
    AsJson,
    Budget,
    Corrected,
    CurvatureRows,
    Damping,
    Device,
    ExactRows,
    HeldOut,
    HowReduced,
    HowScored,
    Kind,
    ModelKind,
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
    exact_method,
    layers,
)
from gradsift.kernels.errors import DataError

if TYPE_CHECKING:
    from gradsift.bindings.diffusion.workspace import Workspace

__all__ = ["extract", "query", "select"]

extract = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
select = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
query = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

PipelinePath = Annotated[
    str, typer.Option(help="Folder or Hugging Face id of a diffusers pipeline.", show_default=False)
]
Lora = Annotated[
    str | None, typer.Option(help="LoRA of diffusers, kohya or PEFT: a file, a folder, or a Hugging Face id.")
]
Dim = Annotated[int, typer.Option(help="Numbers per image, a multiple of 64.")]
Seed = Annotated[int, typer.Option(help="Of the sketch, and of the noises.")]
Layers = Annotated[
    list[str] | None,
    typer.Option(help="Layers to capture: lora, or a glob such as '*.to_q'; may be repeated.  \\[default: lora]"),
]
DenoiserPrecision = Annotated[Precision, typer.Option(help="Of the model; VAEs run in float32.")]
OtherLora = Annotated[str | None, typer.Option("--lora", help="Where the LoRA is now, if it moved.")]

_HELP = {"help_option_names": ["-h", "--help"]}


class Noise(StrEnum):
    """Whose noise a measurement adds."""

    shared = "shared"
    per_example = "per_example"


class Timesteps(StrEnum):
    """Where in the schedule measurements are taken."""

    stratified = "stratified"
    cubic = "cubic"


@extract.command(name="extract", context_settings=_HELP)
def _extract(
    model: PipelinePath,
    data: Annotated[
        str,
        typer.Option(
            help="Training images: a folder (captions in metadata.jsonl or .csv, or in .txt files beside them), or a "
            ".jsonl, .csv or .parquet file with columns image and text (or label).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The store to write: a new folder, or one to finish.", show_default=False)],
    kind: ModelKind = Kind.diffusion,
    lora: Lora = None,
    prompt: Annotated[
        str | None, typer.Option(help="Caption of the images that have none, such as DreamBooth's instance prompt.")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Of the training: the shorter side is resized to it, the middle kept.", show_default="the model's"
        ),
    ] = None,
    measurements: Annotated[
        int, typer.Option(min=1, help="Timesteps with a noise each, per image: more are truer, and cost as much more.")
    ] = 4,
    noise: Annotated[
        Noise, typer.Option(help="shared: the same noises for every image, which makes them comparable.")
    ] = Noise.shared,
    timesteps: Annotated[
        Timesteps, typer.Option(help="stratified: spread evenly over the schedule; cubic: mostly much noise (DMin).")
    ] = Timesteps.stratified,
    parts: Annotated[
        bool, typer.Option("--parts", help="Keep measurements apart: as many times the rows; cosine normalises each.")
    ] = False,
    dim: Dim = 4096,
    seed: Seed = 0,
    modules: Layers = None,
    curvature: CurvatureRows = 2000,
    groups: RowGroups = None,
    batch_size: Annotated[
        int, typer.Option(help="Images in a batch; the model sees as many times the measurements.")
    ] = 4,
    dtype: DenoiserPrecision = Precision.float32,
    store_dtype: StoreDtype = StorePrecision.float32,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave unusable images out, and name them.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Sketch the gradient of every training image into a store.

    [bold]gradsift extract --kind diffusion --model runwayml/stable-diffusion-v1-5 --lora ./lora --data ./images
    --out train.zarr[/bold]

    Every image is read first; a bad one is named. Latents and text encodings are made once and kept beside the
    store, in train.zarr.cache. Stopped at any moment, the same command goes on where it was.

    [dim]a model tuned without LoRA: name its layers[/dim]
    [bold]gradsift extract ... --modules '*.to_q' --modules '*.to_v'[/bold]
    """
    from gradsift.bindings.describe import describe, print_image_survey
    from gradsift.bindings.diffusion.dataset import Dataset
    from gradsift.bindings.diffusion.encoder import Encoder
    from gradsift.bindings.diffusion.images import open_images
    from gradsift.bindings.diffusion.pipelines import load
    from gradsift.bindings.diffusion.workspace import Notes, cache_of
    from gradsift.bindings.hush import hush
    from gradsift.bindings.render import bytes_text, ticking
    from gradsift.bindings.space import absolute
    from gradsift.engine.extraction.extract import extract as run
    from gradsift.engine.losses import Diffusion, NoiseSchedule
    from gradsift.engine.store.format import read_description
    from gradsift.kernels.spec import SketchSpec

    spec = SketchSpec(dim=dim, seed=seed)
    read_description(out)
    entries = open_images(data)
    hush("diffusers")
    pipeline = load(model, lora, dtype=dtype.value, device=device)
    loss = Diffusion(
        NoiseSchedule.of(pipeline.pipe.scheduler),
        measurements=measurements,
        seed=seed,
        noise=cast(Any, noise.value),
        timesteps=cast(Any, timesteps.value),
        parts=parts,
        predict=pipeline.family.predict,
    )
    encoder = Encoder(pipeline, resolution, cache_of(out))
    with ticking("") as progress:
        images = Dataset(entries, encoder, prompt, skip_bad=skip_bad, progress=progress)
    encoder.rest()
    if not as_json:
        print_image_survey(Console(), images, pipeline, loss)
    selected = layers(modules)
    notes = Notes(
        model=str(absolute(model)),
        data=str(absolute(data)),
        lora=absolute(lora),
        encoders=encoder.fingerprint,
        resolution=encoder.resolution,
        dtype=dtype.value,
        modules=selected,
        prompt=prompt,
        trained_on=loss.kind,
    )
    store = run(
        pipeline.denoiser,
        images.batches(batch_size),
        loss,
        out,
        spec=spec,
        modules=selected,
        dtype=store_dtype.value,
        curvature=curvature,
        groups=groups and groups.value,
        notes=asdict(notes),
    )
    if as_json:
        typer.echo(json.dumps({**describe(store), "survey": asdict(images.survey)}))
        return
    console, made = Console(), describe(store)
    console.print(
        f"[green]done[/green]  {escape(str(out))}: {len(store):,} images, {made['curvature_rows']:,} curvature rows, "
        f"{bytes_text(made['bytes'])}"
    )
    ask = ' --prompt "..."' if pipeline.family.encode is not None else " --label 0" if pipeline.classes else ""
    next_one = f"next  gradsift query {out} --image generated.png{ask} --out grid.png"
    console.print(escape(next_one), highlight=False)


@query.command(name="query", context_settings=_HELP)
def _query(
    store: Store,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A generated image; several are asked about as one.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What it was generated from.")] = None,
    label: Annotated[
        int | None, typer.Option(help="The class it was generated from, where the model reads one.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--set", help="A folder of images, or a file as for extract: all of them as one.")
    ] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="A training image by its id; may be repeated.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Picture to write: the query, and training images with scores and heat maps.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Images to show.")] = 5,
    least: Annotated[bool, typer.Option("--least", help="Also show those that pull the other way.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Order a short list by exact gradients, and map which regions pull.")
    ] = False,
    scorer: HowScored = "fisher",
    method: Corrected = None,
    sample: ExactRows = 64,
    damping: Damping = None,
    held_out: HeldOut = None,
    kind: Annotated[Kind, typer.Option(help="What kind of model it is; the store knows.")] = Kind.diffusion,
    model: OtherModel = None,
    lora: OtherLora = None,
    train: OtherData = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Which training images made the model draw this?

    [dim]the answer as numbers and as a picture[/dim]
    [bold]gradsift query train.zarr --image generated.png --prompt "a red square" --out grid.png[/bold]

    [dim]by exact gradients, with heat maps of the regions that pull, both ends[/dim]
    [bold]gradsift query train.zarr --image generated.png --prompt "..." --exact --least --out grid.png[/bold]

    [dim]whose style is this? a folder of images as one question[/dim]
    [bold]gradsift query train.zarr --set ./generated --out grid.png[/bold]

    A positive score means that training on the image lowers the query's loss.
    """
    from gradsift.bindings.diffusion.answers import Asker
    from gradsift.engine.scorers.registry import scorer_of

    if bool(image) + (folder is not None) + bool(ids) != 1:
        raise DataError("give exactly one of --image, --set and --id: what is to be explained")
    if ((ids or folder is not None) and label is not None) or (ids and prompt is not None):
        raise DataError("--prompt and --label belong to --image: other images have their own")
    scorer_of(scorer)
    space = _workspace(store, model, lora, train, device)
    if image:
        questions = space.questions(image, prompt, label)
    else:
        questions = space.own(ids) if ids else space.style(cast(Path, folder), prompt)
    how = exact_method(method, exact, scorer, space)
    unseen = None if held_out is None else space.style(Path(held_out), None)
    asker = Asker(space, questions, scorer, how, sample, damping, unseen)
    answers = [asker.ask(k, largest=largest) for largest in ((True, False) if least else (True,))]
    if as_json:
        typer.echo(json.dumps(asker.to_json(answers), default=str))
    else:
        asker.print(Console(), answers)
    if out is not None:
        asker.draw(answers, out)
        if not as_json:
            Console().print(f"[green]done[/green]  {escape(str(out))}")


@select.command(name="select", context_settings=_HELP)
def _select(
    store: Store,
    out: Annotated[Path, typer.Option(help="JSONL file to write.", show_default=False)],
    targets: Annotated[
        Path | None,
        typer.Option(
            help="Images as the model should draw them: a folder, or a file as for extract.", show_default=False
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Caption of the targets that have none.")] = None,
    budget: Budget = None,
    method: SelectBy = "top",
    scorer: HowScored = "fisher",
    reduce: HowReduced = None,
    rule: Rule = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Of groups: a number of clusters, or a column of the images' records.", show_default=False),
    ] = None,
    reference: Reference = None,
    kind: ModelKind = Kind.diffusion,
    model: OtherModel = None,
    lora: OtherLora = None,
    train: OtherData = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Choose the training images that help the targets most: their ids and captions as JSONL, best first.

    [bold]gradsift select train.zarr --targets ./wanted --budget 5% --out chosen.jsonl[/bold]
    """
    from gradsift.bindings.selection import Choosing, report, write_selection
    from gradsift.engine.store.reader import FeatureStore

    choosing = Choosing(method, scorer, budget, None, labels, reference, rule, reduce)
    choosing.before_reading(len(FeatureStore.open(store)), targets is not None)
    space = _workspace(store, model, lora, train, device)
    asked = None if targets is None else space.style(targets, prompt)
    report(write_selection(space, asked, choosing, out), out, len(space.store), as_json)


def _workspace(store: Path, model: str | None, lora: str | None, train: str | None, device: str | None) -> Workspace:
    from gradsift.bindings.diffusion.workspace import Workspace, remembered
    from gradsift.bindings.hush import hush
    from gradsift.engine.store.reader import FeatureStore

    opened = FeatureStore.open(store)
    notes = remembered(opened)
    notes = replace(notes, model=model or notes.model, lora=lora or notes.lora, data=train or notes.data)
    hush("diffusers")
    return Workspace(opened, notes, device)
