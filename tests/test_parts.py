"""A loss that keeps its measurements apart: a row, a norm and a scale of each, from capture to a resumed store."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from denoisers import MAPS, SPEC, batches, ddpm_loss, diffusion_extract, images, take, tiny_unet
from killable import INSTANTS, run
from rich.console import Console
from torch import Tensor
from toy import toy_extract, tree

import gradsift as gs
from gradsift.bindings.describe import describe, print_info
from gradsift.engine.losses import Diffusion
from gradsift.engine.store.ids import seed_of
from gradsift.kernels.errors import StoreError

K = 3
N = 12


def everything() -> dict[str, Any]:
    return batches((N,))[0]


def rows_of(loss: Any, batch: Any, spec: gs.SketchSpec = SPEC) -> Any:
    return gs.Capture(tiny_unet(), spec, modules=MAPS)(batch, loss)


def test_parts_are_single_captures_and_sum_to_the_whole() -> None:
    batch = images(4)
    loss = ddpm_loss(measurements=K, parts=True)
    apart = rows_of(loss, batch).fold(K)
    scale = float(apart.values.abs().max())
    for k in range(K):
        alone = rows_of(loss.part(k), batch)
        assert float((apart.values[:, k] - alone.values).abs().max()) <= 1e-5 * scale
        torch.testing.assert_close(apart.grad_norm[:, k], alone.grad_norm, rtol=1e-5, atol=0)
    whole = rows_of(ddpm_loss(measurements=K), batch)
    assert float((apart.values.sum(dim=1) - whole.values).abs().max()) <= 1e-5 * scale
    torch.testing.assert_close(apart.loss, whole.loss)


@pytest.mark.parametrize("parts", [False, True])
def test_rows_and_norms_are_autograds(parts: bool) -> None:
    model, batch = tiny_unet(), images(2)
    loss = ddpm_loss(measurements=K, parts=parts)
    capture = gs.Capture(model, gs.SketchSpec(kind="identity"), modules=MAPS)
    found = capture(batch, loss)
    weights = [model.get_parameter(row.name) for row in capture.table]
    for i in range(2):
        losses = loss(model, take(batch, [i]))
        for j, one in enumerate(losses):
            slopes = torch.autograd.grad(one, weights, retain_graph=True)
            expected = torch.cat([slope.flatten() for slope in slopes])
            row = i * len(losses) + j
            assert float((found.values[row] - expected).norm()) <= 1e-5 * float(expected.norm())
            assert float(found.grad_norm[row]) == pytest.approx(float(expected.norm()), rel=1e-5)


def test_a_store_holds_what_capture_gives(tmp_path: Path) -> None:
    store = diffusion_extract(tmp_path / "s.zarr")
    expected = rows_of(ddpm_loss(measurements=K, parts=True), everything()).fold(K)
    scale = float(expected.values.abs().max())
    assert store.features.shape == (N, K, SPEC.dim)
    np.testing.assert_allclose(store.features[:], expected.values, atol=1e-5 * scale)
    np.testing.assert_allclose(store.grad_norm, expected.grad_norm, rtol=1e-5)
    np.testing.assert_allclose(store.loss, expected.loss, rtol=1e-5)
    assert store.grad_norm.shape == (N, K)
    assert [part["timestep"] for part in store.parts] == [166, 500, 833]
    assert {part["dim"] for part in store.parts} == {SPEC.dim}
    streamed = list(store.blocks())
    assert [start for start, _ in streamed] == [0, 5, 10]
    np.testing.assert_array_equal(torch.cat([rows for _, rows in streamed]), store.features[:])
    np.testing.assert_array_equal(zarr.open(tmp_path / "s.zarr")["features"][:], store.features[:])
    store.verify()


def test_the_curvature_sample_has_the_parts_of_the_rows(tmp_path: Path) -> None:
    store = diffusion_extract(tmp_path / "s.zarr")
    sample, draws, data = store.curvature, store.curvature_draws, everything()
    assert sample is not None
    assert sample.shape == (9, K, SPEC.dim)
    loss = ddpm_loss(measurements=K, parts=True)
    seeds = [seed_of(SPEC.seed, name, draw) for name, draw in draws]
    chosen = take(data, [data["ids"].index(name) for name, _ in draws])
    expected = rows_of(loss, loss.sampled_batch(tiny_unet(), chosen, seeds)).fold(K).values
    np.testing.assert_allclose(sample, expected, atol=1e-5 * float(expected.abs().max()))


def test_summed_parts_are_the_store_of_the_summed_loss(tmp_path: Path) -> None:
    apart = diffusion_extract(tmp_path / "apart.zarr")
    whole = diffusion_extract(tmp_path / "whole.zarr", loss_fn=ddpm_loss(measurements=K))
    scale = float(np.abs(whole.features[:]).max())
    assert whole.features.shape == (N, SPEC.dim)
    np.testing.assert_allclose(apart.features[:].sum(axis=1), whole.features[:], atol=1e-5 * scale)
    np.testing.assert_allclose(apart.loss, whole.loss, rtol=1e-5)
    assert apart.curvature is not None
    assert whole.curvature is not None
    scale = float(whole.curvature.abs().max())
    np.testing.assert_allclose(apart.curvature.sum(dim=1), whole.curvature, atol=1e-5 * scale)
    assert len(whole.parts) == 1


class Loud(Diffusion):
    """One part a million times louder than the others."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        losses = super().__call__(model, batch).unflatten(0, (-1, K))
        return (losses * torch.tensor([1.0, 1e-6, 1.0])).flatten()


def test_half_precision_has_a_scale_for_every_row_and_part(tmp_path: Path) -> None:
    loss = Loud(ddpm_loss().schedule, K, parts=True)
    wide, half = (
        diffusion_extract(tmp_path / f"{dtype}.zarr", loss_fn=loss, dtype=dtype) for dtype in ("float32", "float16")
    )
    assert zarr.open(half.path)["scale"].shape == (N, K)
    for k in range(K):
        error = np.abs(half.features[:, k] - wide.features[:, k]).max(axis=1)
        assert (error <= 2.0**-11 * np.abs(wide.features[:, k]).max(axis=1)).all()
    assert half.curvature is not None
    assert half.curvature.shape == (9, K, SPEC.dim)
    half.verify()


def test_one_measurement_kept_apart_is_a_plain_store(tmp_path: Path) -> None:
    store = diffusion_extract(tmp_path / "s.zarr", loss_fn=ddpm_loss(measurements=1, parts=True))
    assert store.features.shape == (N, SPEC.dim)
    assert store.grad_norm.shape == (N,)
    assert [part["timestep"] for part in store.parts] == [500]


def test_the_store_says_how_to_measure_again(tmp_path: Path) -> None:
    loss = ddpm_loss(measurements=2, noise="per_example", weighting="min_snr", parts=True)
    store = diffusion_extract(tmp_path / "s.zarr", loss_fn=loss)
    again = Diffusion.from_settings(gs.FeatureStore.open(store.path).metadata["loss"]["settings"])
    assert again.kind == loss.kind == store.metadata["loss"]["kind"]
    query = rows_of(again, take(everything(), [7]))
    assert query.loss_kind == store.metadata["loss"]["kind"]
    error = float((query.fold(2).values[0] - torch.from_numpy(store.features[7])).abs().max())
    assert error <= 1e-5 * float(np.abs(store.features[7]).max())
    assert toy_extract(tmp_path / "toy.zarr").metadata["loss"]["settings"] is None


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 1}, "the loss was .*noises of seed 0.* and is now .*noises of seed 1"),
        ({"noise": "per_example"}, "the loss was .*3 shared noises .* and is now .*3 noises per example"),
        ({"parts": False}, "the loss was .*kept apart and is now"),
        ({"timesteps": "cubic"}, "the loss was .*stratified timesteps.* and is now .*cubic timesteps"),
    ],
)
def test_another_measurement_does_not_continue_a_store(tmp_path: Path, other: dict[str, Any], text: str) -> None:
    diffusion_extract(tmp_path / "s.zarr", curvature=0)
    with pytest.raises(StoreError, match=text):
        diffusion_extract(
            tmp_path / "s.zarr", curvature=0, loss_fn=ddpm_loss(**{"measurements": K, "parts": True} | other)
        )


class Renamed(Diffusion):
    """Says of its parts something else under the same kind."""

    @property
    def parts(self) -> tuple[dict[str, Any], ...]:
        return tuple({"timestep": -1} for _ in range(K))


def test_other_parts_do_not_continue_a_store(tmp_path: Path) -> None:
    diffusion_extract(tmp_path / "s.zarr", curvature=0)
    with pytest.raises(StoreError, match=r"part 0 was .*166.* and is now .*-1"):
        diffusion_extract(tmp_path / "s.zarr", curvature=0, loss_fn=Renamed(ddpm_loss().schedule, K, parts=True))


def test_info_names_the_parts(tmp_path: Path) -> None:
    store = diffusion_extract(tmp_path / "s.zarr", curvature=0)
    shown = io.StringIO()
    print_info(Console(width=200, file=shown), store, verified=False)
    assert all(f"gradient norm at timestep {t}" in shown.getvalue() for t in (166, 500, 833))
    found = describe(store)
    assert [part["timestep"] for part in found["parts"]] == [166, 500, 833]
    np.testing.assert_allclose([part["grad_norm"][1] for part in found["parts"]], np.median(store.grad_norm, axis=0))
    assert found["grad_norm"] is None


def _in_turn(folder: Path) -> None:
    """One process that imports everything once and forks for every run: three are killed, the last gets through."""

    def forked(*arguments: Any) -> int:
        child = os.fork()
        if child == 0:
            try:
                run(*arguments, extract=diffusion_extract)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    ends = [forked(folder / "whole.zarr", None, 0, folder / "renames")]
    renames = int((folder / "renames").read_text())
    for instant, share in zip(INSTANTS, (6, 5, 4), strict=True):
        ends.append(forked(folder / "killed.zarr", instant, renames // share))
    ends.append(forked(folder / "killed.zarr"))
    (folder / "ends").write_text(json.dumps(ends))


def test_killed_and_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_in_turn, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert json.loads((tmp_path / "ends").read_text()) == [0, *[-signal.SIGKILL] * 3, 0]
    whole, found = tree(tmp_path / "whole.zarr"), tree(tmp_path / "killed.zarr")
    assert sorted(found) == sorted(whole)
    assert [name for name in found if found[name] != whole[name]] == []
    gs.FeatureStore.open(tmp_path / "killed.zarr").verify()
