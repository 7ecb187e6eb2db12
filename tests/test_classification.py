"""The losses of a classifier against plain formulas: rows, exact scores, drawn labels, probabilities, bad input."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import error, oracle
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.engine.curvature.products import Products
from gradsift.engine.losses import Margin, classification

CLASSES = 5


class Net(nn.Module):
    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 11, bias=False), nn.Linear(11, CLASSES, bias=False)
        self._wrap = wrap

    def forward(self, pixels: Tensor) -> Any:
        return self._wrap(self.last(self.first(pixels).tanh()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batch(n: int = 6) -> dict[str, Any]:
    return {
        "pixels": torch.randn(n, 7),
        "labels": torch.randint(CLASSES, (n,)),
        "ids": [f"image {i}" for i in range(n)],
    }


def plain(model: nn.Module, example: dict[str, Any]) -> Tensor:
    return -model(example["pixels"]).double().log_softmax(1).gather(1, example["labels"][:, None]).squeeze(1)


def plain_margin(model: nn.Module, example: dict[str, Any]) -> Tensor:
    p = plain(model, example).neg().exp()
    return -(p / (1 - p)).log()


def one(whole: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: value[i : i + 1] for name, value in whole.items()}


LOSSES = [(classification, plain), (Margin(), plain_margin)]


@pytest.mark.parametrize(("loss_fn", "formula"), LOSSES)
def test_rows_and_exact_scores_are_autograds_of_the_plain_formula(loss_fn: Any, formula: Any) -> None:
    model, whole = Net().eval(), batch()
    spec = gs.SketchSpec(dim=256)
    got = gs.Capture(model, spec, modules="*")(whole, loss_fn)
    rows, norms = oracle(model, [one(whole, i) for i in range(6)], formula, spec, modules=["*"])
    assert error(got.values, rows) <= 1e-5
    torch.testing.assert_close(got.grad_norm.double(), norms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss_fn(model, whole).double(), formula(model, whole), rtol=1e-5, atol=1e-5)
    v = gs.gradient(model, one(whole, 0), loss_fn, modules="*")
    for method, close in [("central", 1e-3), ("forward", 1e-5)]:
        exact = gs.rescore(model, whole, loss_fn.token_losses, v, method, modules="*")  # type: ignore[arg-type]
        assert exact.tokens.shape == (6, 1)
        for i, score in enumerate(exact.scores.tolist()):
            g = torch.autograd.grad(formula(model, one(whole, i)).sum(), [model.first.weight, model.last.weight])
            expected = sum(float((v[n] * part).sum()) for n, part in zip(v, g, strict=True))
            assert abs(score - expected) <= close * float(norms[0] * norms[i])


def test_the_margin_gradient_is_the_losss_over_p_minus_one_and_the_loss_gives_p_back() -> None:
    model, whole = Net().eval(), batch()
    capture = gs.Capture(model, gs.SketchSpec(kind="identity"), modules="*")
    loss, margin = capture(whole, classification), capture(whole, Margin())
    p = Margin.probability(margin.loss)
    torch.testing.assert_close(p, loss.loss.double().neg().exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(margin.values.double(), loss.values.double() / (1 - p)[:, None], rtol=1e-4, atol=1e-6)


def test_a_margin_of_certainty_stays_finite() -> None:
    model = Net(lambda logits: logits * 1e4).eval()
    whole = batch()
    whole["labels"] = model(whole["pixels"]).argmax(1)
    assert gs.Capture(model, gs.SketchSpec(dim=64), modules="*")(whole, Margin()).values.isfinite().all()


@pytest.mark.parametrize("wrap", [lambda z: SimpleNamespace(logits=z), lambda z: (z, None)])
def test_logits_are_found_in_any_output(wrap: Any) -> None:
    whole = batch()
    torch.manual_seed(1)
    bare = Net()
    torch.manual_seed(1)
    torch.testing.assert_close(classification(Net(wrap), whole), classification(bare, whole))


def test_a_bf16_model_is_upcast_before_the_softmax() -> None:
    model, whole = Net().to(torch.bfloat16), batch()
    whole["pixels"] = whole["pixels"].bfloat16()
    got = classification(model, whole)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), plain(model, whole), rtol=1e-5, atol=1e-5)


def test_drawn_labels_depend_on_the_seed_alone_and_follow_the_models_probabilities() -> None:
    """How often each class is drawn against its probability, 4 sigma."""
    model, draws = Net().eval(), 4000
    image = torch.randn(1, 7)
    whole = {"pixels": image.expand(draws, -1), "labels": torch.zeros(draws, dtype=torch.int64)}
    drawn = classification.sampled_batch(model, whole, range(draws))
    p = model(image)[0].detach().softmax(0)
    share = torch.bincount(drawn["labels"], minlength=CLASSES) / draws
    assert (abs(share - p) <= 4 * (p * (1 - p) / draws).sqrt()).all()
    torch.testing.assert_close(classification(model, drawn), classification.sampled(model, whole, range(draws)))
    some = [17, 5, 2**64 + 3000]
    torch.testing.assert_close(
        classification.sampled_batch(model, {k: v[:3] for k, v in whole.items()}, some)["labels"],
        drawn["labels"][[17, 5, 3000]],
    )
    with pytest.raises(gs.ShapeError, match="got 2 seeds for 3 examples"):
        classification.sampled(model, {k: v[:3] for k, v in whole.items()}, [1, 2])


def test_gauss_newton_products_equal_the_dense_matrix() -> None:
    model, whole = Net().eval(), batch()
    products = Products(model, [whole], classification, "*")
    u = torch.randn(products.flat.size, dtype=torch.float64)
    weights = [model.first.weight, model.last.weight]
    logits = model(whole["pixels"])
    rows = [torch.autograd.grad(z, weights, retain_graph=True) for z in logits.flatten()]
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double().view(6, CLASSES, -1)
    p = logits.detach().double().softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("ncp,ncd,ndq,q->p", j, h, j, u)
    assert (products.gauss_newton(u) - expected).norm() <= 1e-5 * expected.norm()


def test_a_store_of_either_loss_says_what_it_holds(tmp_path: Any) -> None:
    model, batches = Net(), [batch(5), batch(4)]
    for i, part in enumerate(batches):
        part["ids"] = [f"{i}/{j}" for j in range(len(part["labels"]))]
    whitened = gs.extract(model, batches, classification, tmp_path / "a", modules="*", curvature=20, progress=False)
    assert whitened.curvature is not None
    assert whitened.loss_tokens.tolist() == [1] * 9  # type: ignore[union-attr]
    margins = gs.extract(model, batches, Margin(), tmp_path / "b", modules="*", progress=False)
    assert margins.metadata["loss"]["kind"] == "margin"
    assert margins.curvature is None
    expected = functional.softmax(model(batches[0]["pixels"]), 1).gather(1, batches[0]["labels"][:, None])[:, 0]
    torch.testing.assert_close(Margin.probability(torch.as_tensor(margins.loss[:5])).float(), expected.detach())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": None}, "the batch has no labels"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 5])}, "example 5 has label 5, expected 0 to 4"),
        ({"labels": torch.tensor([0, -100, 2, 3, 4, 0])}, "example 1 has label -100"),
        ({"labels": torch.zeros(6, 2, dtype=torch.int64)}, r"labels have shape \(6, 2\)"),
        ({"labels": torch.zeros(6)}, "torch.float32, expected the class"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"logits of shape \(6, 5\) for 5 labels"),
        ({"image": torch.zeros(6, 7)}, r"the batch has 'image', which the forward of Net does not take.*\(pixels\)"),
    ],
)
@pytest.mark.parametrize("loss_fn", [classification, Margin()])
def test_bad_batches_are_refused(loss_fn: Any, change: dict[str, Any], words: str) -> None:
    whole = {name: value for name, value in {**batch(), **change}.items() if value is not None}
    with pytest.raises((gs.DataError, gs.ShapeError), match=words):
        loss_fn(Net(), whole)


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(gs.ShapeError, match="returned str without logits"):
        classification(Net(lambda logits: "dog"), batch())
