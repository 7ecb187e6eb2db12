"""The loss of a language model, one sum per example and one number per token, in chunks.

A loss of this library is any callable ``loss_fn(model, batch) -> (n,)``. The one here also offers what the
engine uses when it is there: ``token_losses``, ``loss_tokens``, ``sampled`` and ``kind``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.engine.losses.counter import counter_uniform
from gradsift.engine.losses.inside import find_inside
from gradsift.engine.losses.softmax import IGNORE, bend, cross_entropy, draw
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = [
    "IGNORE",
    "LanguageModelLoss",
    "at_their_place",
    "counted_labels",
    "language_model",
    "per_example",
    "predictions",
]

_NOT_FOR_THE_MODEL = frozenset({"ids", "segments", "labels"})


class LanguageModelLoss:
    """Cross-entropy of the next token, summed over each example's counted labels.

    Completion-only training is this loss with labels of -100 at the prompt.

    A batch holds ``input_ids`` of shape (n, T) and, if wanted, ``attention_mask``, ``labels`` (-100: no
    loss; without labels every attended token counts) and any other tensor that the model's forward takes.
    Causal models predict label t from position t - 1; for encoder-decoders
    (``model.config.is_encoder_decoder``) labels line up with the decoder's positions and
    ``decoder_input_ids`` are made by the model unless given. A packed batch is one row of tokens with
    ``segments``, its n + 1 offsets: the shift never crosses them, and ``position_ids`` that restart at each
    of them are added unless given (a 2-D attention mask cannot separate documents and is left out).

    Memory: logits stay in the model's dtype; float32 copies are made 64 MiB at a time, forwards and
    backwards. Both derivative modes work, so the loss can be differentiated by ``backward`` and by
    ``torch.func.jvp``.

    Args:
        temperature: what logits are divided by first.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise SpecError(f"temperature is {temperature}, expected a positive number")
        self.temperature = temperature

    @property
    def kind(self) -> str:
        """``"language_model"``, with the temperature where there is one."""
        return "language_model" if self.temperature == 1.0 else f"language_model at temperature {self.temperature:g}"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Sum of the token losses of each example, float32 (float64 for a float64 model) of shape (n,)."""
        logits, labels, segments = predictions(model, batch, self.temperature)
        return per_example(cross_entropy(logits, labels), segments)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each token at its own place, 0 where there is none.

        Returns:
            shape (n, T), lined up with ``input_ids`` for causal models (position 0 is 0) and with
            ``labels`` for encoder-decoders. A packed row comes back as its n documents, padded with zeros
            to the longest.
        """
        logits, labels, segments = predictions(model, batch, self.temperature)
        return at_their_place(model, cross_entropy(logits, labels), segments)

    def loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels that count, per example: int64 of shape (n,), on the CPU.

        A batch is taken for an encoder-decoder's when it has a ``decoder_*`` key, or labels of another
        shape than ``input_ids``; then its first label counts too.
        """
        segments = _segments(batch)
        labels = _labels(batch).cpu()
        counted = (labels if _aligned(batch, labels) else _shift(labels, segments)) != IGNORE
        return per_example(counted.to(torch.int64), segments)

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Loss of labels drawn from the model's own softmax at the counted positions.

        Its gradients are draws whose second moment is the true Fisher information. The label of an
        example's j-th counted token is drawn by inverse CDF with ``counter_uniform(seed, j)``: the same for
        any batch and padding.

        Args:
            seeds: n integers, one per example.

        Returns:
            shape (n,), differentiable through the loss and not through the draw.
        """
        logits, labels, segments = predictions(model, batch, self.temperature)
        drawn = _draw(logits.detach(), labels, segments, seeds)
        return per_example(cross_entropy(logits, drawn), segments)

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the labels that ``sampled`` draws, to be kept: its plain loss is that of ``sampled``.

        Args:
            seeds: n integers, one per example.

        Returns:
            the batch with new ``labels`` (int64, on the CPU); an encoder-decoder's decoder still reads the
            old ones.
        """
        with torch.no_grad():
            logits, labels, segments = predictions(model, batch, self.temperature)
        drawn = _draw(logits, labels, segments, seeds).cpu()
        if not _is_encoder_decoder(model):
            return {**batch, "labels": functional.pad(drawn[:, :-1], (1, 0), value=IGNORE)}
        read = batch.get("decoder_input_ids")
        return {**batch, "labels": drawn, "decoder_input_ids": _shifted_right(model, labels) if read is None else read}

    def gauss_newton(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The outputs that the loss is a convex function of, and the product with its second derivative at them.

        Returns:
            logits (n, T, V); and ``hessian(t)`` for t of their shape: see ``softmax.bend``.
        """
        logits, labels, _ = predictions(model, batch, self.temperature)
        return logits, lambda tangent: bend(logits, labels, tangent)


language_model = LanguageModelLoss()
"""The loss to pass as ``loss_fn`` for any causal or encoder-decoder language model."""


def counted_labels(batch: Mapping[str, Any], model: nn.Module | None = None) -> Tensor:
    """Which labels of a padded batch carry loss, at their own place: bool (n, T). Causal models predict no first token.

    Args:
        model: whether it is an encoder-decoder; guessed as by ``loss_tokens`` unless given.
    """
    labels = _labels(batch)
    counted = labels != IGNORE
    if not (_aligned(batch, labels) if model is None else _is_encoder_decoder(model)):
        counted[:, :1] = False
    return counted


def predictions(
    model: nn.Module, batch: Mapping[str, Any], temperature: float = 1.0
) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """What a language model predicts of a batch.

    Returns:
        logits (n, T, V) over the temperature; the label that each position predicts (n, T), -100 for none; and the
        offsets of a packed batch's documents.
    """
    segments = _segments(batch)
    labels = _labels(batch)
    encoder_decoder = _is_encoder_decoder(model)
    if encoder_decoder and "labels" not in batch:
        raise DataError("the model is an encoder-decoder but the batch has no labels: give the target tokens as labels")
    if encoder_decoder and segments is not None:
        raise DataError(
            "a packed batch (segments) needs a causal model, and this one is an encoder-decoder: pad instead"
        )
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k not in _NOT_FOR_THE_MODEL}
    options: dict[str, Any] = {}
    if segments is not None:
        if inputs.get("attention_mask", torch.empty(0)).ndim == 2:
            del inputs["attention_mask"]
        if "position_ids" not in inputs:
            starts = np.repeat(segments[:-1], np.diff(segments))
            inputs["position_ids"] = torch.from_numpy(np.arange(len(starts)) - starts)[None].to(device)
    if encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _shifted_right(model, labels.to(device))
    if _takes(model, "use_cache"):
        options["use_cache"] = False
    logits = _logits(model(**inputs, **options))
    labels = labels.to(logits.device)
    target = labels if encoder_decoder else _shift(labels, segments)
    if logits.shape[:-1] != target.shape:
        raise ShapeError(
            f"the model gave logits of shape {tuple(logits.shape)} for labels of {tuple(target.shape)}: "
            "expected one row of logits per label"
        )
    return logits if temperature == 1.0 else logits / temperature, target, segments


def at_their_place(model: nn.Module, losses: Tensor, segments: np.ndarray | None) -> Tensor:
    """Losses (n, T) moved from the positions that predict to the tokens that are predicted.

    A packed row comes back as its documents, padded with zeros to the longest.
    """
    if not _is_encoder_decoder(model):
        losses = functional.pad(losses[:, :-1], (1, 0))
    if segments is None:
        return losses
    lengths = np.diff(segments).tolist()
    longest = max(lengths, default=0)
    parts = torch.split(losses[0], lengths)
    return torch.stack([functional.pad(part, (0, longest - len(part))) for part in parts])


def _shifted_right(model: nn.Module, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder reads to predict these labels."""
    prepare = find_inside(model, lambda m: getattr(m, "prepare_decoder_input_ids_from_labels", None))
    if prepare is None:
        raise DataError(f"{type(model).__name__} cannot make decoder_input_ids from labels: put them in the batch")
    return prepare(labels)  # type: ignore[no-any-return]


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ShapeError(f"the model returned {type(output).__name__} without logits: expected a language model's head")
    return logits


def _aligned(batch: Mapping[str, Any], labels: Tensor) -> bool:
    """Whether labels line up with a decoder's positions, so that the first of them counts too."""
    return any(k.startswith("decoder_") for k in batch) or labels.shape != batch["input_ids"].shape


def _labels(batch: Mapping[str, Any]) -> Tensor:
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            labels = labels.masked_fill(mask == 0, IGNORE)
    if labels.ndim != 2:
        raise ShapeError(f"labels have shape {tuple(labels.shape)}, expected (examples, tokens)")
    return labels  # type: ignore[no-any-return]


def _segments(batch: Mapping[str, Any]) -> np.ndarray | None:
    segments = batch.get("segments")
    if segments is None:
        return None
    offsets = np.asarray(segments.cpu() if isinstance(segments, Tensor) else segments, dtype=np.int64)
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or shape[0] != 1:
        raise ShapeError(f"packed input_ids have shape {shape}, expected (1, tokens)")
    if (
        offsets.ndim != 1
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != shape[1]
        or (np.diff(offsets) < 0).any()
    ):
        raise ShapeError(f"segments are {offsets.tolist()}, expected non-decreasing offsets from 0 to {shape[1]}")
    return offsets


def _shift(labels: Tensor, segments: np.ndarray | None) -> Tensor:
    """Labels moved to the position that predicts them, never across a document's border."""
    shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if segments is not None:
        ends = segments[1:][np.diff(segments) > 0] - 1
        shifted[0, torch.from_numpy(ends).to(labels.device)] = IGNORE
    return shifted


def per_example(tokens: Tensor, segments: np.ndarray | None) -> Tensor:
    """Sums over each example's tokens, (n,)."""
    if segments is None:
        return tokens.sum(dim=1)
    return torch.stack([part.sum() for part in torch.split(tokens[0], np.diff(segments).tolist())])


def _draw(logits: Tensor, labels: Tensor, segments: np.ndarray | None, seeds: Sequence[int]) -> Tensor:
    """Labels (n, T) sampled from the softmax where a label counts, -100 elsewhere."""
    counted = (labels != IGNORE).cpu().numpy()
    seed = np.array([int(s) & (1 << 64) - 1 for s in seeds], dtype=np.uint64)
    examples = len(labels) if segments is None else len(segments) - 1
    if len(seed) != examples:
        raise ShapeError(f"got {len(seed)} seeds for {examples} examples: give one per example")
    if segments is None:
        row, ordinal = seed[:, None], counted.cumsum(1) - 1
    else:
        lengths = np.diff(segments)
        before = np.concatenate([[0], counted[0].cumsum()])[segments[:-1]]
        row, ordinal = np.repeat(seed, lengths)[None], counted.cumsum(1) - 1 - np.repeat(before, lengths)
    uniform = torch.from_numpy(counter_uniform(row, np.where(counted, ordinal, 0)))
    return draw(logits, labels != IGNORE, uniform)


def _is_encoder_decoder(model: nn.Module) -> bool:
    config = find_inside(model, lambda m: getattr(m, "config", None))
    return bool(getattr(config, "is_encoder_decoder", False))


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether a forward names this argument: wrappers only say **kwargs."""
    return bool(find_inside(model, lambda m: argument in inspect.signature(m.forward).parameters))
