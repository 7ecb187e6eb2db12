"""The row-segment sketch: its law fixed by golden vectors, and its statistics."""

import hashlib

import pytest
import torch
from torch import Tensor

from gradsift.kernels.errors import ShapeError, SpecError
from gradsift.kernels.hashing import buckets_and_signs, matrix_shape, parameter_key, segment_hashes
from gradsift.kernels.sketch import sketch_dense, sketch_matrix
from gradsift.kernels.spec import SketchSpec

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"


def pure_python(seed: int, name: str, dim: int, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The law of `hashing` again, entry by entry in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    digest = hashlib.blake2b(
        name.encode(), digest_size=16, key=seed.to_bytes(8, "little"), person=b"gradsift.sketch1"
    ).digest()
    k0, k1, k2, k3 = (int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(4))
    p, q = matrix_shape(shape)
    per_row = (max(p, q) + 63) // 64
    buckets, signs = [], []
    for a in range(p):
        for b in range(q):
            row, column = (a, b) if p <= q else (b, a)
            lane = column % 64
            t = mix((k0 + row * per_row + column // 64) & 0xFFFFFFFF)
            h = mix(t ^ k1)
            word = mix(t ^ k2) | mix(t ^ k3) << 32
            buckets.append(64 * (h * (dim // 64) >> 32) + (lane ^ (h & 63)))
            signs.append(-1 if word >> lane & 1 else 1)
    return buckets, signs


# Golden vectors of version 1: another value means another projection, and stores that can no longer be queried.


def test_golden_keys() -> None:
    assert parameter_key(7, NAME) == (2661807532, 1386496352, 725783971, 1588535859)
    assert parameter_key(0, "") == (3822310306, 256579087, 1442569436, 2099002799)


def test_golden_segments() -> None:
    hashes = segment_hashes(SketchSpec(dim=4096), NAME, 3, 130)
    assert hashes.block.tolist() == [[60, 34, 59], [52, 32, 49], [9, 31, 13]]
    assert hashes.mask.tolist() == [[17, 13, 28], [52, 9, 7], [21, 50, 11]]
    assert hashes.sign_low[0].tolist() == [48407089, 2105016748, 2300455571]


def test_golden_buckets_and_signs_of_a_wide_parameter() -> None:
    bucket, sign = buckets_and_signs(SketchSpec(dim=256, seed=7), NAME, (2, 70))
    assert bucket[:8].tolist() == [227, 226, 225, 224, 231, 230, 229, 228]
    assert sign[:8].tolist() == [1, 1, -1, -1, -1, -1, 1, -1]
    assert bucket[70 + 62 :].tolist() == [14, 15, 25, 24, 27, 26, 29, 28]
    assert sign[70 + 62 :].tolist() == [1, 1, -1, 1, 1, -1, 1, -1]


def test_golden_buckets_and_signs_of_a_tall_parameter() -> None:
    bucket, sign = buckets_and_signs(SketchSpec(dim=192, seed=(1 << 64) - 1), "embed.é", (5, 3))
    assert bucket.tolist() == [170, 51, 159, 171, 50, 158, 168, 49, 157, 169, 48, 156, 174, 55, 155]
    assert sign.tolist() == [1, -1, 1, 1, 1, 1, 1, 1, 1, 1, -1, 1, 1, 1, -1]


def test_golden_hash_over_all_layouts() -> None:
    digest = hashlib.sha256()
    for seed, name, shape in (
        (0, NAME, (16, 300)),
        (1, NAME, (300, 16)),
        (2, "conv", (8, 3, 3, 3)),
        (3, "bias", (77,)),
        (4, "square", (65, 65)),
    ):
        bucket, sign = buckets_and_signs(SketchSpec(dim=1024, seed=seed), name, shape)
        digest.update(bucket.numpy().astype("<i8").tobytes())
        digest.update(sign.numpy().astype("i1").tobytes())
    assert digest.hexdigest() == "33f23a8d9a77252aa1478069b929594c11104d2da50e9c23fb1e1fe5a0e9bae1"


@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (130, 3), (64, 64), (7,), (4, 3, 3, 5), (1, 64), (65, 1)])
@pytest.mark.parametrize(("seed", "dim"), [(0, 64), (9, 320), ((1 << 64) - 1, 4096)])
def test_law_is_the_one_written_down(shape: tuple[int, ...], seed: int, dim: int) -> None:
    bucket, sign = buckets_and_signs(SketchSpec(dim=dim, seed=seed), NAME, shape)
    buckets, signs = pure_python(seed, NAME, dim, shape)
    assert bucket.tolist() == buckets
    assert sign.tolist() == signs


def test_matrix_is_the_sketch() -> None:
    spec = SketchSpec(dim=128, seed=3)
    for shape in ((5, 70), (70, 5), (33,), (2, 3, 4, 5)):
        grad = torch.randn(4, shape[0] if len(shape) == 1 else torch.Size(shape).numel(), dtype=torch.float64)
        out = torch.zeros(4, 128, dtype=torch.float64)
        sketch_dense(grad, spec, NAME, shape, out)
        torch.testing.assert_close(out, grad @ sketch_matrix(spec, NAME, shape).double().t())


def test_is_linear_and_adds() -> None:
    spec = SketchSpec(dim=64)
    a, b = torch.randn(2, 3, 200, dtype=torch.float64)
    once, twice = torch.zeros(2, 3, 64, dtype=torch.float64)
    sketch_dense(2 * a - 3 * b, spec, NAME, (2, 100), once)
    sketch_dense(2 * a, spec, NAME, (2, 100), twice)
    sketch_dense(-3 * b, spec, NAME, (2, 100), twice)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("dim", [64, 128])
def test_entries_of_a_segment_never_meet(dim: int) -> None:
    bucket, _ = buckets_and_signs(SketchSpec(dim=dim), NAME, (9, 256))
    for segment in bucket.view(9 * 4, 64):
        assert len(set(segment.tolist())) == 64


def test_entries_of_two_segments_meet_once_in_dim() -> None:
    together = trials = 0
    for seed in range(300):
        bucket, _ = buckets_and_signs(SketchSpec(dim=128, seed=seed), NAME, (2, 128))
        segments = bucket.view(4, 64)
        for i in range(4):
            for j in range(i):
                together += int((segments[i][:, None] == segments[j][None, :]).sum())
                trials += 64 * 64
    # one shared mask or block decides 64 pairs at once: 1800 draws of the block, so the spread is 2.5 %
    assert together / trials == pytest.approx(1 / 128, rel=0.1)


def test_names_and_seeds_are_independent() -> None:
    base, _ = buckets_and_signs(SketchSpec(), NAME, (16, 256))
    for spec, name in ((SketchSpec(seed=1), NAME), (SketchSpec(), NAME.replace("q_proj", "k_proj"))):
        other, _ = buckets_and_signs(spec, name, (16, 256))
        assert (base == other).float().mean() < 0.01


def test_inner_products_are_unbiased_over_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 600, generator=generator, dtype=torch.float64)
    pair = torch.stack([x + 0.5 * y, y])
    estimates = []
    for seed in range(600):
        out = torch.zeros(2, 64, dtype=torch.float64)
        sketch_dense(pair, SketchSpec(dim=64, seed=seed), NAME, (2, 300), out)
        estimates.append(out[0] @ out[1])
    values = torch.stack(estimates)
    error = (values.mean() - pair[0] @ pair[1]) / (values.std() / 600**0.5)
    assert abs(float(error)) < 3.5


MODULES = [(f"layers.{i}.{m}.lora_{s}.weight", s) for i in range(4) for m in ("q_proj", "up_proj") for s in "AB"]
RANK, WIDTH, EXAMPLES = 4, 192, 16


def gradients(case: str) -> list[Tensor]:
    """Per module (EXAMPLES, p, q): what LoRA gradients look like at their best and at their worst."""
    generator = torch.Generator().manual_seed(1)
    grads = []
    for _, side in MODULES:
        thin = torch.randn(EXAMPLES, RANK, generator=generator, dtype=torch.float64)
        long = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
        if case == "gaussian":
            grad = torch.randn(EXAMPLES, RANK, WIDTH, generator=generator, dtype=torch.float64)
        elif case == "rank one":
            grad = thin[:, :, None] * long[:, None, :]
        else:  # the same few columns are large in every row, module and example
            grad = torch.randn(EXAMPLES, RANK, WIDTH, generator=generator, dtype=torch.float64)
            grad[:, :, [3, 77, 130]] *= 30
        grads.append(grad if side == "A" else grad.transpose(1, 2))
    return grads


@pytest.mark.parametrize("case", ["gaussian", "rank one", "repeated outliers"])
def test_error_is_a_fully_random_countsketchs(case: str) -> None:
    dim, seeds = 512, 200
    grads = gradients(case)
    flat = torch.cat([grad.reshape(EXAMPLES, -1) for grad in grads], dim=1)
    exact = flat @ flat.t()
    upper = torch.triu_indices(EXAMPLES, EXAMPLES, 1)
    ours = theirs = 0.0
    for seed in range(seeds):
        spec = SketchSpec(dim=dim, seed=seed)
        out = torch.zeros(EXAMPLES, dim, dtype=torch.float64)
        for (name, _), grad in zip(MODULES, grads, strict=True):
            bucket, sign = buckets_and_signs.__wrapped__(spec, name, tuple(grad.shape[1:]))
            out.index_add_(1, bucket, grad.reshape(EXAMPLES, -1) * sign)
        generator = torch.Generator().manual_seed(seed)
        bucket = torch.randint(dim, (flat.shape[1],), generator=generator)
        sign = 1 - 2 * torch.randint(2, (flat.shape[1],), generator=generator, dtype=torch.float64)
        random = torch.zeros(EXAMPLES, dim, dtype=torch.float64).index_add_(1, bucket, flat * sign)
        ours += float((out @ out.t() - exact)[upper[0], upper[1]].square().mean())
        theirs += float((random @ random.t() - exact)[upper[0], upper[1]].square().mean())
    assert (ours / theirs) ** 0.5 <= 1.05


def test_identity_is_the_gradient_itself() -> None:
    layout = (("a", (2, 3)), ("b", (4,)))
    spec = SketchSpec(kind="identity").bind(layout)
    a, b = torch.randn(5, 6), torch.randn(5, 4)
    out = torch.zeros(5, 10)
    sketch_dense(a, spec, "a", (2, 3), out)
    sketch_dense(b, spec, "b", (4,), out)
    assert torch.equal(out, torch.cat([a, b], dim=1))
    assert torch.equal(a @ sketch_matrix(spec, "a", (2, 3)).t() + b @ sketch_matrix(spec, "b", (4,)).t(), out)
    with pytest.raises(SpecError, match="does not know c: use the bound spec"):
        sketch_matrix(spec, "c", (2, 3))
    with pytest.raises(SpecError, match="was bound with"):
        sketch_matrix(spec, "a", (2, 4))


def test_unbound_identity_of_one_parameter() -> None:
    assert torch.equal(sketch_matrix(SketchSpec(kind="identity"), "a", (2, 3)), torch.eye(6))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="do not fit parameter"):
        sketch_dense(torch.zeros(2, 7), SketchSpec(dim=64), "a", (2, 3), torch.zeros(2, 64))
