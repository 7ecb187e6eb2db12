"""Real pipelines of diffusers, tiny: every family end to end, LoRA files of every format, and those that do not fit."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import gradsift as gs
from gradsift.bindings.diffusion.cache import Cache
from gradsift.bindings.diffusion.dataset import Dataset
from gradsift.bindings.diffusion.encoder import Encoder
from gradsift.bindings.diffusion.families import nested
from gradsift.bindings.diffusion.images import open_images
from gradsift.bindings.diffusion.pipelines import Pipeline, load
from gradsift.bindings.diffusion.workspace import Notes, Workspace
from gradsift.bindings.hush import hush
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.losses import Diffusion, NoiseSchedule

SPEC = gs.SketchSpec(dim=256)
RESOLUTION = 16


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every pipeline with a LoRA of its own, and pictures."""
    hush("diffusers")
    root = tmp_path_factory.mktemp("pipelines")
    for name, make in pipelines.FAMILIES.items():
        pipe = make()
        pipelines.save(pipe, root / name)
        pipelines.save_lora(pipe, root / f"{name}_lora")
    pipelines.save(pipelines.ddpm(4), root / "ddpm")
    pipelines.save_pictures(root / "data", 8)
    return root


def opened(site: Path, family: str) -> tuple[Pipeline, Dataset, Diffusion]:
    lora = None if family == "ddpm" else str(site / f"{family}_lora")
    pipeline = load(str(site / family), lora, device="cpu")
    images = Dataset(open_images(site / "data"), Encoder(pipeline, RESOLUTION))
    schedule = NoiseSchedule.of(pipeline.pipe.scheduler)
    return pipeline, images, Diffusion(schedule, measurements=2, predict=pipeline.family.predict)


class StoppedError(Exception):
    pass


class Stopping:
    """Batches that break off at one of them."""

    def __init__(self, batches: Any, at: int) -> None:
        self._batches, self._at = batches, at
        self.rows = batches.rows

    def __iter__(self) -> Any:
        for number, batch in enumerate(self._batches):
            if number == self._at:
                raise StoppedError
            yield batch


@pytest.mark.parametrize("family", list(pipelines.FAMILIES))
def test_extract_stop_resume_query_rescore(family: str, site: Path, tmp_path: Path) -> None:
    pipeline, images, loss = opened(site, family)
    notes = Notes(
        model=str(site / family),
        lora=str(site / f"{family}_lora"),
        data=str(site / "data"),
        encoders=images.encoder.fingerprint,
        resolution=RESOLUTION,
    )
    settings: dict[str, Any] = {"spec": SPEC, "block": 2, "curvature": 6, "progress": False, "notes": asdict(notes)}
    batches = images.batches(2)
    with pytest.raises(StoppedError):
        gs.extract(pipeline.denoiser, Stopping(batches, 2), loss, tmp_path / "a.zarr", **settings)
    store = gs.extract(pipeline.denoiser, batches, loss, tmp_path / "a.zarr", **settings)
    gs.extract(pipeline.denoiser, batches, loss, tmp_path / "b.zarr", **settings)
    for file in (path for path in (tmp_path / "b.zarr").rglob("*") if path.is_file()):
        assert (tmp_path / "a.zarr" / file.relative_to(tmp_path / "b.zarr")).read_bytes() == file.read_bytes(), file
    assert list(store.ids) == [f"{i:03}.png" for i in range(8)]

    space = Workspace(store, notes, "cpu")
    query = space.capture(space.own(["003.png"]))
    v = gs.gradient(space.model, space.fetch([3]), space.loss)
    rescorer = gs.Rescorer(space.model, lambda rows: [space.fetch(rows)], space.loss.token_losses, [v])
    top = gs.topk(store, query, k=2, scorer="cosine", rescore=rescorer)
    assert top.ids[0, 0] == "003.png"
    assert top.scores[0, 0] == pytest.approx(1.0, abs=2e-3)
    exact = gs.rescore(space.model, space.fetch(range(8)), space.loss.token_losses, v)
    gram = gs.Capture(space.model, gs.SketchSpec(kind="identity"))(space.fetch(range(8)), space.loss).values.double()
    assert exact.tokens.shape == (8, *space.fetch([0])["latents"].shape[2:])
    torch.testing.assert_close(exact.scores, gram @ gram[3], rtol=2e-3, atol=1e-3 * float((gram @ gram[3]).abs().max()))


@pytest.mark.parametrize("family", list(pipelines.FAMILIES))
def test_rows_are_gradients_of_the_training_loss(family: str, site: Path) -> None:
    """The loss as diffusers' training scripts write it, from the pipeline's own parts; the gradient by autograd."""
    pipeline, images, loss = opened(site, family)
    pipe, model = pipeline.pipe, pipeline.denoiser
    batch = images.fetch([5])
    parameters = parameters_of(model)
    total = torch.zeros(())
    for k in range(loss.measurements):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def spy(model: Any, noisy: Any, timesteps: Any, conditions: Any, seen: Any = seen) -> Any:
            seen.append((noisy, timesteps))
            out = pipeline.family.predict or (lambda m, x, t, c: m(x, t, **c))
            return out(model, noisy, timesteps, conditions)

        part = Diffusion.from_settings({**loss.settings, "part": k}, spy)
        part(model, batch)
        noisy, timesteps = seen[0]
        total = total + training_loss(pipe, family, batch, noisy, timesteps)
    expected = torch.autograd.grad(total, list(parameters.values()))
    got = gs.Capture(model, gs.SketchSpec(kind="identity"))(batch, loss)
    torch.testing.assert_close(got.loss[0], total.detach(), rtol=1e-5, atol=1e-6)
    flat = torch.cat([g.flatten() for g in expected])
    assert float((got.values[0] - flat).norm() / flat.norm()) < 1e-5


def training_loss(pipe: Any, family: str, batch: Any, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Mean squared error of one noisy image, as a training script has it."""
    clean, text = batch["latents"], batch["encoder_hidden_states"]
    if family in ("sd", "sdxl"):
        alpha = pipe.scheduler.alphas_cumprod[int(timesteps)]
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        more = {"added_cond_kwargs": batch["added_cond_kwargs"]} if family == "sdxl" else {}
        prediction = pipe.unet(noisy, timesteps, encoder_hidden_states=text, **more).sample
        return (prediction - noise).square().mean()
    sigma = timesteps / 1000
    noise = (noisy - (1 - sigma) * clean) / sigma
    if family == "sd3":
        prediction = pipe.transformer(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=text,
            pooled_projections=batch["pooled_projections"],
        ).sample
    else:
        size, factor = clean.shape[-1], pipe.vae_scale_factor
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, 1, 1, size, size),
            timestep=sigma,
            guidance=torch.ones(1),
            pooled_projections=batch["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=pipe._prepare_latent_image_ids(1, size // 2, size // 2, "cpu", torch.float32),
        ).sample
        prediction = pipe._unpack_latents(prediction, size * factor, size * factor, factor)
    return (prediction - (noise - clean)).square().mean()


def test_kohya_and_peft_files_load_as_the_same_lora(site: Path, tmp_path: Path) -> None:
    kohya = pipelines.save_kohya(pipelines.sd(), tmp_path / "kohya.safetensors")
    unet = get_peft_model(pipelines.sd().unet, LoraConfig(r=2, lora_alpha=4, target_modules=list(pipelines.TARGETS)))
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    unet.save_pretrained(tmp_path / "peft")
    loaded = [load(str(site / "sd"), lora, device="cpu") for lora in (str(site / "sd_lora"), kohya)]
    peft = load(str(site / "sd"), str(tmp_path / "peft"), device="cpu")
    assert [p.lora for p in (*loaded, peft)] == ["64 tensors in the unet"] * 3
    diffusers, kohyas = (parameters_of(p.denoiser) for p in loaded)
    assert diffusers.keys() == kohyas.keys() == parameters_of(peft.denoiser).keys()
    assert all(torch.equal(diffusers[name], kohyas[name]) for name in diffusers)
    for (name, parameter), (_, saved) in zip(
        parameters_of(peft.denoiser).items(), parameters_of(unet).items(), strict=True
    ):
        assert torch.equal(parameter, saved), name


def test_lora_on_convolutions_is_captured(site: Path, tmp_path: Path) -> None:
    pipelines.save_lora(pipelines.sd(), tmp_path / "conv", targets=["conv_in", "conv1", "proj_in", *pipelines.TARGETS])
    pipeline = load(str(site / "sd"), str(tmp_path / "conv"), device="cpu")
    images = Dataset(open_images(site / "data"), Encoder(pipeline, RESOLUTION))
    loss = Diffusion(NoiseSchedule.of(pipeline.pipe.scheduler), measurements=2)
    capture = gs.Capture(pipeline.denoiser, gs.SketchSpec(kind="identity"))
    assert {row.shape for row in capture.table} > {(2, 4, 3, 3), (8, 2, 1, 1)}
    rows = capture(images.fetch([0, 1, 2]), loss)
    v = gs.gradient(pipeline.denoiser, images.fetch([1]), loss)
    flat = torch.cat([v[row.name].flatten() for row in capture.table])
    torch.testing.assert_close(rows.values[1], flat, rtol=1e-4, atol=1e-5 * float(flat.norm()))


def altered(site: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    weights = load_file(site / "sd_lora" / "pytorch_lora_weights.safetensors")
    warnings.filterwarnings("ignore", message="While injecting the PEFT adapters", category=RuntimeWarning)
    path = tmp_path / "altered.safetensors"
    save_file(change(weights), path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: dict(list(w.items())[1:]), "does not fill the model: 1 LoRA tensors"),
        (
            lambda w: {k.replace("down_blocks.1", "down_blocks.0"): v for k, v in w.items()},
            "loads 48 of its 64 tensors",
        ),
        (lambda w: {f"base_model.{k}": v for k, v in w.items()}, "64 of its 64 tensors belong to no part"),
        (lambda w: {k: torch.cat([v, v], 1) if ".down." in k else v for k, v in w.items()}, "has shape"),
        (
            lambda w: {
                "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
                "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
                **w,
            },
            "loads 2 of its 66 tensors",
        ),
        (lambda w: {**w, "unet.mid_block.x.dora_scale": torch.ones(2)}, "is a DoRA"),
        (lambda w: {k.replace("unet.", "text_encoder."): v for k, v in w.items()}, "LoRA"),
    ],
    ids=["hole", "other layers", "no prefix", "other shapes", "two formats", "DoRA", "text encoder only"],
)
def test_a_lora_that_does_not_fit_is_refused(change: Any, sentence: str, site: Path, tmp_path: Path) -> None:
    path = altered(site, tmp_path, change)
    with pytest.raises(gs.DataError) as refusal:
        load(str(site / "sd"), path, device="cpu")
    assert sentence in str(refusal.value)
    assert path in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_lora_or_no_pipeline_are_named(site: Path, tmp_path: Path) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / "two" / f"{name}.safetensors")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "junk.safetensors"): "cannot be read",
        str(tmp_path / "two"): "holds 2 files (a.safetensors, b.safetensors)",
        str(tmp_path / "empty"): "no .safetensors file",
        str(tmp_path / "gone.safetensors"): "does not exist",
        str(site / "sd3_lora"): "belong to no part",
        str(site / "sdxl_lora"): "does not fit the model",
    }
    for lora, sentence in cases.items():
        with pytest.raises(gs.DataError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            load(str(site / "sd"), lora, device="cpu")
    index = json.loads((site / "sd" / "model_index.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "WanPipeline"}))
    for model, sentence in (
        (tmp_path / "other", "is a WanPipeline, expected one of StableDiffusionPipeline"),
        (site / "sd" / "unet", "holds one model, not a pipeline"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(gs.DataError, match=sentence):
            load(str(model), device="cpu")


def test_a_text_encoder_that_is_tuned_too_is_said(site: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipelines.sd()
    unet, text = pipelines.add_lora(pipe.unet), pipe.text_encoder
    text.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    torch.manual_seed(3)
    for name, parameter in text.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = [convert_state_dict_to_diffusers(get_peft_model_state_dict(m)) for m in (unet, text)]
    pipe.save_lora_weights(tmp_path / "both", unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1])
    with caplog.at_level(logging.WARNING, logger="gradsift"):
        both = load(str(site / "sd"), str(tmp_path / "both"), device="cpu")
    assert both.lora == "64 tensors in the unet, 4 in the text encoder"
    assert "is not attributed" in caplog.text
    alone = load(str(site / "sd"), str(site / "sd_lora"), device="cpu")
    encoded = [Encoder(p, RESOLUTION).text("a red square")["encoder_hidden_states"] for p in (both, alone)]
    assert not torch.allclose(*encoded)


def test_latents_and_encodings_are_those_of_the_pipeline(site: Path) -> None:
    pipeline, images, _ = opened(site, "sdxl")
    pipe, batch = pipeline.pipe, images.fetch([2])
    pixels = torch.from_numpy(images.picture(2).pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        text, _, pooled, _ = pipe.encode_prompt(pipelines.caption(2), device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(batch["latents"], latents)
    torch.testing.assert_close(batch["encoder_hidden_states"], text)
    torch.testing.assert_close(batch["added_cond_kwargs"]["text_embeds"], pooled)
    assert batch["added_cond_kwargs"]["time_ids"].tolist() == [[24, 24, 0, 0, 16, 16]]


def test_latents_are_made_once_and_again_when_anything_changed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(pipelines.save_pictures(tmp_path / "data", 3))
    made: list[int] = []
    pipeline = load(str(site / "sd"), device="cpu")
    encode = type(pipeline.vae).encode
    monkeypatch.setattr(type(pipeline.vae), "encode", lambda *a, **k: made.append(1) or encode(*a, **k))

    def read(model: Pipeline, resolution: int = RESOLUTION) -> tuple[int, Dataset]:
        made.clear()
        images = Dataset(open_images(data), Encoder(model, resolution, tmp_path / "cache"))
        return len(made), images

    count, images = read(pipeline)
    assert count == 3
    first = images.fetch([0, 1, 2])["latents"]
    count, images = read(pipeline)
    assert count == 0
    assert torch.equal(images.fetch([0, 1, 2])["latents"], first)
    pipelines.picture(7).save(data / "001.png")
    assert read(pipeline)[0] == 1
    assert read(pipeline, 8)[0] == 3
    with torch.no_grad():
        next(pipeline.vae.parameters()).add_(0.1)
    assert read(pipeline, 8)[0] == 3
    kept = list((tmp_path / "cache").rglob("*.safetensors"))
    assert sum(len(load_file(file)) for file in kept) == 3 + 3  # nothing stale is left beside the prompts
    for file in kept:
        file.write_bytes(file.read_bytes()[:10])
    assert read(pipeline, 8)[0] == 3


def test_the_cache_keeps_what_it_wrote(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for i in range(40):
        cache.get(bytes([i]) * 16, lambda i=i: {"a.b": torch.full((2,), float(i))})
    cache.flush()
    again = Cache(tmp_path / "cache")

    def never() -> dict[str, torch.Tensor]:
        raise AssertionError

    for i in range(40):
        assert again.get(bytes([i]) * 16, never)["a.b"].tolist() == [i, i]
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_class_labels_come_from_a_column(site: Path, tmp_path: Path) -> None:
    lines = []
    for i in range(4):
        pipelines.picture(i, 8).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "label": i}) + "\n")
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    pipeline = load(str(site / "ddpm"), device="cpu")
    images = Dataset(open_images(tmp_path), Encoder(pipeline))
    batch = images.fetch(range(4))
    assert batch["class_labels"].tolist() == [0, 1, 2, 3]
    assert batch["latents"].shape == (4, 1, 8, 8)
    assert float(batch["latents"].min()) >= -1
    loss = Diffusion(NoiseSchedule.of(pipeline.pipe.scheduler), measurements=2)
    rows = gs.Capture(pipeline.denoiser, SPEC, "*.to_q")(batch, loss)
    assert bool((rows.grad_norm > 0).all())
    lines[2] = json.dumps({"file_name": "2.png", "label": 9}) + "\n"
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    with pytest.raises(gs.DataError, match=r"image '2\.png' has label 9, expected 0 to 3"):
        Dataset(open_images(tmp_path), Encoder(pipeline))


def test_an_id_that_comes_twice_is_that_of_the_image_that_was_kept(site: Path, tmp_path: Path) -> None:
    """Also for whoever looks it up without having checked the data; other columns stay with their image."""
    (tmp_path / "torn.png").write_bytes(b"not an image")
    for i in range(3):
        pipelines.picture(i, 8).save(tmp_path / f"{i}.png")
    named = [("a", "torn", 0), ("b", "0", 0), ("a", "1", 1), ("b", "2", 2)]
    lines = [{"id": name, "image": f"{file}.png", "label": label, "style": f"s{label}"} for name, file, label in named]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = Encoder(load(str(site / "ddpm"), device="cpu"))
    images = Dataset(open_images(data), encoder, skip_bad=True)
    assert [images.record(i) for i in range(len(images))] == [{"id": "b", "label": 0, "style": "s0"}]
    later = Dataset(open_images(data), encoder, check=False)
    assert [later.record(i)["label"] for i in later.find(["b"])] == [0]


def test_names_with_a_dot_become_mappings() -> None:
    one = np.ones(1)
    assert nested({"a": one, "b.c": one, "b.d": one}) == {"a": one, "b": {"c": one, "d": one}}
