"""Extraction: the right rows for any batches, a resumed run like an uninterrupted one, and refusals that say why."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from toy import CLASSES, ROWS, SIZES, SPEC, ToyLoss, expected, toy_batches, toy_extract, toy_model, tree

import gradsift as gs
from gradsift.engine.extraction.curvature_plan import MOST_DRAWS, CurvaturePlan
from gradsift.engine.extraction.fingerprints import adapter_fingerprint, batch_hash, model_fingerprint
from gradsift.engine.extraction.progress import Update, left, reporting, speed
from gradsift.engine.store import block_writer, columns
from gradsift.engine.store.ids import SeenIds, seed_of


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class StopError(Exception):
    pass


class StoppingLoss(ToyLoss):
    """Fails on its n-th call."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        self._count()
        return super().__call__(model, batch)

    def sampled(self, model: nn.Module, batch: Any, seeds: Any) -> Any:
        self._count()
        return super().sampled(model, batch, seeds)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError


def stopped(path: Path, after: int, **settings: Any) -> None:
    with pytest.raises(StopError):
        toy_extract(path, loss_fn=StoppingLoss(after), **settings)


# The right rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4, 8, 40, 64, None])
def test_any_block_size_holds_the_same_rows(tmp_path: Path, block: int | None) -> None:
    store = toy_extract(tmp_path / "a.zarr", block=block, curvature=0)
    np.testing.assert_array_equal(store.features[:], expected())
    np.testing.assert_array_equal(store.loss_tokens, np.concatenate([b["y"] + 1 for b in toy_batches()]))


def test_data_loader_with_row_numbers(tmp_path: Path) -> None:
    x, y = torch.randn(10, 8), torch.arange(10) % CLASSES
    data = [{"x": x[i], "y": y[i]} for i in range(10)]
    store = toy_extract(tmp_path / "a.zarr", DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    assert list(store.ids) == list(range(10))
    np.testing.assert_array_equal(store.features[:4], expected([{"x": x[:4], "y": y[:4]}]))


def test_lora_language_model_with_packed_batches(tmp_path: Path) -> None:
    from models import llama, padded_batch, with_lora

    model = with_lora(llama())
    padded = padded_batch(4)
    lengths = padded["attention_mask"].sum(1)
    packed = {
        "input_ids": padded["input_ids"][padded["attention_mask"] == 1][None],
        "segments": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]),
        "ids": list("abcd"),
    }
    loader = [{**padded, "ids": list("wxyz")}, packed]
    store = gs.extract(model, loader, gs.losses.language_model, tmp_path / "a.zarr", spec=SPEC, curvature=24)
    assert store.metadata["loss"]["kind"] == "language_model"
    np.testing.assert_allclose(store.features[:4], store.features[4:], rtol=1e-4, atol=1e-5)
    assert store.loss_tokens is not None
    assert store.loss_tokens.tolist() == (lengths - 1).tolist() * 2
    assert store.curvature is not None and store.curvature.shape == (24, SPEC.dim)
    assert store.table[0].name == "model.layers.0.self_attn.q_proj.lora_A.weight"


def test_model_is_left_as_found(tmp_path: Path) -> None:
    model = toy_model().train()
    model[0].eval()
    before = [module.training for module in model.modules()]
    store = toy_extract(tmp_path / "a.zarr", model=model)
    assert [module.training for module in model.modules()] == before
    np.testing.assert_array_equal(store.features[:], expected())  # dropout was off
    with pytest.raises(StopError):
        toy_extract(tmp_path / "b.zarr", model=model, loss_fn=StoppingLoss(3))
    assert [module.training for module in model.modules()] == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_loss_that_is_only_a_function(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def plain(model: nn.Module, batch: Any) -> torch.Tensor:
        return ToyLoss()(model, batch)

    store = toy_extract(tmp_path / "a.zarr", loss_fn=plain)
    assert store.curvature is None and store.loss_tokens is None
    assert "has no curvature sample" in caplog.text
    np.testing.assert_array_equal(store.features[:], expected())
    store.verify()


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 5, 8, 11, 13])
def test_resumed_store_is_byte_identical(tmp_path: Path, after: int) -> None:
    toy_extract(tmp_path / "whole.zarr")
    stopped(tmp_path / "parts.zarr", after)
    rows = len(gs.FeatureStore.open(tmp_path / "parts.zarr", unfinished=True))
    with pytest.raises(gs.StoreError, match=f"is unfinished, {rows} rows are there: run the same extract command"):
        gs.FeatureStore.open(tmp_path / "parts.zarr")
    toy_extract(tmp_path / "parts.zarr")
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


def test_only_missing_blocks_are_computed(tmp_path: Path) -> None:
    toy_extract(tmp_path / "whole.zarr")
    stopped(tmp_path / "a.zarr", 7)  # the first call is the leak probe's as well
    seen: list[Update] = []
    toy_extract(tmp_path / "a.zarr", progress=seen.append)
    examples = [u for u in seen if u.stage == "examples"]
    assert 0 < examples[-1].computed < ROWS == examples[-1].rows == examples[-1].total
    shutil.rmtree(tmp_path / "a.zarr/blocks")
    (tmp_path / "a.zarr/features/c.1.0.0").unlink()
    toy_extract(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "whole.zarr")


def test_finished_store_is_left_alone(tmp_path: Path) -> None:
    toy_extract(tmp_path / "a.zarr")
    before = tree(tmp_path / "a.zarr")
    store = toy_extract(tmp_path / "a.zarr", loss_fn=StoppingLoss(0))
    assert store.complete and tree(tmp_path / "a.zarr") == before


def test_leftovers_are_removed(tmp_path: Path) -> None:
    toy_extract(tmp_path / "whole.zarr")
    stopped(tmp_path / "a.zarr", 6)
    (tmp_path / "a.zarr/features/c.7.0.0.tmp").write_bytes(b"half")
    (tmp_path / "a.zarr/features/c.3.0.0").write_bytes(b"no marker")
    toy_extract(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "whole.zarr")


def _other_weight(index: int) -> nn.Module:
    model = toy_model()
    with torch.no_grad():
        list(model.parameters())[index][0] += 1
    return model


class OtherLoss(ToyLoss):
    kind = "other"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"spec": gs.SketchSpec(dim=64, seed=4)}, "the sketch was segment of dim 64, seed 3 and is now .* seed 4"),
        ({"modules": "0"}, "the captured parameters differ: it lacks 3.weight"),
        ({"loss_fn": OtherLoss()}, "the loss was toy and is now other"),
        ({"dtype": "float16"}, "dtype was float32 and is now float16"),
        ({"block": 16}, "block was 8 and is now 16"),
        ({"curvature": 7}, "the number of curvature rows was 50 and is now 7"),
        ({"model": _other_weight(0)}, "the adapter's fingerprint was .* and is now"),
        ({"model": _other_weight(1)}, "the base model's fingerprint was .* and is now"),
        ({"batches": toy_batches(ids=None)}, "the ids' type was string and is now int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(tmp_path: Path, other: dict[str, Any], words: str, finished: bool) -> None:
    if finished:
        toy_extract(tmp_path / "a.zarr")
    else:
        stopped(tmp_path / "a.zarr", 6)
    before = tree(tmp_path / "a.zarr")
    with pytest.raises(gs.StoreError, match=f"was begun with other settings: {words}"):
        toy_extract(tmp_path / "a.zarr", **other)
    assert tree(tmp_path / "a.zarr") == before


def test_block_follows_the_store(tmp_path: Path) -> None:
    stopped(tmp_path / "a.zarr", 6)
    assert toy_extract(tmp_path / "a.zarr", block=None).metadata["block"] == 8


def _changed(how: str) -> list[dict[str, Any]]:
    batches = toy_batches()
    if how == "value":
        batches[1]["x"][2, 3] += 1e-6
    elif how == "id":
        batches[1]["ids"][0] = "renamed"
    elif how == "order":
        batches[1], batches[2] = batches[2], batches[1]
    elif how == "split":
        return toy_batches((5, 3, 4, 4, 6, 3, 9, 1, 5))
    elif how == "shorter":
        return batches[:2]
    return batches


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("value", r"batch 1 \(rows 5 to 11\) is not what"),
        ("id", r"batch 1 \(rows 5 to 11\) is not what"),
        ("order", r"batch 1 \(rows 5 to 11\) is not what"),
        ("split", r"batch 1 \(rows 5 to 11\) is not what"),
        ("shorter", "the data ends after 12 examples but .* was begun with more"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_changed_data_is_refused(tmp_path: Path, how: str, words: str, finished: bool) -> None:
    if finished:
        toy_extract(tmp_path / "a.zarr")
    else:
        stopped(tmp_path / "a.zarr", 6)
    before = tree(tmp_path / "a.zarr")
    with pytest.raises(gs.StoreError, match=words):
        toy_extract(tmp_path / "a.zarr", _changed(how))
    assert tree(tmp_path / "a.zarr") == before
    toy_extract(tmp_path / "a.zarr")


@pytest.mark.parametrize("block", [8, 9])
def test_more_data_than_a_finished_store_holds_is_refused(tmp_path: Path, block: int) -> None:
    toy_extract(tmp_path / "a.zarr", block=block)
    before = tree(tmp_path / "a.zarr")
    with pytest.raises(gs.StoreError, match="was made from 40 examples and the data has more"):
        toy_extract(tmp_path / "a.zarr", toy_batches((*SIZES, 3)), block=block)
    assert tree(tmp_path / "a.zarr") == before


def test_other_versions_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stopped(tmp_path / "a.zarr", 6)
    text = (tmp_path / "a.zarr/zarr.json").read_text()
    (tmp_path / "a.zarr/zarr.json").write_text(text.replace(torch.__version__, "1.0"))
    toy_extract(tmp_path / "a.zarr")
    assert "new rows may differ in their last bits" in caplog.text


# Refusals ------------------------------------------------------------------------------------------------------------


def test_foreign_and_unwritable_paths(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(gs.StoreError, match=r"no gradsift store \(notes.txt\)"):
        toy_extract(tmp_path)
    with pytest.raises(gs.StoreError, match="is not a folder"):
        toy_extract(tmp_path / "notes.txt")
    with pytest.raises(gs.StoreError, match="is not a folder"):
        toy_extract(tmp_path / "notes.txt" / "a.zarr")
    with pytest.raises(gs.StoreError, match=r"/proc/a.zarr cannot be written \(.*; nothing was written\)"):
        toy_extract(Path("/proc/a.zarr"))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, parts: Any) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(columns, "write_beside", refuse)
    with pytest.raises(gs.StoreError, match=r"cannot be written .Read-only file system; nothing was"):
        toy_extract(tmp_path / "a.zarr")


@pytest.mark.parametrize("writes", [3, 30, 70])
def test_disk_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    toy_extract(tmp_path / "whole.zarr")
    budget = iter(range(writes))
    real = columns.write_beside

    def full(path: Path, parts: Any) -> Path:
        if next(budget, None) is None:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(columns, "write_beside", full)
        patch.setattr(block_writer, "write_beside", full)
        with pytest.raises(gs.StoreError, match=r"the disk is full while writing .* free some space"):
            toy_extract(tmp_path / "a.zarr")
    toy_extract(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "whole.zarr")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    done = mounted and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not done or done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_really_full_disk(small_disk: Path, tmp_path: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(880 << 10))
    with pytest.raises(gs.StoreError, match=r"the disk is full while writing .*the \d+ rows before are safe"):
        toy_extract(small_disk / "a.zarr", curvature=0, dtype="float32", spec=gs.SketchSpec(dim=256))
    assert not list(small_disk.rglob("*.tmp"))
    ballast.unlink()
    toy_extract(small_disk / "a.zarr", curvature=0, spec=gs.SketchSpec(dim=256))
    toy_extract(tmp_path / "whole.zarr", curvature=0, spec=gs.SketchSpec(dim=256))
    assert tree(small_disk / "a.zarr") == tree(tmp_path / "whole.zarr")


def test_two_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(gs.StoreError, match="another process is writing"):
        toy_extract(path)
    os.close(descriptor)
    toy_extract(path)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_names_the_example(tmp_path: Path, what: str) -> None:
    class Broken(ToyLoss):
        def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
            loss = super().__call__(model, batch)
            bad = torch.tensor([name == "é17" for name in batch["ids"]])
            if what == "loss":
                return torch.where(bad, float("nan"), loss)
            steep = [torch.sqrt(x - x.detach()) if b else 0 * x for x, b in zip(loss, bad, strict=True)]
            return loss + torch.stack(steep)

    words = "a loss of nan" if what == "loss" else "a gradient that is not finite"
    with pytest.raises(gs.DataError, match=f"example 'é17' has {words}: repair it"):
        toy_extract(tmp_path / "a.zarr", loss_fn=Broken())
    assert len(gs.FeatureStore.open(tmp_path / "a.zarr", unfinished=True)) == 16
    toy_extract(tmp_path / "b.zarr")
    toy_extract(tmp_path / "a.zarr")
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


@pytest.mark.parametrize(("batch", "row"), [(0, 1), (0, 4), (3, 2), (7, 0)])
def test_duplicate_ids_are_refused(tmp_path: Path, batch: int, row: int) -> None:
    batches = toy_batches()
    batches[batch]["ids"][row] = "é0"
    with pytest.raises(gs.DataError, match="id 'é0' comes twice"):
        toy_extract(tmp_path / "a.zarr", batches)
    with pytest.raises(gs.DataError, match="id 'é0' comes twice"):
        toy_extract(tmp_path / "a.zarr", batches)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a"] * 4, "a batch has 4 ids but the loss gave 5 examples"),
        ([1.5] * 5, "id 1.5 is a float, expected text or an integer"),
        ([True] * 5, "id True is a bool"),
        ([1 << 63, 1, 2, 3, 4], "does not fit a 64-bit integer"),
        (["\ud800", *"abcd"], "half a surrogate pair"),
        (["a", 1, 2, 3, 4], "ids are text in some examples and integers"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, ids: list[Any], words: str) -> None:
    batches = toy_batches()
    batches[0]["ids"] = ids
    with pytest.raises(gs.DataError, match=words):
        toy_extract(tmp_path / "a.zarr", batches)


def test_ids_missing_in_some_batches(tmp_path: Path) -> None:
    batches = toy_batches()
    del batches[3]["ids"]
    with pytest.raises(gs.DataError, match="integers or missing in others"):
        toy_extract(tmp_path / "a.zarr", batches)


def test_shuffling_loaders(tmp_path: Path) -> None:
    x = torch.randn(10, 8)
    data: Any = [{"x": x[i], "y": torch.tensor(i % CLASSES)} for i in range(10)]
    with pytest.raises(gs.DataError, match="the loader shuffles and its batches have no ids"):
        toy_extract(tmp_path / "a.zarr", DataLoader(data, batch_size=4, shuffle=True))
    named: Any = [{**item, "ids": i} for i, item in enumerate(data)]
    loader = DataLoader(named, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(1))
    store = toy_extract(tmp_path / "b.zarr", loader)
    assert sorted(store.ids) == list(range(10))
    row = list(store.ids).index(7)
    alone = expected([{"x": x[7:8], "y": torch.tensor([7 % CLASSES])}])[0]
    np.testing.assert_allclose(store.features[row], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(gs.StoreError, match="the loader shuffles, so a stopped extraction cannot go on"):
        toy_extract(tmp_path / "b.zarr", loader)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (iter(toy_batches()), "which can be read only once"),
        ([], "the loader gave no batch"),
        ([torch.ones(2)], "the loader gave a Tensor, expected batches that are mappings"),
        ([{**toy_batches()[0], "image": object()}], r"batch\['image'\] is a object, whose content cannot be compared"),
    ],
)
def test_bad_loaders_are_refused(tmp_path: Path, batches: Any, words: str) -> None:
    with pytest.raises(gs.DataError, match=words):
        toy_extract(tmp_path / "a.zarr", batches)


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(gs.StoreError, match="dtype is 'int8', expected"):
        toy_extract(tmp_path / "a.zarr", dtype="int8")
    with pytest.raises(gs.StoreError, match="block is 0"):
        toy_extract(tmp_path / "a.zarr", block=0)


# The curvature sample ------------------------------------------------------------------------------------------------


def test_curvature_rows_are_gradients_of_sampled_labels(tmp_path: Path) -> None:
    store = toy_extract(tmp_path / "a.zarr", curvature=50)
    assert store.curvature is not None
    group: Any = __import__("zarr").open(tmp_path / "a.zarr", mode="r")
    ids, draws = group["curvature/ids"][:], group["curvature/draw"][:]
    assert len(set(zip(ids.tolist(), draws.tolist(), strict=True))) == len(store.curvature) == 50
    rows = {name: (batch, i) for batch in toy_batches() for i, name in enumerate(batch["ids"])}
    capture = gs.Capture(toy_model().eval(), SPEC, modules="*")
    for row, (name, draw) in enumerate(zip(ids.tolist(), draws.tolist(), strict=True)):
        batch, i = rows[name]
        seeds = [seed_of(SPEC.seed, name, draw)]
        one = {"x": batch["x"][i : i + 1], "y": batch["y"][i : i + 1]}
        alone = capture(one, lambda model, b, seeds=seeds: ToyLoss().sampled(model, b, seeds)).values[0]
        np.testing.assert_allclose(store.curvature[row].numpy(), alone.numpy(), rtol=1e-4, atol=1e-5)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=60),
    wanted=st.integers(1, 600),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None)
def test_plan_gives_the_wanted_rows(sizes: list[int], wanted: int, seed: int) -> None:
    plan = CurvaturePlan(wanted, seed)
    for number, n in enumerate(sizes):
        plan.add(number, n)
    draws = plan.finish()
    assert sum(d.full * d.rows + d.extra for d in draws.values()) == min(wanted, MOST_DRAWS * sum(sizes))
    assert list(draws) == sorted(draws)
    assert len({d.full for d in draws.values()}) == 1
    for number, d in draws.items():
        assert d.rows == sizes[number] and d.first == sum(sizes[:number]) and 0 <= d.extra <= d.rows


def test_plan_is_spread_evenly() -> None:
    """Between chosen batches there are never more than a few times the mean gap, and memory is the sample's."""
    plan = CurvaturePlan(1000, seed=0)
    for number in range(100_000):
        plan.add(number, 8)
    gaps = np.diff(list(plan.finish()))
    assert len(gaps) == 124 and gaps.max() <= 3 * 800
    assert len(plan._heap) == 125


def test_loader_that_ends_early_the_second_time(tmp_path: Path) -> None:
    class Tiring:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter(toy_batches()[: 8 if self.passes == 1 else 3])

    with pytest.raises(gs.DataError, match="fewer batches the second time"):
        toy_extract(tmp_path / "a.zarr", Tiring())
    with pytest.raises(gs.StoreError, match="unfinished, 40 rows"):
        gs.FeatureStore.open(tmp_path / "a.zarr")


# Pieces --------------------------------------------------------------------------------------------------------------

scalars = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4) | st.binary(max_size=4)
values = st.recursive(
    st.none() | scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(values, values)
@settings(max_examples=60, deadline=None)
def test_batch_hash_tells_values_apart(a: Any, b: Any) -> None:
    assert batch_hash({"a": a}) == batch_hash({"a": a})
    assert (batch_hash({"v": a}) == batch_hash({"v": b})) == (repr(a) == repr(b) or _same(a, b))


def _same(a: Any, b: Any) -> bool:
    """Equal in type and value, dictionaries in any order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return repr(a) == repr(b)


def test_batch_hash_of_tensors() -> None:
    x = torch.arange(6.0)
    base = batch_hash({"x": x, "y": [1, 2]})
    assert batch_hash({"y": [1, 2], "x": x.clone()}) == base
    assert batch_hash({"y": [1, 2], "x": x.numpy()}) == base
    assert batch_hash({"y": [1, 2], "x": torch.stack([x, x], 1)[:, 0]}) == base
    for other in (x.double(), x.reshape(2, 3), x.bfloat16(), x + 1, x.tolist()):
        assert batch_hash({"x": other, "y": [1, 2]}) != base


def test_fingerprints() -> None:
    model = toy_model()
    captured = {"0.weight": model[0].weight}
    base = model_fingerprint(model, list(captured.values()))
    adapter = adapter_fingerprint(captured)
    assert model_fingerprint(nn.parallel.DataParallel(model), list(captured.values())) == base
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert model_fingerprint(model, list(captured.values())) == base
    assert adapter_fingerprint(captured) != adapter
    with torch.no_grad():
        model[3].bias[0] += 1
    assert model_fingerprint(model, list(captured.values())) != base


@given(st.lists(st.integers(0, 40).map(str) | st.text(max_size=2), max_size=60), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_seen_ids_is_a_set(ids: list[str], step: int) -> None:
    seen = SeenIds(lambda n: ids[:n])
    seen._RUN = 4
    unique = len(set(ids)) == len(ids)
    try:
        for start in range(0, len(ids), step):
            seen.add(ids[start : start + step])
    except gs.DataError:
        assert not unique
    else:
        assert unique


def test_seen_ids_memory() -> None:
    """8 bytes an id, however they come."""
    seen = SeenIds(lambda n: [])
    for start in range(0, 100_000, 50):
        seen.add(list(range(start * 7, (start + 50) * 7, 7)))
    assert sum(run.nbytes for run in seen._runs) + 8 * len(seen._fresh) == 800_000
    assert len(seen._runs) < 8 and len(seen._fresh) < 4096 + 50


def test_progress_texts() -> None:
    update = Update("examples", 50, 100, 20, 4000, 10.0)
    assert speed(update) == "2 examples/s, 400 tokens/s"
    assert left(update) == "0:00:25 left"
    assert speed(Update("examples", 50, None, 0, 0, 1.0)) == left(Update("examples", 5, None, 1, 0, 1.0)) == ""


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with reporting(True) as report:
        report(Update("examples", 1, None, 1, 10, 0.5))
        report(Update("examples", 40, 40, 40, 400, 2.0))
        report(Update("curvature", 5, 10, 5, 50, 1.0))
    out = capsys.readouterr()
    assert out.out == ""
    assert re.search(r"40/40 +20 examples/s, 200 tokens/s", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\n", "", out.err))


def test_curvature_cost_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gradsift"):
        toy_extract(tmp_path / "a.zarr")
    assert re.search(r"curvature sample: 50 rows .* in \d+\.\d s", caplog.text)
