"""`gradsift check --kind diffusion`: is gradsift right about this pipeline, on a few of the user's own images?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from gradsift.bindings.diffusion.command import DenoiserPrecision, Dim, Layers, Lora, PipelinePath, Seed
from gradsift.bindings.options import AsJson, Device, Kind, ModelKind, Precision, Seconds, layers
from gradsift.bindings.render import status

__all__ = ["app"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command(name="check", context_settings={"help_option_names": ["-h", "--help"]})
def _check(
    model: PipelinePath,
    data: Annotated[str, typer.Option(help="The training images, as for extract; a few are read.", show_default=False)],
    kind: ModelKind = Kind.diffusion,
    lora: Lora = None,
    prompt: Annotated[str | None, typer.Option(help="Caption of the images that have none.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Of the training.", show_default="the model's")] = None,
    measurements: Annotated[int, typer.Option(min=1, help="Timesteps with a noise each, per image.")] = 4,
    dim: Dim = 4096,
    seed: Seed = 0,
    modules: Layers = None,
    examples: Annotated[
        int, typer.Option(min=2, help="Images to rank, spread over the data; a batch goes one by one.")
    ] = 32,
    seconds: Seconds = 60.0,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a batch.")] = 4,
    dtype: DenoiserPrecision = Precision.float32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prove on a few of your own images that gradsift is right about your diffusion model.

    [bold]gradsift check --kind diffusion --model ./sd15 --lora ./lora --data ./images[/bold]

    Rows are compared with plain autograd, one image at a time; in sum, with the gradient of a batch; with themselves,
    alone and in a batch, and in another precision. The sketch's ranking is compared with the exact one. It says what
    is measured, whether the model predicts what its scheduler says, whether the LoRA helps on these images, which
    layers are refused and why, and what is trained but left out.

    Exit code 0: nothing is wrong. 1: something is, and it is named. 2: the input cannot be read.
    """
    from gradsift.bindings.check.render import print_report
    from gradsift.bindings.diffusion.dataset import Dataset
    from gradsift.bindings.diffusion.encoder import Encoder
    from gradsift.bindings.diffusion.images import open_images
    from gradsift.bindings.diffusion.pipelines import load
    from gradsift.bindings.hush import hush
    from gradsift.engine.check.run import check as run
    from gradsift.engine.losses import Diffusion, NoiseSchedule
    from gradsift.kernels.spec import SketchSpec

    spec = SketchSpec(dim=dim, seed=seed)
    entries = open_images(data)
    hush("diffusers")
    with status() as tell:
        tell("loading the model")
        pipeline = load(model, lora, dtype=dtype.value, device=device)
        loss = Diffusion(
            NoiseSchedule.of(pipeline.pipe.scheduler), measurements, seed=seed, predict=pipeline.family.predict
        )
        images = Dataset(entries, Encoder(pipeline, resolution), prompt, check=False)
        rows = np.unique(np.linspace(0, len(images) - 1, examples).round().astype(int)).tolist()
        tell("encoding images")
        batches = [images.fetch(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
        report = run(
            pipeline.denoiser,
            batches,
            loss,
            spec=spec,
            modules=layers(modules),
            examples=batch_size,
            pool=len(rows),
            seconds=seconds,
            progress=lambda name: tell(f"checking: {name}"),
        )
    if as_json:
        found = {
            "model": model,
            "lora": lora,
            "loaded": pipeline.lora,
            "data": str(Path(data)),
            "records": len(images),
            "trained_on": loss.kind,
            "dim": spec.dim,
            **report.to_dict(),
        }
        typer.echo(json.dumps(found))
    else:
        said = [Text.assemble(("measured", "bold"), f": {loss.kind}")]
        if pipeline.lora:
            said.insert(0, Text.assemble(("LoRA", "bold"), f": {pipeline.lora}"))
        print_report(Console(), report, len(images), spec.dim, said)
    if not report.ok:
        raise typer.Exit(1)
