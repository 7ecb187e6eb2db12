"""The diffusion demo over several seeds, and beside it every other way to measure and to score.

    python benchmarks/demo_diffusion.py --seeds 0 1 2

One row per seed, way to measure, noise and scorer in results/demo_diffusion.csv: precision@10 of one wrong picture
(mean over the pictures), and the share of planted images among the first 24 of all pictures as one. Rows without
measurements are the baselines. ``features`` is what a row of the store holds: numbers of the sketch, or the whole
gradient. ``eights_*`` are the shares of eights that the demo's own command found after each training. "cosine per
timestep" is DMin's normalisation.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import gradsift as gs
from gradsift.bindings.demo.baselines import precision
from gradsift.bindings.demo.diffusion import play
from gradsift.bindings.demo.digits import DigitsCase
from gradsift.bindings.demo.digits_run import Pictures, Run, pixel_neighbours
from gradsift.bindings.demo.steps import quiet
from gradsift.bindings.diffusion.dataset import Dataset
from gradsift.bindings.diffusion.encoder import Encoder
from gradsift.bindings.diffusion.images import open_images
from gradsift.bindings.diffusion.pipelines import load
from gradsift.bindings.hush import hush

RESULTS = Path(__file__).parent / "results" / "demo_diffusion.csv"


@dataclass(frozen=True)
class Way:
    """One way to measure."""

    measurements: int = 4
    noise: str = "shared"
    timesteps: str = "stratified"
    measure: str = "loss"
    noise_seed: int = 0
    features: int | str = 4096

    @property
    def spec(self) -> gs.SketchSpec:
        return gs.SketchSpec(kind="identity") if self.features == "whole" else gs.SketchSpec(dim=int(self.features))


WAYS = [
    *(Way(k, noise_seed=seed) for seed in (0, 1) for k in (1, 4, 10)),
    *(Way(k, "per_example", noise_seed=seed) for seed in (0, 1) for k in (4, 10)),
    *(Way(k, timesteps="cubic", noise_seed=seed) for seed in (0, 1) for k in (4, 10)),
    *(Way(measure="squared_prediction", noise_seed=seed) for seed in (0, 1)),
    *(Way(features=features) for features in (512, "whole")),
]


def scores_of(run: Run, pipeline: Any, way: Way, wrong: Any) -> Iterator[tuple[str, float, float]]:
    """Scorer, precision@10 of one picture, and share among the first ones of all as one."""
    planted, count = run.digits.planted, run.case.planted
    images = Dataset(open_images(run.data_path), Encoder(pipeline))
    query = Pictures(wrong).fetch(range(len(wrong)))
    for parts in (False, True):
        loss = gs.losses.Diffusion(
            gs.losses.NoiseSchedule.of(pipeline.pipe.scheduler),
            measurements=way.measurements,
            seed=way.noise_seed,
            noise=way.noise,
            timesteps=way.timesteps,
            measure=way.measure,
            parts=parts,
        )
        with tempfile.TemporaryDirectory() as folder:
            store = gs.extract(
                pipeline.denoiser,
                images.batches(16),
                loss,
                Path(folder) / "digits.zarr",
                spec=way.spec,
                curvature=0 if parts else run.case.curvature,
                progress=False,
            )
            features = gs.Capture(pipeline.denoiser, store.spec)(query, loss)
            for scorer in ("cosine",) if parts else ("fisher", "dot", "cosine"):
                one = planted[gs.topk(store, features, 10, scorer).rows].mean()
                together = planted[gs.topk(store, features, count, scorer, as_set=True).rows].mean()
                yield scorer + (" per timestep" if parts else ""), float(one), float(together)


def rows_of(seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    case = DigitsCase(seed)
    found = play(case, folder, Console(quiet=True))
    eights = {f"eights_{name.replace(' ', '_')}": round(share, 4) for name, share in found["eights"].items()}
    run = Run(case, folder)
    run.tune()
    drawn = run.drawn()
    wrong = drawn.pictures[run.wrong(drawn)]
    pipeline = load(str(run.base_path), str(run.lora_path), device="cpu")

    def row(way: Way | None, scorer: str, one: float, together: float) -> dict[str, Any]:
        names = ("measurements", "noise", "timesteps", "measure", "noise_seed", "features")
        settings = {name: "" if way is None else getattr(way, name) for name in names}
        figures = {"precision_at_10_one": round(one, 3), "first_24_as_one": round(together, 3)}
        return {
            "seed": seed,
            **settings,
            "scorer": scorer,
            **figures,
            "named_planted": found["named_planted"],
            **eights,
        }

    planted = run.digits.planted
    yield row(None, "random", planted.mean(), planted.mean())
    for name, scores in pixel_neighbours(run.digits, wrong).items():
        mean = scores.mean(axis=0, keepdims=True)
        yield row(None, name, precision(scores, planted), precision(mean, planted, case.planted))
    for way in WAYS:
        for scorer, one, together in scores_of(run, pipeline, way, wrong):
            yield row(way, scorer, one, together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="a folder per seed goes here")
    options = parser.parse_args()
    hush("diffusers")
    for seed in options.seeds:
        kept: list[dict[str, Any]] = []
        if RESULTS.exists():
            with RESULTS.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["seed"]) != seed]
        with quiet():
            for row in rows_of(seed, options.out / f"seed{seed}"):
                kept.append(row)
                print(*row.values(), sep="  ", flush=True)
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(kept[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(kept, key=lambda row: int(row["seed"])))


if __name__ == "__main__":
    main()
