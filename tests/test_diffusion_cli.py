"""The command line on diffusion models: the commands of docs/diffusion.md, bad input, a killed run, and pictures."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from commandline import Cli, refused
from PIL import Image
from torch import nn

import gradsift as gs
from gradsift.bindings.diffusion.grid import PULLS, PUSHES, Row, Tile, draw, overlay
from gradsift.engine.losses import Diffusion, NoiseSchedule

DOCS = Path(__file__).parent.parent / "docs" / "diffusion.md"
SD, XL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
EXTRACT = ("extract", "--kind", "diffusion", "--device", "cpu", "--dim", "256", "--curvature", "8")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that docs/diffusion.md names, tiny."""
    root = tmp_path_factory.mktemp("diffusion")
    for make, model, lora in ((pipelines.sd, SD, "lora"), (pipelines.sdxl, XL, "lora-xl")):
        pipe = make()
        pipelines.save(pipe, root / model)
        pipelines.save_lora(pipe, root / lora)
    pipelines.save_pictures(root / "images", 10)
    (root / "generated").mkdir()
    for i in (20, 24):
        pipelines.picture(i).save(root / "generated" / f"{i}.png")
        (root / "generated" / f"{i}.txt").write_text(pipelines.caption(i))
    pipelines.picture(20).save(root / "generated.png")
    return root


@pytest.fixture
def store(site: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> str:
    """Extracted by the first test that needs it; the working directory is the site's."""
    monkeypatch.chdir(site)
    if not (site / "small.zarr").exists():
        done = cli(*extraction("small.zarr"))
        assert done.code == 0, done.err
    return "small.zarr"


def extraction(out: str, *more: str, data: str = "images", model: str = SD, lora: str | None = "lora") -> list[str]:
    tuned = [] if lora is None else ["--lora", lora]
    return [*EXTRACT, "--model", model, *tuned, "--data", data, "--out", out, *more]


def test_the_commands_of_the_docs(site: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    blocks = re.findall(r"```bash\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("gradsift ")]
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command)[1:]
        small = {"check": ["--dim", "256"], "extract": ["--dim", "256", "--curvature", "8"], "query": []}.get(words[0])
        done = cli(*words, *([] if small is None else [*small, "--device", "cpu"]))
        # An untrained model may fail check's question whether it predicts its target, and only that one.
        assert done.code == 0 or (words[0] == "check" and "1 of 12 checks failed (labels)" in done.out), done
    for picture in ("grid.png", "style.png", "xl.png"):
        assert Image.open(site / picture).size[0] > 500


def test_extract_says_what_it_read_and_measures(store: str, cli: Cli) -> None:
    done = cli(*extraction("said.zarr"))
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    for words in (
        "10 images at 16 x 16, 4 prompts",
        "64 tensors in the unet",
        "epsilon over 1000 steps",
        "4 shared noises of seed 0, stratified timesteps",
        "never without",
        'gradsift query said.zarr --image generated.png --prompt "..." --out grid.png',
    ):
        assert words in said
    info = " ".join(cli("info", "said.zarr").out.split())
    assert "4 shared noises of seed 0" in info
    assert str(Path("lora").resolve()) in info.replace(" ", "")  # a long folder is printed over several lines


def test_a_training_image_is_found_by_itself_with_its_regions(store: str, cli: Cli) -> None:
    asked = ("query", store, "--id", "003.png", "-k", "3", "--exact", "--json", "--device", "cpu")
    for scorer in ("cosine", "dot", "fisher"):
        done = cli(*asked, "--scorer", scorer, "--least")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["query"] == [{"id": "003.png", "text": "a grey square"}]
        assert found["scorer"] == scorer
        for row in found["most"] + found["least"]:
            assert np.shape(row["regions"]) == (8, 8)
            assert np.sum(row["regions"]) == pytest.approx(row["score"], rel=1e-4)
            assert row["text"] == pipelines.caption(int(row["id"][:3]))
        if scorer == "cosine":
            assert found["most"][0]["id"] == "003.png"
            assert found["most"][0]["score"] == pytest.approx(1.0, abs=2e-3)


def test_several_images_are_one_question(store: str, cli: Cli) -> None:
    both = cli("query", store, "--id", "001.png", "--id", "002.png", "--scorer", "dot", "--json", "-k", "10")
    alone = [
        cli("query", store, "--id", name, "--scorer", "dot", "--json", "-k", "10") for name in ("001.png", "002.png")
    ]
    scores = [{row["id"]: row["score"] for row in json.loads(run.out)["most"]} for run in (both, *alone)]
    for name, score in scores[0].items():
        assert score == pytest.approx((scores[1][name] + scores[2][name]) / 2, rel=1e-4)


def test_parts_are_kept_apart_and_asked_together(store: str, cli: Cli) -> None:
    done = cli(*extraction("parts.zarr", "--parts", "--measurements", "2"))
    assert done.code == 0, done.err
    assert gs.FeatureStore.open("parts.zarr").features.shape == (10, 2, 256)
    for scorer in ("cosine", "dot", "fisher"):
        asked = ("query", "parts.zarr", "--id", "004.png", "--scorer", scorer, "--exact", "--json", "-k", "2")
        found = json.loads(cli(*asked, "--out", f"{scorer}.png").out)
        for row in found["most"]:
            assert np.sum(row["regions"]) == pytest.approx(row["score"], rel=1e-4)
        assert Path(f"{scorer}.png").is_file()
        if scorer == "cosine":
            assert found["most"][0]["id"] == "004.png"


def test_select_writes_ids_and_captions(store: str, cli: Cli) -> None:
    done = cli("select", store, "--targets", "generated", "--budget", "3", "--out", "chosen.jsonl", "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path("chosen.jsonl").read_text(encoding="utf-8").splitlines()]
    assert json.loads(done.out)["chosen"] == len(lines) == 3
    assert all(line["text"] == pipelines.caption(int(line["id"][:3])) for line in lines)


def test_select_takes_labels_from_any_column(store: str, cli: Cli) -> None:
    metadata = Path("images/metadata.jsonl")
    before = metadata.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in before.splitlines()]
    styled = [{**line, "style": "ab"[i % 2]} for i, line in enumerate(lines)]
    metadata.write_text("".join(json.dumps(line) + "\n" for line in styled), encoding="utf-8")
    asked = ("select", store, "--targets", "generated", "--budget", "4", "--out", "mixed.jsonl")
    done = cli(*asked, "--method", "groups", "--labels", "style", "--json")
    metadata.write_text(before, encoding="utf-8")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)["weights"]) == {"a", "b"}
    chosen = [json.loads(line) for line in Path("mixed.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["style"] == "ab"[int(line["id"][:3]) % 2] for line in chosen)


def test_files_and_folders_give_the_same_rows(store: str, cli: Cli) -> None:
    import datasets

    names = [f"{i:03}.png" for i in range(10)]
    records = [{"id": n, "image": f"images/{n}", "text": pipelines.caption(i)} for i, n in enumerate(names)]
    Path("train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    table = datasets.Dataset.from_list([{**r, "image": {"bytes": Path(r["image"]).read_bytes()}} for r in records])
    table.cast_column("image", datasets.Image()).to_parquet("train.parquet")
    shutil.copytree("images", "sidecars", dirs_exist_ok=True)
    Path("sidecars/metadata.jsonl").unlink()
    for i, name in enumerate(names):
        Path("sidecars", name).with_suffix(".txt").write_text(pipelines.caption(i))
    expected = gs.FeatureStore.open(store)
    for data in ("train.jsonl", "train.parquet", "sidecars"):
        done = cli(*extraction(f"{data}.zarr", data=data))
        assert done.code == 0, done.err
        got = gs.FeatureStore.open(f"{data}.zarr")
        assert list(got.ids) == list(expected.ids) == names
        np.testing.assert_array_equal(got.features[:], expected.features[:])


def edited(site: Path, name: str, change: Callable[[Path], object], source: str = "images") -> str:
    """A copy of a folder with a change."""
    shutil.copytree(site / source, site / name)
    change(site / name)
    return name


def append(file: str, line: dict[str, Any]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        with (folder / file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")

    return change


def configure(file: str, **values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, **values}))

    return change


def test_bad_images_are_named_and_left_out_when_asked(site: Path, store: str, cli: Cli) -> None:
    cases = {
        "corrupt": (lambda f: (f / "004.png").write_bytes(b"not an image"), "image '004.png' cannot be read"),
        "torn": (lambda f: os.truncate(f / "004.png", 900), "image '004.png' cannot be read"),
        "textonly": (append("metadata.jsonl", {"text": "no image"}), "metadata.jsonl line 11: no 'file_name'"),
        "missing": (append("metadata.jsonl", {"file_name": "gone.png", "text": "x"}), "'gone.png' does not exist"),
        "unlisted": (lambda f: pipelines.picture(1).save(f / "new.png"), "image 'new.png' has no caption"),
        "notext": (append("metadata.jsonl", {"file_name": "000.png", "text": ["a", "b"]}), "a list, expected the text"),
        "notjson": (
            lambda f: (f / "metadata.jsonl").open("a").write("{oops\n"),
            "metadata.jsonl line 11, column 2: not JSON",
        ),
    }
    for name, (change, sentence) in cases.items():
        refused(cli(*extraction("bad.zarr", data=edited(site, name, change))), sentence)
        assert not Path("bad.zarr").exists()

    def every(folder: Path) -> None:
        for name in ("corrupt", "textonly", "missing", "unlisted", "notjson"):
            cases[name][0](folder)

    done = cli(*extraction("bad.zarr", "--skip-bad", data=edited(site, "every", every)))
    assert done.code == 0, done.err
    said = " ".join(done.out.split())
    assert "left out 5 images" in said
    for name, line in (("corrupt", 11), ("textonly", 11), ("missing", 12), ("unlisted", 11), ("notjson", 13)):
        assert cases[name][1].replace("line 11", f"line {line}") in said
    assert len(gs.FeatureStore.open("bad.zarr")) == 9
    Path("rows.jsonl").write_text('{"image": "images/000.png", "text": "a"}\n{"text": "b"}\n')
    refused(cli(*extraction("rows.zarr", data="rows.jsonl")), "rows.jsonl line 2, column 'image': missing")


def test_one_caption_for_all_that_have_none(site: Path, store: str, cli: Cli) -> None:
    data = edited(site, "bare", lambda f: (f / "metadata.jsonl").unlink())
    refused(cli(*extraction("bare.zarr", data=data)), "has no caption", "--prompt")
    done = cli(*extraction("bare.zarr", "--prompt", "a square", data=data, lora=None), "--modules", "*.to_q", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["survey"]["prompts"] == 1
    found = json.loads(cli("query", "bare.zarr", "--id", "000.png", "--json").out)
    assert found["query"] == [{"id": "000.png", "text": "a square"}]


def test_bad_models_and_options_are_one_sentence(site: Path, store: str, cli: Cli) -> None:
    models = {
        "novae": (configure("model_index.json", vae=[None, None]), "has no VAE"),
        "odd": (configure("scheduler/scheduler_config.json", prediction_type="odd"), "prediction type 'odd'"),
        "video": (configure("model_index.json", _class_name="WanPipeline"), "is a WanPipeline, expected one of"),
    }
    for name, (change, sentence) in models.items():
        refused(cli(*extraction("x.zarr", model=edited(site, f"model-{name}", change, SD))), sentence)
    refused(cli(*extraction("x.zarr", "--resolution", "15")), "resolution is 15, expected a multiple of 2")
    refused(cli(*extraction("x.zarr", lora="lora-xl")), "LoRA 'lora-xl' does not fit the model", "has shape")
    refused(cli(*extraction("x.zarr", data="gone")), "'gone' does not exist")
    refused(cli(*extraction("x.zarr", data="generated.png")), "is one image: give a folder")
    refused(cli(*extraction("x.zarr", lora=None)), "LoRA")
    refused(cli("query", store), "give exactly one of --image, --set and --id")
    refused(cli("query", store, "--image", "generated.png"), "has no caption", "--prompt")
    refused(cli("query", store, "--image", "gone.png", "--prompt", "x"), "image 'gone.png' does not exist")
    refused(cli("query", store, "--image", "images/metadata.jsonl", "--prompt", "x"), "cannot be read")
    refused(cli("query", store, "--image", "generated.png", "--prompt", "x", "--label", "1"), "reads no class labels")
    refused(cli("query", store, "--id", "gone.png"), "id 'gone.png' is not in the data")
    refused(cli("extract", "--model", SD, "--data", "x.jsonl", "--out", "x.zarr"), "add --kind diffusion")
    assert not Path("x.zarr").exists()


def test_what_has_changed_since_is_refused(site: Path, store: str, cli: Cli) -> None:
    pipelines.save_lora(pipelines.sd(), site / "other-lora", seed=5)
    refused(cli("query", store, "--id", "000.png", "--lora", "other-lora"), "the adapter 'other-lora' is not the one")
    pipe = pipelines.sd()
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(0.1)
    pipelines.save(pipe, site / "other-vae")
    refused(cli("query", store, "--id", "000.png", "--model", "other-vae"), "the VAE or a text encoder of 'other-vae'")


def test_each_kind_has_a_help_of_its_own(cli: Cli) -> None:
    for command in ("extract", "check"):
        plain = cli(command, "--help").out
        assert "--adapter" in plain
        assert "--kind" in plain
        assert "--lora" not in plain
        own = cli(command, "--kind", "diffusion", "--help").out
        assert "--lora" in own
        assert "--adapter" not in own
    assert "--image" in cli("query", "--kind", "diffusion", "--help").out


def test_check_passes_on_what_it_can_know_and_says_what_is_measured(store: str, cli: Cli) -> None:
    done = cli(
        *("check", "--kind", "diffusion", "--model", SD, "--lora", "lora", "--data", "images"),
        *("--dim", "512", "--device", "cpu", "--json"),
    )
    report = json.loads(done.out)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    for name in ("loss", "maps", "coverage", "mode", "features", "conservation", "batch", "isolation"):
        assert verdicts[name] == "ok", report
    assert report["loaded"] == "64 tensors in the unet"
    assert report["trained_on"].startswith("diffusion: epsilon")
    assert done.code == (0 if report["ok"] else 1)


def test_check_finds_a_lora_that_is_random(site: Path, store: str, cli: Cli) -> None:
    pipe = pipelines.sd()
    pipelines.add_lora(pipe.unet, ["conv_out", *pipelines.TARGETS])
    with torch.no_grad():
        for name, parameter in pipe.unet.conv_out.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    pipe.save_lora_weights("random", unet_lora_layers=pipelines.layers_of(pipe.unet))
    done = cli(
        *("check", "--kind", "diffusion", "--model", SD, "--lora", "random", "--data", "images"),
        *("--dim", "512", "--device", "cpu"),
    )
    assert done.code == 1, done
    assert "makes its own examples worse" in " ".join(done.out.split())


class Perfect(nn.Module):
    """Predicts the noise exactly where the image is all zeros."""

    def __init__(self, alphas: torch.Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(1, 1, bias=False)
        self.register_buffer("scale", (1 - alphas).sqrt())
        with torch.no_grad():
            self.map.weight.fill_(1.0)

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scaled = noisy / self.scale[timestep.long()][:, None, None, None]  # type: ignore[index]
        return self.map(scaled[..., None])[..., 0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("given", "verdict"), [("epsilon", "ok"), ("v_prediction", "fail"), ("sample", "fail")])
def test_check_finds_a_wrong_prediction_type(given: str, verdict: str) -> None:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=given)
    loss = Diffusion(NoiseSchedule.of(scheduler), measurements=2)
    torch.manual_seed(0)
    batch = {"latents": 0.1 * torch.randn(4, 2, 6, 6)}
    report = gs.check(Perfect(scheduler.alphas_cumprod), [batch], loss, spec=gs.SketchSpec(dim=64), modules="map")
    assert report["labels"].verdict == verdict, report["labels"]
    if verdict == "fail":
        assert "set prediction_type in the scheduler's configuration to 'epsilon'" in report["labels"].sentence


def test_a_killed_extraction_goes_on_and_ends_the_same(site: Path, store: str, cli: Cli, tmp_path: Path) -> None:
    data = pipelines.save_pictures(tmp_path / "images", 70)
    small = ("--batch-size", "1", "--measurements", "1")
    command = [sys.executable, "-m", "gradsift", *extraction(str(tmp_path / "killed.zarr"), *small, data=data)]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed.zarr").glob("blocks/c.*")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not gs.FeatureStore.open(tmp_path / "killed.zarr", unfinished=True).complete
    for name in ("killed.zarr", "whole.zarr"):
        done = cli(*extraction(str(tmp_path / name), *small, data=data))
        assert done.code == 0, done.err
        assert "70 images" in done.out
    files = [p.relative_to(tmp_path / "whole.zarr") for p in (tmp_path / "whole.zarr").rglob("*") if p.is_file()]
    assert len(files) > 8
    for file in files:
        assert (tmp_path / "killed.zarr" / file).read_bytes() == (tmp_path / "whole.zarr" / file).read_bytes(), file


def test_maps_lie_over_the_image_in_two_colours() -> None:
    grey = np.full((64, 64, 3), 200, dtype=np.uint8)
    heat = np.zeros((4, 4))
    heat[0, 0], heat[3, 3] = 2.0, -1.0
    drawn = overlay(grey, heat, 1.0).astype(int)
    near = [np.abs(drawn[y, x] - np.array(colour)).sum() for (y, x), colour in (((4, 4), PULLS), ((60, 60), PUSHES))]
    assert max(near) < 110
    assert np.ptp(drawn[4, 60]) == 0  # where nothing pulls it stays grey
    assert not np.any(np.abs(np.diff(drawn, axis=1)).sum(axis=2) > 120)  # bilinear: no edges of latent positions
    np.testing.assert_array_equal(overlay(grey, 0 * heat, 0.0)[0, 0], overlay(grey, heat, 1.0)[4, 60])


def test_the_picture_shows_every_image_and_its_map(tmp_path: Path) -> None:
    red, blue = (np.full((8, 8, 3), colour, dtype=np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    heat = np.ones((2, 2))
    rows = [Row("a", "b", [Tile(blue, ["1.  +2", "x.png", "a very long caption " * 9], heat)] * 3)]
    draw("title", Tile(red, ["q.png"]), rows, tmp_path / "deep" / "grid.png", "note")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "grid.png").convert("RGB")).reshape(-1, 3)
    colours = {"red": [255, 0, 0], "blue": [0, 0, 255]}
    count = {name: int((pixels == colour).all(axis=1).sum()) for name, colour in colours.items()}
    assert count["red"] > 40_000
    assert count["blue"] == pytest.approx(3 * count["red"] * (176 / 244) ** 2, rel=0.02)


def test_a_compacted_store_is_asked_like_the_whole_one(store: str, cli: Cli, tmp_path: Path) -> None:
    small = str(tmp_path / "small.compact")
    done = cli("compact", store, "--bytes", "16", "--out", small)
    assert done.code == 0, done.err
    asked = ("--id", "003.png", "-k", "3", "--exact", "--json", "--device", "cpu")
    found = [cli("query", path, *asked) for path in (store, small)]
    assert found[1].code == 0, found[1].err
    ids = [[row["id"] for row in json.loads(run.out)["most"]] for run in found]
    assert ids[0] == ids[1]  # a list of 100 holds all 10: exact gradients decide
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.compact"]  # no image was encoded again
