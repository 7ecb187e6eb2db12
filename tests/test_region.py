"""Exact scores of images by place: the map of a latent equals autograd at every position, and adds up to the score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from denoisers import MAPS, ddpm_loss, images, take, tiny_unet
from diffusers import UNet2DConditionModel
from models import fill
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradsift as gs
from gradsift.engine.answers.rescore import Rescorer, rescore
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.store.ids import seed_of

Case = tuple[Any, Any, dict[str, Any]]
PARTS = 3


def cross_attention(**layout: Any) -> Any:
    """A UNet that reads an encoding by cross-attention, with LoRA on its attention."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(16, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=12,
    )
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    return fill(get_peft_model(unet, lora).eval()).to(**layout)  # type: ignore[arg-type]


def encoded(n: int, seed: int = 3) -> dict[str, Any]:
    batch = images(n, seed=seed)
    del batch["class_labels"]
    generator = torch.Generator().manual_seed(seed)
    return {**batch, "encoder_hidden_states": torch.randn(n, 5, 12, generator=generator)}


@cache
def built(name: str) -> Case:
    """Model, modules and a batch of three examples."""
    if name == "class labels, full maps":
        return tiny_unet(), MAPS, images(3)
    layout = {"memory_format": torch.channels_last} if "channels-last" in name else {}
    return cross_attention(**layout), "lora", encoded(3)


CASES = ["class labels, full maps", "cross-attention, LoRA", "cross-attention, LoRA, channels-last"]
TOLERANCE = {"forward": 1e-5, "central": 1e-3, "auto": 1e-3}


def autograd(model: nn.Module, at: Tensor, v: dict[str, Tensor], modules: Any) -> Tensor:
    """<gradient of each loss in ``at``, v>, one backward pass each, in float64."""
    parameters = list(parameters_of(model, modules).values())
    products = []
    for one in at.flatten():
        gradients = torch.autograd.grad(one, parameters, retain_graph=True)
        pairs = zip(gradients, v.values(), strict=True)
        products.append(sum(float((g.double() * t.double()).sum()) for g, t in pairs))
    return torch.tensor(products, dtype=torch.float64).view(at.shape)


@pytest.mark.parametrize("name", CASES)
def test_positions_equal_autograd_and_their_map_sums_to_the_score(name: str) -> None:
    model, modules, batch = built(name)
    loss = ddpm_loss(measurements=2)
    v = gs.gradient(model, take(batch, [2]), loss, modules)
    batch = take(batch, [0, 1])
    losses = loss.token_losses(model, batch)
    places = (..., slice(1, 8, 3), slice(0, 8, 5))
    expected, scores = (autograd(model, at, v, modules) for at in (losses[places], losses.sum(dim=(1, 2))))
    for method, tolerance in TOLERANCE.items():
        exact = rescore(model, batch, loss.token_losses, v, method, modules=modules)  # type: ignore[arg-type]
        assert exact.tokens.shape == (2, 8, 8)
        assert (exact.tokens[places] - expected).abs().max() <= tolerance * expected.abs().max()
        assert (exact.scores - scores).abs().max() <= tolerance * scores.abs().max()
        torch.testing.assert_close(exact.tokens.sum(dim=(1, 2)), exact.scores, rtol=1e-12, atol=0)


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients.values()])


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_a_gradient_is_that_of_all_rows_of_its_examples(weighting: Any) -> None:
    model, modules, batch = built(CASES[0])
    loss = ddpm_loss(measurements=PARTS, weighting=weighting)
    assert loss.owners(batch) is not None
    whole = flat(gs.gradient(model, batch, loss, modules))
    single = [flat(gs.gradient(model, take(batch, [i]), loss.part(k), modules)) for i in range(3) for k in range(PARTS)]
    assert (whole - torch.stack(single).sum(0)).norm() <= 1e-5 * whole.norm()
    apart = flat(gs.gradient(model, batch, ddpm_loss(measurements=PARTS, weighting=weighting, parts=True), modules))
    assert (whole - apart).norm() <= 1e-5 * whole.norm()


class Stored:
    """A store of a tiny UNet with three parts, and everything that exact answers about it need."""

    def __init__(self, folder: Any) -> None:
        self.model = tiny_unet()
        self.loss = ddpm_loss(measurements=PARTS, parts=True)
        self.data, self.query = images(9), images(2, seed=8)
        batches = [take(self.data, rows) for rows in ([0, 1, 2, 3], [4, 5, 6, 7, 8])]
        self.store = gs.extract(
            self.model,
            batches,
            self.loss,
            folder / "train.zarr",
            spec=gs.SketchSpec(dim=1024),
            modules=MAPS,
            curvature=18,
            progress=False,
        )
        self.asked = gs.Capture(self.model, self.store.spec, MAPS)(self.query, self.loss)
        self.rows, self.directions = self.exact(self.data, self.loss), self.exact(self.query, self.loss)

    def exact(self, batch: dict[str, Any], loss: Any) -> Tensor:
        """Unsketched gradients: (n, parts, numbers), or (n, numbers) of a summed loss."""
        whole = gs.Capture(self.model, gs.SketchSpec(kind="identity"), MAPS)
        return whole(batch, loss).fold(len(loss.parts or "1")).values.double()

    def fetch(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), 4):
            yield take(self.data, rows[start : start + 4])

    def rescorer(self, scorer: str) -> Rescorer:
        questions = [take(self.query, [i]) for i in range(2)]
        if scorer == "cosine":
            losses = [self.loss.part(k) for k in range(PARTS)]
            vectors = [[gs.gradient(self.model, q, loss, MAPS) for loss in losses] for q in questions]
            return Rescorer(
                self.model, self.fetch, [loss.token_losses for loss in losses], vectors, "forward", modules=MAPS
            )
        summed = [gs.gradient(self.model, q, self.loss, MAPS) for q in questions]
        return Rescorer(self.model, self.fetch, self.loss.token_losses, summed, "forward", modules=MAPS)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("region"))


def cosines(directions: Tensor, rows: Tensor) -> Tensor:
    """Mean over the parts of the cosines: (q, parts, numbers), (n, parts, numbers) -> (q, n)."""
    unit = torch.nn.functional.normalize
    return torch.einsum("qkd,ikd->qi", unit(directions, dim=2), unit(rows, dim=2)) / PARTS


@pytest.mark.parametrize("scorer", ["dot", "cosine"])
def test_exact_answers_of_a_store_in_parts_are_those_of_whole_gradients(stored: Stored, scorer: Any) -> None:
    if scorer == "dot":
        expected = stored.directions.sum(1) @ stored.rows.sum(1).T
    else:
        expected = cosines(stored.directions, stored.rows)
    top = gs.topk(stored.store, stored.asked, 4, scorer, rescore=stored.rescorer(scorer))
    best = expected.topk(4).values
    np.testing.assert_allclose(top.scores, best, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert top.tokens is not None
    assert top.tokens.shape == (2, 4, 8, 8)
    np.testing.assert_allclose(top.tokens.sum(axis=(2, 3)), top.scores, rtol=1e-6)
    plain = gs.topk(stored.store, stored.asked, 9, scorer)
    noise = float((torch.from_numpy(plain.scores) - expected.gather(1, torch.from_numpy(plain.rows))).abs().max())
    assert noise <= 0.25 * float(expected.abs().max())


def test_the_exact_cosine_of_a_set_divides_by_the_norm_of_its_mean_gradient(stored: Stored) -> None:
    """A sketch knows that norm only up to its own error; the vectors of exact scores know it."""
    one = stored.rescorer("cosine")
    mean = [{name: (a[name] + b[name]) / 2 for name in a} for a, b in zip(*one.vectors, strict=True)]  # type: ignore[index]
    top = gs.topk(stored.store, stored.asked, 4, "cosine", as_set=True, rescore=replace(one, vectors=[mean]))
    expected = cosines(stored.directions.mean(dim=0, keepdim=True), stored.rows)
    np.testing.assert_allclose(top.scores, expected.topk(4).values, rtol=0, atol=1e-5)


def test_a_part_without_a_gradient_adds_nothing_to_an_exact_cosine(stored: Stored) -> None:
    one = stored.rescorer("cosine")
    first, *rest = one.vectors[0]
    zero = {name: torch.zeros_like(t) for name, t in first.items()}
    asked = replace(stored.asked, values=stored.asked.values[:PARTS], grad_norm=stored.asked.grad_norm[:PARTS])
    asked = replace(asked, loss=None)
    top = gs.topk(stored.store, asked, 4, "cosine", rescore=replace(one, vectors=[[zero, *rest]]))
    directions = stored.directions[:1].clone()
    directions[:, 0] = 0
    np.testing.assert_allclose(top.scores, cosines(directions, stored.rows).topk(4).values, rtol=0, atol=1e-5)
    with pytest.raises(gs.ShapeError, match="v has length 0"):
        gs.topk(stored.store, asked, 4, "cosine", rescore=replace(one, vectors=[[zero] * PARTS]))


def test_the_exact_fisher_of_a_store_in_parts_is_that_of_the_summed_loss(stored: Stored) -> None:
    """Its draws are those of the store; conjugate gradients over them end at the solve with unsketched rows."""
    summed = ddpm_loss(measurements=PARTS)
    fisher = Fisher(stored.store.curvature, examples=9)
    assert fisher.rows.shape == (18, 1024)
    names, seeds = zip(
        *((int(n), seed_of(stored.store.spec.seed, n, d)) for n, d in stored.store.curvature_draws), strict=True
    )
    sample = summed.sampled_batch(stored.model, take(stored.data, names), seeds)
    rows = stored.exact(sample, summed)
    again = gs.Capture(stored.model, stored.store.spec, MAPS)(sample, summed).values
    assert (again - fisher.rows).norm() <= 1e-4 * again.norm()
    v = gs.gradient(stored.model, take(stored.query, [0]), summed, MAPS)
    dense = rows @ rows.T / len(rows) + fisher.damping * torch.eye(len(rows), dtype=torch.float64)
    inner = torch.linalg.solve(dense, rows @ flat(v))
    expected = (flat(v) - rows.T @ inner / len(rows)) / fisher.damping
    sampled = gs.Curvature(stored.model, [sample], summed, stored.store.curvature, modules=MAPS, examples=9)
    got = flat(sampled.correct(v, "fisher", k=1.0, steps=6))
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_images_of_different_sizes_share_one_answer() -> None:
    """A bucket of wide images beside a square one: each map keeps its own corner."""
    model, modules, square = built(CASES[0])
    loss = ddpm_loss(measurements=2)
    wide = {**square, "latents": torch.cat([square["latents"], square["latents"][..., :4]], dim=3)}
    v = gs.gradient(model, take(square, [0]), loss, modules)
    one = take(square, [1])
    exact = Rescorer(model, lambda _: iter([one, take(wide, [2])]), loss.token_losses, [v], modules=modules)
    tokens = exact(0, np.array([1, 2])).tokens
    assert tokens.shape == (2, 8, 12)
    assert not tokens[0, :, 8:].any()
    assert tokens[1, :, 8:].all()
    torch.testing.assert_close(
        tokens[:1, :, :8], rescore(model, one, loss.token_losses, v, modules=modules).tokens, rtol=0, atol=0
    )


def test_a_rescorer_wants_losses_and_vectors_per_part_or_neither(stored: Stored) -> None:
    both = stored.rescorer("cosine")
    rows = np.arange(2)
    lonely = Rescorer(stored.model, stored.fetch, both.token_losses, both.vectors[0], modules=MAPS)  # type: ignore[arg-type]
    with pytest.raises(gs.ShapeError, match="give both per part or neither"):
        lonely(0, rows)
    fewer = Rescorer(stored.model, stored.fetch, both.token_losses[:2], both.vectors, modules=MAPS)  # type: ignore[index]
    with pytest.raises(gs.ShapeError, match="losses of 2 parts but 3 vectors of query 1"):
        fewer(1, rows)
