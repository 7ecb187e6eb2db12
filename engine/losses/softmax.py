"""Softmax over many classes, in chunks: cross-entropy with both derivatives, and labels drawn from the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["IGNORE", "bend", "cross_entropy", "draw", "upcast"]

IGNORE = -100
"""The label of a place that carries no loss."""

_CHUNK_NUMBERS = 1 << 24
"""Logits that are upcast at a time: 64 MiB of float32."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each place: logits (..., C) and labels (...) give (...), 0 where the label is -100; float32 or wider."""
    flat = logits.reshape(-1, logits.shape[-1])
    losses: Tensor = _TokenLosses.apply(flat, labels.reshape(-1))  # type: ignore[no-untyped-call]
    return losses.view(labels.shape)


def bend(logits: Tensor, labels: Tensor, tangent: Tensor) -> Tensor:
    """The second derivative of ``cross_entropy`` at the logits times a tangent: ``(diag(p) - p p') t``, place by place.

    That is also the covariance of the slopes of labels drawn from the softmax p.

    Args:
        logits, tangent: (..., C).
        labels: (...); only where they count matters.

    Returns:
        (..., C) in the tangent's dtype, 0 where the label is -100.
    """
    flat, moved = (t.reshape(-1, t.shape[-1]) for t in (logits.detach(), tangent))
    out = torch.zeros_like(moved)
    for rows in _chunks(labels.reshape(-1), flat.shape[-1]):
        p, t = upcast(flat[rows]).softmax(-1), upcast(moved[rows])
        out[rows] = (p * (t - (p * t).sum(-1, keepdim=True))).to(out.dtype)
    return out.view_as(tangent)


def draw(logits: Tensor, counted: Tensor, uniform: Tensor) -> Tensor:
    """Labels by inverse CDF of the softmax where ``counted``, -100 elsewhere.

    Args:
        logits: (..., C).
        counted: bool (...).
        uniform: float64 in [0, 1), (...).

    Returns:
        int64 (...).
    """
    flat, places = logits.reshape(-1, logits.shape[-1]), uniform.to(logits.device).reshape(-1)
    drawn = torch.full((len(flat),), IGNORE, device=logits.device)
    for rows in _chunks(torch.where(counted, 0, IGNORE).to(logits.device).reshape(-1), flat.shape[-1]):
        # Float64 sums: a float32 running sum over 10^5 tokens would shift the draws of the rare ones.
        cdf = upcast(flat[rows]).softmax(-1).cumsum(-1, dtype=torch.float64)
        place = torch.searchsorted(cdf, places[rows, None] * cdf[:, -1:], right=True)
        drawn[rows] = place.squeeze(-1).clamp_(max=flat.shape[-1] - 1)
    return drawn.view(counted.shape)


def upcast(logits: Tensor) -> Tensor:
    """float32, or float64 where it is that."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(labels: Tensor, vocabulary: int) -> list[Tensor | slice]:
    """The positions that carry loss, in runs that are upcast together."""
    step = max(1, _CHUNK_NUMBERS // vocabulary)
    counted = labels != IGNORE
    if bool(counted.all()):
        return [slice(i, i + step) for i in range(0, len(labels), step)]
    return list(torch.split(counted.nonzero().squeeze(1), step)) if bool(counted.any()) else []


class _TokenLosses(torch.autograd.Function):
    """logsumexp(logits) - logits[label] per row, upcast chunk by chunk; backward makes the softmax again."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Losses of shape (rows,) for logits (rows, vocabulary), 0 where the label is -100."""
        losses = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in _chunks(labels, logits.shape[-1]):
            losses[rows] = functional.cross_entropy(upcast(logits[rows]), labels[rows], reduction="none")
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """(softmax - one_hot(label)) * grad."""
        logits, labels = ctx.saved_tensors
        chunks = _chunks(labels, logits.shape[-1])
        if len(chunks) == 1 and isinstance(chunks[0], slice):  # nothing is left out: no second copy of the logits
            return _slope(logits, labels, grad).to(logits.dtype), None
        out = torch.zeros_like(logits)
        for rows in chunks:
            out[rows] = _slope(logits[rows], labels[rows], grad[rows]).to(out.dtype)
        return out, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        """<softmax, tangent> - tangent[label]."""
        logits, labels = ctx.saved_tensors
        out: Tensor = logits.new_zeros(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        for rows in _chunks(labels, logits.shape[-1]):
            step = upcast(tangent[rows])
            mean = (upcast(logits[rows]).softmax(-1) * step).sum(-1)
            out[rows] = mean - step.gather(1, labels[rows, None]).squeeze(1)
        return out


def _slope(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """(softmax - one_hot(label)) * grad, row by row, in memory of its own."""
    slope = upcast(logits).softmax(-1)
    slope.scatter_add_(1, labels[:, None], slope.new_full((len(slope), 1), -1.0))
    return slope.mul_(grad[:, None])
