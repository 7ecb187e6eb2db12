"""Checks of what is trained on: the loss against the model's own, and the labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gradsift.engine.check.batches import segments_of
from gradsift.engine.check.case import Case
from gradsift.engine.check.denoise import target
from gradsift.engine.check.parts import repeatable
from gradsift.engine.check.report import Result, Shown
from gradsift.engine.losses import IGNORE, Diffusion

__all__ = ["labels", "loss", "loss_tokens", "shown"]

_NOT_FOR_THE_MODEL = ("ids", "segments")

_SHIFTS = {
    -1: "label t is scored where token t itself is read, so the loss asks for a copy",
    1: "label t is scored a token too early: labels that are shifted already are shifted again",
}
"""What it means when a loss shifts labels by one less, or one more, than the model does."""


class _Labels(NamedTuple):
    """Labels of a language model's batch, each of shape (n, T), on the CPU.

    Attributes:
        ids: the tokens that labels line up with; an encoder-decoder's labels themselves.
        target: labels, -100 where there is no loss.
        attended: which positions are no padding.
        shift: how far before its token a label is scored: 1, or 0 for an encoder-decoder.
    """

    ids: Tensor
    target: Tensor
    attended: Tensor
    shift: int

    @property
    def counted(self) -> Tensor:
        """Which labels carry loss, (n, T - shift)."""
        return self.target[:, self.shift :] != IGNORE


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
        kind = getattr(case.loss_fn, "kind", None)
        what = "one finite loss per example" + (f" ({kind})" if kind is not None else "")
        return Result("loss", "ok", f"{what}; the model returns none of its own to compare with")
    tokens = loss_tokens(case, case.batch)
    level = f"{float(losses.sum()) / tokens:.3f} per token; " if tokens else ""
    return Result("loss", "ok", f"{level}equal to the model's own loss of the same labels", worst, limit)


def labels(case: Case) -> Result:
    """Which tokens of the examples carry loss, and whether any should not; what a diffusion model predicts."""
    if isinstance(case.loss_fn, Diffusion):
        return target(case, case.loss_fn)
    tokens = counted = padding = same = ahead = comparable = 0
    masked: list[str] = []
    for batch, n in case.pool:
        found = _labels_of(batch)
        if found is None:
            return Result("labels", "skip", "the batch has no input_ids and labels to look at")
        on = found.target != IGNORE
        tokens += int(found.attended.sum())
        counted += loss_tokens(case, batch) or int(found.counted.sum())
        padding += int((on & ~found.attended).sum())
        masked += [str(name) for name in _all_masked(case, batch, found, n)]
        if found.shift:
            comparable += int(found.counted.sum())
            same += int((on & (found.target == found.ids))[:, 1:].sum())
            ahead += int((on & (found.target == found.ids.roll(-1, 1)))[:, 1:-1].sum())
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
    found = _labels_of(case.singles[0])
    if per_token is None or found is None:
        return None
    with torch.no_grad(), repeatable(case.model):
        losses = per_token(case.model, case.singles[0])[0].float().cpu()
    trained = found.target[0] != IGNORE
    trained[: found.shift] = False  # nothing predicts the first token
    return Shown(case.names[0], tuple(found.ids[0].tolist()), tuple(trained.tolist()), tuple(losses.tolist()))


def loss_tokens(case: Case, batch: Any) -> int:
    """Labels that carry loss in a batch; 0 where the loss does not say."""
    count = getattr(case.loss_fn, "loss_tokens", None)
    return int(count(batch).sum()) if count is not None else 0


class _Own(NamedTuple):
    """What the model says of one example: its mean loss, of how many labels, and the logits behind it."""

    mean: float
    tokens: int
    logits: Tensor
    labels: Tensor
    shift: int


def _own_loss(case: Case, single: Any) -> _Own | None:
    """The loss that the model itself computes for one example's labels; None where it has none."""
    found = _labels_of(single)
    if found is None or not hasattr(case.model, "config"):
        return None
    device = next(case.model.parameters()).device
    inputs = {k: v.to(device) for k, v in single.items() if isinstance(v, Tensor) and k not in _NOT_FOR_THE_MODEL}
    inputs["labels"] = found.target.to(device)
    torch.manual_seed(0)
    try:
        output = case.model(**inputs)
    except (TypeError, ValueError):
        return None
    own, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if own is None or logits is None or own.ndim or not bool(own.isfinite()):
        return None
    return _Own(float(own), int(found.counted.sum()), logits.detach(), inputs["labels"], found.shift)


def _explain(value: float, own: _Own, name: str | int) -> str:
    """Why a loss differs from the model's own."""
    for more, cause in _SHIFTS.items():
        shift = own.shift + more
        target = own.labels[0, max(shift, 0) :]
        logits = own.logits[0, max(-shift, 0) :][: len(target)].float()
        losses = functional.cross_entropy(logits, target[: len(logits)], ignore_index=IGNORE, reduction="sum")
        counts = (1, max(int((target != IGNORE).sum()), 1))
        if any(abs(value - float(losses) / count) < 1e-3 * float(losses) / count for count in counts):
            return f"the loss is shifted by {shift} tokens instead of {own.shift}: {cause}"
    return (
        f"the loss of example {name} is {value:.4g}, but the model's own for the same labels is {own.mean:.4g} per "
        f"token and {own.mean * own.tokens:.4g} in all: look at its shift, mask and reduction"
    )


def _labels_of(batch: Any) -> _Labels | None:
    """The labels of a language model's batch; None for anything else."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return None
    ids, target = batch["input_ids"].cpu(), batch.get("labels")
    if isinstance(target, Tensor) and (target.shape != ids.shape or any(key.startswith("decoder_") for key in batch)):
        target = target.cpu()
        mask = batch.get("decoder_attention_mask")
        attended = mask.cpu() != 0 if isinstance(mask, Tensor) else target != IGNORE
        return _Labels(target, target, attended, 0)
    mask = batch.get("attention_mask")
    attended = mask.cpu() != 0 if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(ids) != 0
    return _Labels(ids, torch.where(attended, ids, IGNORE) if target is None else target.cpu(), attended, 1)


def _all_masked(case: Case, batch: Any, found: _Labels, n: int) -> list[str | int]:
    """Ids of examples without a label that counts."""
    count = getattr(case.loss_fn, "loss_tokens", None)
    if count is None and segments_of(batch) is not None:
        return []
    counts = found.counted.sum(1) if count is None else count(batch)
    names = batch.get("ids", range(n))
    return [names[i] for i in (counts == 0).nonzero().flatten().tolist()]
