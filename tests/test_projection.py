"""Gradients projected from both sides: still S times autograd's gradient, norms exact, spread as theory says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from models import error, fill, one, oracle
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gradsift as gs
from gradsift.kernels import images, operands
from gradsift.kernels.outer import sketch_outer, sketch_outer_reference
from gradsift.kernels.project import projections
from gradsift.kernels.sketch import sketch_dense, sketch_matrix
from gradsift.kernels.spec import SketchSpec

TOLERANCE = 1e-5
RANK = 8
SPEC = gs.SketchSpec(dim=256, project=RANK)
NAME = "model.layers.0.mlp.up_proj.weight"


class Layers(nn.Module):
    """Linear maps over tokens (n, T, 24): wider, narrower, transposed, and one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.turned = Conv1D(30, 24)
        self.head = nn.Linear(30, RANK)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turned(x + self.down(self.up(x).tanh())).tanh())


class Picture(nn.Module):
    """A linear map on channels, and a convolution that is projected."""

    def __init__(self, uses: int = 1, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(12, 12)
        self.conv = nn.Conv2d(12, 12, **settings)
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for _ in range(self.uses):
            y = self.conv(y).tanh()
        return y


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    y = model(batch["x"])
    weight = torch.linspace(-1, 2, y[0].numel()).sin().view(y.shape[1:])
    return (y * weight).flatten(1).sum(1) + y.square().flatten(1).mean(1)


def tokens(n: int = 3, length: int = 5) -> dict[str, Tensor]:
    return {"x": torch.randn(n, length, 24, generator=torch.Generator().manual_seed(3))}


def pictures(n: int = 3, **layout: Any) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 12, 9, 7, generator=torch.Generator().manual_seed(3)).contiguous(**layout)}


def assert_identity(model: nn.Module, batch: dict[str, Tensor], modules: Any = "*", spec: Any = SPEC) -> gs.Features:
    features = gs.Capture(model, spec, modules=modules)(batch, loss)
    rows, norms = oracle(model, [one(batch, i) for i in range(len(batch["x"]))], loss, spec, modules)
    assert error(features.values, rows) <= TOLERANCE
    assert error(features.grad_norm, norms) <= TOLERANCE
    return features


@pytest.mark.parametrize("length", [1, 5, 33])
def test_linear_maps(length: int) -> None:
    """Norms come from few tokens' products with each other, or from the gradients that many tokens make."""
    features = assert_identity(Layers(), tokens(length=length))
    assert [row.shape for row in features.table] == [(40, 24), (24, 40), (24, 30), (RANK, 30)]


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1, stride 2": {"kernel_size": 1, "stride": 2},
    "odd everything": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 3)},
    "same, uneven": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "three groups, stride 2": {"kernel_size": 3, "padding": 1, "groups": 3, "stride": 2},
    "depthwise": {"kernel_size": 3, "groups": 12},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "called twice": {"kernel_size": 3, "padding": 1, "uses": 2},
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions(geometry: str) -> None:
    model = Picture(**GEOMETRIES[geometry])
    features = assert_identity(model, pictures())
    last = pictures(memory_format=torch.channels_last)
    assert error(gs.Capture(model, SPEC, modules="*")(last, loss).values, features.values.double()) <= 1e-6


def test_full_weights_beside_lora() -> None:
    """Only what is large is projected: LoRA's rows are those of a spec without projection, bit by bit."""
    torch.manual_seed(0)
    model = nn.Sequential(Layers(), nn.Linear(RANK, 24), Layers())
    with_lora = fill(get_peft_model(model, LoraConfig(r=4, target_modules=["0.up", "1"])))
    features = assert_identity(with_lora, tokens(), modules=["0.up", "0.turned", "2.*"])
    assert {min(row.shape) for row in features.table} == {4, RANK, 24}
    lora = gs.Capture(with_lora, SPEC)(tokens(), loss)
    assert torch.equal(lora.values, gs.Capture(with_lora, gs.SketchSpec(dim=256))(tokens(), loss).values)


@pytest.mark.parametrize("model", [Layers(), Picture(kernel_size=3, groups=3, stride=2)], ids=["linear", "conv"])
def test_tap_conserves(model: nn.Module) -> None:
    batch = tokens() if isinstance(model, Layers) else pictures()
    capture = gs.Capture(model, SPEC, modules="*")
    with capture.tap() as tap:
        loss(model, batch).sum().backward()
    assert tap.conservation is not None
    assert tap.conservation <= 1e-6
    assert error(tap.values, capture(batch, loss).values.double()) <= 1e-6


class Owned:
    """Five pictures of three examples, one of which has none."""

    def owners(self, _: Any) -> list[int]:
        return [3, 0, 3, 1, 3]

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        rows = loss(model, batch)
        return rows.new_zeros(4).index_add(0, torch.tensor(self.owners(batch)), rows)


def test_pictures_that_have_owners() -> None:
    model = Picture(kernel_size=3, padding=1)
    alone = gs.Capture(model, SPEC, modules="*")(pictures(5), loss).values.double()
    expected = torch.zeros(4, SPEC.dim, dtype=torch.float64).index_add(0, torch.tensor([3, 0, 3, 1, 3]), alone)
    features = gs.Capture(model, SPEC, modules="*")(pictures(5), Owned())
    assert error(features.values, expected) <= TOLERANCE
    exact = gs.Capture(model, gs.SketchSpec(kind="identity"), modules="*")(pictures(5), Owned())
    assert error(features.grad_norm, exact.grad_norm.double()) <= TOLERANCE


def test_bounds_on_copies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, conv = Layers(), Picture(kernel_size=3, padding=1)
    expected = [assert_identity(model, tokens()), assert_identity(conv, pictures())]
    monkeypatch.setattr(operands, "_COPIED", 1)
    monkeypatch.setattr(images, "UNFOLDED", 1)
    for features, (net, batch) in zip(expected, [(model, tokens()), (conv, pictures())], strict=True):
        got = gs.Capture(net, SPEC, modules="*")(batch, loss)
        assert error(got.values, features.values.double()) <= 1e-6
        assert error(got.grad_norm, features.grad_norm.double()) <= 1e-6


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *(
            (backend, dtype)
            for backend in ("torch", "triton", "triton-atomic")
            for dtype in (torch.float32, torch.bfloat16)
        ),
        ("torch", torch.float64),
    ],
)
def test_ragged_tokens_on_every_backend(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    offsets, shape = (0, 3, 3, 8, 60), (20, 70)
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(60, width, generator=generator).to(dtype) for width in (70, 20))
    rows, squares = sketch_outer_reference(x, g, offsets, SPEC, NAME, shape)
    norms = torch.zeros(4, device=device)
    got = sketch_outer(
        x.to(device), g.to(device), offsets, SPEC, name=NAME, shape=shape, sqnorm=norms, backend=backend
    ).cpu()
    assert error(got, rows) <= TOLERANCE
    assert error(norms.cpu(), squares) <= TOLERANCE
    assert bool((got[1] == 0).all())


def test_norm_of_tokens_that_look_alike() -> None:
    """Products between tokens add up to a small square from large terms; what is lost is rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 64, generator=generator) + 10
    g = torch.randn(2, 9, 64, generator=generator)
    norms = torch.zeros(2)
    sketch_outer(x, g, None, SPEC, name=NAME, shape=(64, 64), sqnorm=norms)
    exact = (g.double().mT @ x.double()).square().sum((1, 2))
    assert error(norms, exact) <= TOLERANCE
    g = g - g.mean(1, keepdim=True)  # now every large product cancels
    sketch_outer(x, g, None, SPEC, name=NAME, shape=(64, 64), sqnorm=norms.zero_())
    exact = (g.double().mT @ x.double()).square().sum((1, 2))
    assert error(norms, exact) <= 1e-4


def pure_python(seed: int, name: str, person: bytes, width: int) -> list[list[int]]:
    """The law of a projection's signs again, entry by entry in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    digest = hashlib.blake2b(name.encode(), digest_size=16, key=seed.to_bytes(8, "little"), person=person).digest()
    k0, _, k2, k3 = (int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(4))
    signs = []
    for row in range(RANK):
        signs.append([])
        for column in range(width):
            t = mix((k0 + row * -(-width // 64) + column // 64) & 0xFFFFFFFF)
            word = mix(t ^ k2) | mix(t ^ k3) << 32
            signs[-1].append(-1 if word >> (column % 64) & 1 else 1)
    return signs


def sides(spec: SketchSpec, name: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    found = projections(spec, name, shape, torch.float64, torch.device("cpu"))
    assert found is not None
    return found


def test_law_is_the_one_written_down() -> None:
    outward, inward = sides(SketchSpec(seed=7, project=RANK), NAME, (150, 10, 3, 3))
    for matrix, person, width in ((outward, b"gradsift.p_out", 150), (inward, b"gradsift.p_in", 90)):
        expected = torch.tensor(pure_python(7, NAME, person, width), dtype=torch.float64) / RANK**0.5
        torch.testing.assert_close(matrix, expected)


def test_golden_signs() -> None:
    """Another value means another projection, and stores that can no longer be queried."""
    digest = hashlib.sha256()
    for matrix in sides(SketchSpec(project=16), NAME, (100, 300)):
        digest.update(matrix.sign().numpy().astype("i1").tobytes())
    assert digest.hexdigest() == "24f90857437c45c39e25291c77bd6865cffd6340069d18f10928d951c5f6a2d4"


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (9, 2, 3, 3)])
def test_matrix_is_both_projections_then_the_sketch(shape: tuple[int, ...]) -> None:
    outward, inward = sides(SPEC, NAME, shape)
    small = sketch_matrix(SPEC, NAME, (RANK, RANK)).double()
    assert torch.equal(small, sketch_matrix(SketchSpec(dim=256), NAME, (RANK, RANK)).double())
    torch.testing.assert_close(sketch_matrix(SPEC, NAME, shape).double(), small @ torch.kron(outward, inward))


@pytest.mark.parametrize("shape", [(RANK, 500), (500, RANK), (500,), (RANK, 9, 3, 3), (1, 1)])
def test_what_is_small_on_either_side_is_not_projected(shape: tuple[int, ...]) -> None:
    assert torch.equal(sketch_matrix(SPEC, NAME, shape), sketch_matrix(SketchSpec(dim=256), NAME, shape))


def moments(a: Tensor, b: Tensor, r: int) -> float:
    """E (P a . P b)^2 for P (r, d) of independent signs over sqrt(r)."""
    dot, squares = float(a @ b), float(a @ a) * float(b @ b)
    return dot**2 + (squares + dot**2 - 2 * float((a * b).square().sum())) / r


@pytest.mark.parametrize("rank", [8, 32])
def test_inner_products_are_unbiased_over_seeds_and_spread_as_theory_says(rank: int) -> None:
    """Of gradients of rank one, the hardest: P_out a b^T P_in^T against c d^T is (P_out a . P_out c)(P_in b . P_in d),
    a product of independent factors whose moments are known; the sketch adds 1 / dim to them."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(4))
    c, d = c + a, d + b
    exact = float((a @ c) * (b @ d))
    second = moments(a, c, rank) * moments(b, d, rank)
    square = float((a @ a) * (b @ b) * (c @ c) * (d @ d))
    seeds, estimates = 600, []
    pair = torch.stack([torch.outer(a, b), torch.outer(c, d)]).flatten(1)
    for seed in range(seeds):
        out = torch.zeros(2, 4096, dtype=torch.float64)
        sketch_dense(pair, SketchSpec(seed=seed, project=rank), NAME, (64, 64), out)
        estimates.append(float(out[0] @ out[1]))
    values = torch.tensor(estimates, dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 3.5 * float(values.std()) / seeds**0.5
    theory = (second - exact**2 + square / 4096) ** 0.5
    assert float(values.std()) == pytest.approx(theory, rel=0.15)


def test_specs_without_projection_are_written_as_before() -> None:
    assert SketchSpec().to_json() == '{"dim":4096,"kind":"segment","seed":0,"version":1}'
    assert SketchSpec().fingerprint == "1acb5faa6e530108"
    assert SketchSpec.from_json(SketchSpec().to_json()).project is None
    assert SketchSpec.from_json(SPEC.to_json()) == SPEC
    assert len({SketchSpec(project=r).fingerprint for r in (None, 8, 16)}) == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"project": 0}, "project is 0, expected a positive integer, or None for no projection"),
        ({"project": -8}, "project is -8"),
        ({"project": 8.0}, "project is 8.0"),
        ({"project": True}, "project is True"),
        ({"project": "8"}, "project is '8'"),
        ({"project": 8, "kind": "identity"}, "project is for kind='segment' only, .*: leave it out"),
    ],
)
def test_refuses_in_a_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(gs.SpecError, match=words) as caught:
        SketchSpec(**fields)
    assert "\n" not in str(caught.value)


def test_store_remembers_the_projection_and_refuses_another(tmp_path: Path) -> None:
    path, model = tmp_path / "train.zarr", Layers()
    store = gs.extract(model, [tokens(6)], loss, path, spec=SPEC, modules="*", progress=False)
    assert gs.FeatureStore.open(path).spec == SPEC
    query = gs.Capture(model, store.spec, modules="*")(tokens(2), loss)
    assert gs.topk(store, query, k=1, scorer="cosine").rows[:, 0].tolist() == [0, 1]
    other = gs.Capture(model, gs.SketchSpec(dim=256), modules="*")(tokens(2), loss)
    with pytest.raises(gs.GradsiftError, match='"project":8'):
        gs.topk(store, other, k=1)
    with pytest.raises(gs.StoreError, match="seed 0, gradients projected to 8 and is now segment"):
        gs.extract(model, [tokens(6)], loss, path, spec=gs.SketchSpec(dim=256), modules="*", progress=False)
