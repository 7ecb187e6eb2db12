"""Checks of what is trained on: the loss against the model's own, and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradsift.engine.check_batches import segments_of
from gradsift.engine.check_case import Case
from gradsift.engine.check_parts import repeatable
from gradsift.engine.check_report import Result, Shown
from gradsift.engine.losses import IGNORE

__all__ = ["labels", "loss", "loss_tokens", "shown"]

_NOT_FOR_THE_MODEL = ("ids", "segments")

_SHIFTS = {
    0: "label t is scored where token t itself is read, so the loss asks for a copy: it must be shifted by one",
    2: "label t is scored two tokens early: labels that are shifted already are shifted again",
}


def loss(case: Case) -> Result:
    """Whether there is one finite loss per example, equal to the model's own where it has one."""
    n = len(case.singles)
    with torch.no_grad(), repeatable(case.model):
        losses = case.loss_fn(case.model, case.batch)
    if not isinstance(losses, Tensor) or losses.shape != (n,):
        got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        return Result(
            "loss", "fail", f"loss_fn returns {got} for {n} examples, expected one loss each, ({n},): do not reduce it"
        )
    if not bool(losses.isfinite().all()):
        bad = [str(case.names[i]) for i in (~losses.isfinite()).nonzero().flatten().tolist()]
        return Result("loss", "fail", f"the loss is not finite on {', '.join(bad[:4])}: look at these examples")
    worst, word, said = 0.0, "", False
    with torch.no_grad(), repeatable(case.model):
        for single, name in zip(case.singles, case.names, strict=True):
            own = _own_loss(case, single)
            if own is None:
                break
            torch.manual_seed(0)
            value = float(case.loss_fn(case.model, single)[0])
            error = min(abs(value - own.mean * count) / (own.mean * count + 1e-6) for count in (own.tokens, 1))
            said = True
            if error > worst:
                worst, word = error, _explain(value, own, name)
    limit = 2e-2 if case.low_precision else 1e-3
    if worst > limit:
        return Result("loss", "fail", word, worst, limit)
    if not said:
        return Result("loss", "ok", "one finite loss per example; the model returns none of its own to compare with")
    tokens = loss_tokens(case, case.batch)
    level = f"{float(losses.sum()) / tokens:.3f} per token; " if tokens else ""
    return Result("loss", "ok", f"{level}equal to the model's own loss of the same labels", worst, limit)


def labels(case: Case) -> Result:
    """Which tokens of the examples carry loss, and whether any should not."""
    tokens = counted = padding = same = ahead = comparable = 0
    masked: list[str] = []
    for batch, n in case.pool:
        found = _label_batch(batch)
        if found is None:
            return Result("labels", "skip", "the batch has no input_ids and labels to look at")
        ids, target, mask = found
        on = target != IGNORE
        tokens += int(mask.sum())
        counted += int(on[:, 1:].sum())
        padding += int((on & ~mask).sum())
        comparable += int(on[:, 1:].sum())
        same += int((on & (target == ids))[:, 1:].sum())
        ahead += int((on & (target == ids.roll(-1, 1)))[:, 1:-1].sum())
        masked += [str(case_id) for case_id in _all_masked(case, batch, n)]
    share = f"{counted:,} of {tokens:,} tokens carry loss ({counted / max(tokens, 1):.0%})"
    if padding:
        return Result(
            "labels",
            "fail",
            f"{padding:,} labels lie on padding, so the loss trains on it: set labels to {IGNORE} where "
            "attention_mask is 0",
            padding / counted,
            0.0,
        )
    if comparable and same / comparable < 0.5 < ahead / comparable:
        return Result(
            "labels",
            "fail",
            f"labels are shifted already ({ahead / comparable:.0%} equal the next token) and the loss shifts them "
            "again: give labels that line up with input_ids",
            same / comparable,
            0.5,
        )
    examples = sum(n for _, n in case.pool)
    if len(masked) == examples:
        return Result("labels", "fail", f"no label of any example carries loss ({share}): all gradients are zero")
    if masked:
        return Result(
            "labels",
            "warn",
            f"{len(masked)} of {examples} examples carry no loss, so their rows are zero: {', '.join(masked[:4])}",
            len(masked) / examples,
            0.0,
        )
    if comparable and same < comparable:
        share += f"; {1 - same / comparable:.0%} of the labels differ from the tokens that they stand at"
    return Result("labels", "ok", share, counted / max(tokens, 1))


def shown(case: Case) -> Shown | None:
    """The first example with the loss of each token."""
    per_token = getattr(case.loss_fn, "token_losses", None)
    found = _label_batch(case.singles[0])
    if per_token is None or found is None:
        return None
    ids, target, _ = found
    with torch.no_grad(), repeatable(case.model):
        losses = per_token(case.model, case.singles[0])[0].float().cpu()
    trained = target[0] != IGNORE
    trained[0] = False  # nothing predicts the first token
    return Shown(case.names[0], tuple(ids[0].tolist()), tuple(trained.tolist()), tuple(losses.tolist()))


def loss_tokens(case: Case, batch: Any) -> int:
    """Labels that carry loss in a batch; 0 where the loss does not say."""
    count = getattr(case.loss_fn, "loss_tokens", None)
    return int(count(batch).sum()) if count is not None else 0


class _Own(NamedTuple):
    mean: float
    tokens: int
    logits: Tensor
    labels: Tensor


def _own_loss(case: Case, single: Any) -> _Own | None:
    """The loss that the model itself computes for one example's labels; None where it has none."""
    found = _label_batch(single)
    if found is None or not hasattr(case.model, "config"):
        return None
    _, target, mask = found
    target = torch.where(mask, target, IGNORE) if "labels" not in single else target
    device = next(case.model.parameters()).device
    inputs = {k: v.to(device) for k, v in single.items() if isinstance(v, Tensor) and k not in _NOT_FOR_THE_MODEL}
    inputs["labels"] = target.to(device)
    torch.manual_seed(0)
    try:
        output = case.model(**inputs)
    except (TypeError, ValueError):
        return None
    own, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if own is None or logits is None or own.ndim or not bool(own.isfinite()):
        return None
    counted = int((target[:, 1:] != IGNORE).sum())
    return _Own(float(own), counted, logits.detach(), inputs["labels"])


def _explain(value: float, own: _Own, name: str | int) -> str:
    """Why a loss differs from the model's own."""
    for shift, cause in _SHIFTS.items():
        length = own.labels.shape[1] - shift
        losses = functional.cross_entropy(
            own.logits[0, :length].float(), own.labels[0, shift:], ignore_index=IGNORE, reduction="sum"
        )
        count = max(int((own.labels[0, shift:] != IGNORE).sum()), 1)
        if any(abs(value - float(losses) / c) < 1e-3 * float(losses) / c for c in (1, count)):
            return f"the loss is shifted by {shift} tokens instead of 1: {cause}"
    return (
        f"the loss of example {name} is {value:.4g}, but the model's own for the same labels is {own.mean:.4g} per "
        f"token and {own.mean * own.tokens:.4g} in all: look at its shift, mask and reduction"
    )


def _label_batch(batch: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Token ids, labels and attention (n, T) of a causal language model's batch, on the CPU."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    attended = mask.cpu() != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids) != 0
    target = batch.get("labels")
    target = torch.where(attended, ids, IGNORE) if target is None else target.cpu()
    if target.shape != ids.shape or any(key.startswith("decoder_") for key in batch):
        return None
    return ids, target, attended


def _all_masked(case: Case, batch: Any, n: int) -> list[str | int]:
    """Ids of examples without a label that counts."""
    count = getattr(case.loss_fn, "loss_tokens", None)
    if count is None:
        found = _label_batch(batch)
        if found is None or segments_of(batch) is not None:
            return []
        counts = (found[1][:, 1:] != IGNORE).sum(1)
    else:
        counts = count(batch)
    names = batch.get("ids", range(n))
    return [names[i] for i in (counts == 0).nonzero().flatten().tolist()]
