"""DPO against autograd of the formula written out, one pair at a time: rows, shares of tokens, references, draws."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import SPEC, VOCAB, error, llama, oracle, with_lora
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.engine.capture.maps import parameters_of
from gradsift.engine.curvature.products import Products
from gradsift.engine.losses import DPO, IGNORE

PAIRS = 4
FORMS = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.2},
    {"beta": 0.7, "form": "ipo"},
]


def pairs(n: int = PAIRS) -> dict[str, Tensor]:
    """Answers of different lengths to prompts of three tokens."""
    generator = torch.Generator().manual_seed(5)
    batch = {}
    for side, longest in (("chosen", 9), ("rejected", 7)):
        ids = torch.randint(0, VOCAB, (n, longest), generator=generator)
        ends = torch.tensor([longest - i % 3 for i in range(n)])
        mask = (torch.arange(longest) < ends[:, None]).long()
        labels = ids.masked_fill(mask == 0, IGNORE)
        labels[:, :3] = IGNORE
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return batch


def one(batch: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: value[i : i + 1] for name, value in batch.items()}


def logp(model: nn.Module, batch: dict[str, Any], side: str) -> tuple[Tensor, int]:
    """Of one answer without its padding, token by token, and the number of its labels."""
    length = int(batch[f"{side}_attention_mask"].sum())
    ids, labels = batch[f"{side}_input_ids"][:, :length], batch[f"{side}_labels"][0, :length].tolist()
    scores = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    places = [t for t, label in enumerate(labels) if t and label != IGNORE]
    return torch.stack([scores[t - 1, labels[t]] for t in places]).sum(), len(places)


def plain(batch: dict[str, Any], settings: dict[str, Any], reference: nn.Module | None) -> Any:
    """The formula for one pair."""

    def loss(model: nn.Module, pair: dict[str, Any]) -> Tensor:
        ratios = []
        for side in ("chosen", "rejected"):
            ours, count = logp(model, pair, side)
            if reference is None:
                with torch.no_grad(), model.disable_adapter():  # type: ignore[operator]
                    theirs, _ = logp(model, pair, side)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_("lora" in name)
            else:
                with torch.no_grad():
                    theirs, _ = logp(reference, pair, side)
            ratios.append((ours - theirs) / (count if settings.get("form") == "ipo" else 1))
        h, beta, s = ratios[0] - ratios[1], settings["beta"], settings.get("label_smoothing", 0.0)
        if settings.get("form") == "ipo":
            return ((h - 1 / (2 * beta)) ** 2)[None]
        return (-(1 - s) * torch.log(torch.sigmoid(beta * h)) - s * torch.log(torch.sigmoid(-beta * h)))[None]

    return loss


@pytest.mark.parametrize("settings", FORMS)
def test_rows_are_autograds_of_the_formula_one_pair_at_a_time(settings: dict[str, Any]) -> None:
    model, batch, loss = with_lora(llama()), pairs(), DPO(**settings)
    got = gs.Capture(model, SPEC)(batch, loss)
    formula = plain(batch, settings, None)
    rows, norms = oracle(model, [one(batch, i) for i in range(PAIRS)], formula, SPEC)
    assert error(got.values, rows) <= 1e-5
    torch.testing.assert_close(got.grad_norm.double(), norms, rtol=1e-5, atol=0)
    expected = torch.cat([formula(copy.deepcopy(model), one(batch, i)) for i in range(PAIRS)])
    torch.testing.assert_close(got.loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_another_model_or_stored_log_probabilities_are_the_same_reference() -> None:
    model, batch = with_lora(llama()), pairs()
    base = llama()
    capture = gs.Capture(model, SPEC)
    off = capture(batch, DPO())
    other = capture(batch, DPO(reference=base))
    torch.testing.assert_close(other.values, off.values, rtol=1e-5, atol=1e-7)
    assert DPO(reference=base).kind != DPO().kind
    sums = {
        f"ref_{side}_logps": torch.stack([logp(base, one(batch, i), side)[0] for i in range(PAIRS)]).float().detach()
        for side in ("chosen", "rejected")
    }
    stored = capture({**batch, **sums}, DPO())
    assert error(stored.values, off.values.double()) <= 1e-5
    dropping = llama(attention_dropout=0.5).train()
    torch.testing.assert_close(capture(batch, DPO(reference=dropping)).values, other.values)
    assert dropping.training


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_the_reference_pass_leaves_no_trace(checkpointing: bool | None) -> None:
    """Nor does it make a map look idle, or hide one that is: checkpointed or not, in train mode and in eval."""
    model, batch = with_lora(llama()), pairs()
    expected = gs.Capture(model, SPEC)(batch, DPO())
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.train()
    before = [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]
    layers = [m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    states = [(dict(m.__dict__), m.active_adapters, len(m._forward_hooks)) for m in layers]
    got = gs.Capture(model, SPEC)(batch, DPO())
    assert error(got.values, expected.values.double()) <= 1e-5
    assert [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()] == before
    assert model.training == (checkpointing is not None)
    for layer, (state, active, hooks) in zip(layers, states, strict=True):
        assert not layer.disable_adapters
        assert (layer.active_adapters, len(layer._forward_hooks)) == (active, hooks)
        assert layer._active_adapter == state["_active_adapter"]
        assert layer.forward == type(layer).forward.__get__(layer)


def test_a_loss_that_only_ran_the_reference_is_still_refused() -> None:
    from gradsift.engine.losses.reference import adapters_off

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with torch.no_grad(), adapters_off(model, "x"):
            model(input_ids=batch["chosen_input_ids"])
        return torch.zeros(PAIRS, requires_grad=True) * 1

    with pytest.raises(gs.CaptureError, match="never ran"):
        gs.Capture(with_lora(llama()), SPEC)(pairs(), loss)

    def with_gradients(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        with adapters_off(model, "x"):
            return model(input_ids=batch["chosen_input_ids"]).logits.sum((1, 2))  # type: ignore[no-any-return]

    with pytest.raises(gs.CaptureError, match="adapters are disabled"):
        gs.Capture(with_lora(llama()), SPEC)(pairs(), with_gradients)


def test_rows_do_not_depend_on_the_batch_or_its_padding_and_add_up_to_its_gradient() -> None:
    model, batch, loss = with_lora(llama()), pairs(), DPO()
    capture = gs.Capture(model, SPEC)
    together = capture(batch, loss)
    wide = {
        name: functional.pad(value, (0, 4), value=IGNORE if name.endswith("labels") else 0)
        for name, value in batch.items()
    }
    assert error(capture(wide, loss).values, together.values.double()) <= 1e-5
    alone = torch.cat([capture(one(batch, i), loss).values for i in range(PAIRS)])
    assert error(alone, together.values.double()) <= 1e-5
    whole = gs.gradient(model, batch, loss)
    total = sum(
        gs.sketch_matrix(SPEC, name, tuple(g.shape)).double() @ g.double().flatten() for name, g in whole.items()
    )
    assert error(together.values.sum(0)[None], total[None]) <= 1e-5  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "method"), [*((settings, "central") for settings in FORMS), (FORMS[1], "forward")]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_shares_of_tokens_add_up_to_autograds_dot_products(settings: dict[str, Any], method: Any) -> None:
    """Each is the slope at these weights times the derivative of the token's own log-probability."""
    model, batch, loss = with_lora(llama()).double(), pairs(), DPO(**settings)
    v = gs.gradient(model, one(batch, 1), loss)
    exact = gs.rescore(model, batch, loss.token_losses, v, method)
    assert exact.tokens.shape == (PAIRS, 2, 9)
    close = 1e-4 if method == "central" else 1e-6
    largest = float(exact.scores.abs().max())
    for i in range(PAIRS):
        g = gs.gradient(model, one(batch, i), loss)
        dot = sum(float((g[name].double() * t.double()).sum()) for name, t in v.items())
        assert abs(float(exact.scores[i]) - dot) <= close * largest
    captured = parameters_of(model)
    parameters = list(captured.values())
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    tokens = -gs.losses.language_model.token_losses(
        model, {k.removeprefix("chosen_"): t for k, t in one(batch, 0).items() if k.startswith("chosen")}
    )
    shares = []
    for t in range(3, 9):
        g = torch.autograd.grad(tokens[0, t], parameters, retain_graph=True)
        shares.append(sum(float((v[n].double() * part.double()).sum()) for n, part in zip(captured, g, strict=True)))
    got = exact.tokens[0, 0, 3:9]
    slope = float(got @ torch.tensor(shares).double()) / float(torch.tensor(shares).double().square().sum())
    torch.testing.assert_close(got, slope * torch.tensor(shares).double(), rtol=0, atol=close * float(got.abs().max()))
    assert slope < 0  # a chosen token that becomes more probable lowers the loss
    assert (exact.tokens[:, :, :3] == 0).all()
    assert (exact.tokens[batch["chosen_labels"].shape[0] - 1, 1, 7:] == 0).all()


@pytest.mark.parametrize("settings", FORMS)
def test_shares_add_up_to_the_loss_at_any_weights(settings: dict[str, Any]) -> None:
    model, batch, loss = with_lora(llama()), pairs(), DPO(**settings)
    shares = loss.token_losses(model, batch)
    torch.testing.assert_close(shares.sum((1, 2)), loss(model, batch), rtol=1e-5, atol=1e-5)
    held = loss.token_losses.hold(model, batch)
    torch.testing.assert_close(loss.token_losses(model, held), shares)
    assert (shares[:, :, :3] == 0).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("settings", FORMS)
def test_gauss_newton_products_equal_the_dense_matrix(settings: dict[str, Any]) -> None:
    """f''(h) dh dh' of each pair, f'' by autograd of the loss as a function of h."""
    model, batch, loss = with_lora(llama()), pairs(), DPO(**settings)
    products = Products(model, [batch], loss)
    u = torch.randn(products.flat.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros_like(u)
    for i in range(PAIRS):
        dh = gs.gradient(
            model, one(batch, i), lambda model, pair: loss._preference(model, pair, loss._logps(model, pair))
        )
        flat = torch.cat([g.flatten().double() for g in dh.values()])
        h = loss._preference(model, one(batch, i), loss._logps(model, one(batch, i))).detach().double()
        bent = torch.autograd.functional.hessian(lambda x: loss._value(x, {}).sum(), h).item()  # type: ignore[no-untyped-call]
        expected += bent * flat * (flat @ u)
    assert (products.gauss_newton(u) - expected).norm() <= 1e-4 * expected.norm()


class Words(nn.Module):
    """Logits of the next token from this one alone, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("settings", [{"beta": 0.8}, {"beta": 0.8, "form": "ipo"}])
def test_sampled_gradients_have_the_losss_own_curvature(settings: dict[str, Any]) -> None:
    """Their mean is zero and their second moment f''(h) dh dh', within 5 sigma."""
    draws, model = 4000, Words()
    pair = {
        "chosen_input_ids": torch.tensor([[0, 1, 2]]),
        "chosen_labels": torch.tensor([[IGNORE, 1, 2]]),
        "rejected_input_ids": torch.tensor([[0, 3]]),
        "rejected_labels": torch.tensor([[IGNORE, 3]]),
        "ref_chosen_logps": torch.tensor([-3.0]),
        "ref_rejected_logps": torch.tensor([-2.5]),
    }
    loss = DPO(**settings)
    many = {name: t.expand(draws, *t.shape[1:]) for name, t in pair.items()}
    drawn = loss.sampled_batch(model, many, range(draws))
    torch.testing.assert_close(loss(model, drawn), loss.sampled(model, many, range(draws)))
    h = loss._preference(model, pair, loss._logps(model, pair))
    (dh,) = torch.autograd.grad(h.sum(), model.table)
    for value in drawn["drawn"][:20]:
        (g,) = torch.autograd.grad(loss(model, {**pair, "drawn": value[None]}).sum(), model.table)
        torch.testing.assert_close(g, loss._slope(h.detach(), {"drawn": value[None]}) * dh)
    h = h.detach()
    curvature = torch.autograd.functional.hessian(lambda x: loss._value(x, {}).sum(), h).item()  # type: ignore[no-untyped-call]
    found = drawn["drawn"].double()
    slope = loss._slope(h, {"drawn": found})
    assert abs(float(slope.mean())) <= 5 * float(slope.std()) / draws**0.5
    square = slope.square()
    assert abs(float(square.mean()) - curvature) <= 5 * float(square.std()) / draws**0.5
    few = loss.sampled_batch(model, {name: t[:2] for name, t in many.items()}, [1, 7])
    assert few["drawn"].tolist() == [float(found[1]), float(found[7])]


def test_a_store_of_pairs_has_a_curvature_sample_and_says_what_it_holds(tmp_path: Any) -> None:
    model, batch = with_lora(llama()), pairs()
    loss = DPO(beta=0.2)
    batches = [{**batch, "ids": ["a", "b", "c", "d"]}]
    store = gs.extract(model, batches, loss, tmp_path / "pairs", spec=SPEC, curvature=8, progress=False)
    assert store.metadata["loss"]["kind"] == "dpo: sigmoid, beta 0.2, reference the model without its adapter"
    assert DPO.from_settings(store.metadata["loss"]["settings"]).kind == loss.kind
    features = gs.Capture(model, SPEC)(one(batch, 2), loss)
    vectors = [gs.gradient(model, one(batch, 2), loss)]
    rescorer = gs.Rescorer(
        model, lambda rows: [{n: t[list(rows)] for n, t in batch.items()}], loss.token_losses, vectors
    )
    top = gs.topk(store, features, k=4, scorer="dot", rescore=rescorer)
    assert top.ids[0, 0] == "c"
    assert top.tokens.shape == (1, 4, 2, 9)  # type: ignore[union-attr]
    assert gs.topk(store, features, k=1).ids[0, 0] == "c"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"form": "hinge"}, "form is 'hinge', expected 'sigmoid' or 'ipo'"),
        ({"beta": 0.0}, "expected a positive beta"),
        ({"label_smoothing": 0.5}, "a smoothing from 0 to below 0.5"),
        ({"label_smoothing": 0.1, "form": "ipo"}, "does not have: use 'sigmoid'"),
        ({"reference": "base"}, "reference is 'base', expected 'adapter'"),
    ],
)
def test_options_that_do_not_exist_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(gs.SpecError, match=words):
        DPO(**settings)
    with pytest.raises(gs.SpecError, match="those of 'diffusion', expected those of a DPO loss"):
        DPO.from_settings({"name": "diffusion"})
    with pytest.raises(gs.SpecError, match="reference is None"):
        DPO.from_settings(DPO(reference=nn.Linear(1, 1)).settings)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected_input_ids": None}, "the batch has no rejected_input_ids"),
        ({"chosen_labels": None}, "the batch has no chosen_labels"),
        ({"labels": torch.zeros(4, 3)}, "the batch has 'labels', which no answer of a pair has"),
        ({"chosen_token_type_ids": torch.zeros(4, 9)}, "rejected_token_type_ids None"),
        ({"rejected_input_ids": torch.zeros(3, 7)}, r"rejected_input_ids \(3, 7\), expected \(pairs, tokens\)"),
        ({"rejected_labels": torch.full((4, 7), IGNORE)}, "the rejected answer of pair 0 has no label that counts"),
        ({"ref_chosen_logps": torch.zeros(4)}, "has ref_chosen_logps but no ref_rejected_logps"),
        (
            {"ref_chosen_logps": torch.zeros(4, 9), "ref_rejected_logps": torch.zeros(4)},
            r"ref_chosen_logps has shape \(4, 9\), expected one sum",
        ),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], words: str) -> None:
    batch = {name: value for name, value in {**pairs(), **change}.items() if value is not None}
    with pytest.raises((gs.DataError, gs.ShapeError), match=words):
        DPO()(with_lora(llama()), batch)


def test_a_model_without_an_adapter_to_switch_off_is_refused() -> None:
    with pytest.raises(gs.DataError, match="has no adapter layers of PEFT: give reference="):
        DPO()(llama(), pairs())
    merged = with_lora(llama())
    merged.merge_adapter()
    with pytest.raises(gs.DataError, match=r"call model.unmerge_adapter\(\) first"):
        DPO()(merged, pairs())
    with pytest.raises(gs.ShapeError, match="got 1 seeds for 4 examples"):
        DPO().sampled(with_lora(llama()), pairs(), [1])


def test_a_new_adapter_prefers_nothing() -> None:
    """Where B is zero the model is its reference: h is 0 and the loss log 2."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    torch.testing.assert_close(DPO()(model, pairs()), torch.full((PAIRS,), math.log(2)))
