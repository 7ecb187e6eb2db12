"""Distillation: how far a student's next-token distribution is from a teacher's stored one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from gradsift.engine.losses.language import LanguageModelLoss, at_their_place, per_example, predictions
from gradsift.engine.losses.softmax import IGNORE, upcast
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = ["Distillation"]

Direction = Literal["forward", "reverse"]

_COLUMNS = ("teacher_logits", "teacher_topk_logprobs", "teacher_topk_ids")


class Distillation:
    """Divergence between a teacher's and the student's next token, summed over each example's counted labels.

    With q the teacher's and p the student's softmax of logits over the temperature: "forward" is
    ``KL(q | p) = sum q (log q - log p)``, "reverse" is ``KL(p | q)``. As of TRL's
    ``DistillationTrainer`` with beta 0 or 1, before the mean over tokens.

    A batch is that of ``language_model`` with the teacher's numbers for the same ``input_ids``, lined up with the
    logits: position t tells of the token after t (for encoder-decoders, of label t). Either ``teacher_logits``
    (n, T, V), for which log-probabilities will do; or ``teacher_topk_logprobs`` and ``teacher_topk_ids`` (n, T, k),
    log-probabilities at the loss's temperature of the teacher's k likeliest tokens: what is left of both distributions
    is then compared as one more outcome. Labels say where loss counts, and nothing else of them is read.

    Memory: float32 copies of the logits at all counted places at once. Both derivative modes work.

    Args:
        direction: see above.
        temperature: what the logits of both are divided by. The divergence is not multiplied by its square.

    Raises:
        SpecError: an option is none of these.

    Source: Hinton et al. 2015 (arXiv 1503.02531); Agarwal et al. 2024 (GKD, arXiv 2306.13649); TRL.
    """

    def __init__(self, direction: Direction = "forward", temperature: float = 1.0) -> None:
        if direction not in get_args(Direction):
            raise SpecError(f"direction is {direction!r}, expected 'forward' or 'reverse'")
        self.direction = direction
        self._language = LanguageModelLoss(temperature)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Divergence of each example, summed over its tokens, (n,)."""
        if batch.get("drawn") is not None:
            return self._language(model, _drawn(batch))
        logits, labels, segments = predictions(model, _seen(batch), self._language.temperature)
        return per_example(self._divergences(logits, labels != IGNORE, batch), segments)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Divergence at each token, at its own place: as of ``language_model``."""
        if batch.get("drawn") is not None:
            return self._language.token_losses(model, _drawn(batch))
        logits, labels, segments = predictions(model, _seen(batch), self._language.temperature)
        return at_their_place(model, self._divergences(logits, labels != IGNORE, batch), segments)

    def loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels that count, per example: int64 (n,), on the CPU."""
        return self._language.loss_tokens(_seen(batch))

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Cross-entropy of tokens drawn from the student, at the temperature.

        The second moment of its gradients is the student's Fisher information: the Gauss-Newton matrix of "forward",
        and of both directions the second derivative where the student agrees with the teacher.

        Args:
            seeds: n integers, one per example.

        Returns:
            shape (n,), differentiable through the loss and not through the draw.
        """
        return self._language.sampled(model, _seen(batch), seeds)

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the tokens that ``sampled`` draws, as ``drawn``: its plain loss is that of ``sampled``."""
        kept = self._language.sampled_batch(model, _seen(batch), seeds)
        read = {"decoder_input_ids": kept["decoder_input_ids"]} if "decoder_input_ids" in kept else {}
        return {**batch, **read, "drawn": kept["labels"]}

    @property
    def kind(self) -> str:
        """Everything that is measured, in words: two losses measure the same if and only if these agree."""
        return f"distillation: {self.direction} divergence at temperature {self._language.temperature:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as JSON, for ``from_settings``."""
        return {"name": "distillation", "direction": self.direction, "temperature": self._language.temperature}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """The loss whose ``settings`` these are.

        Raises:
            SpecError: they are those of another loss.
        """
        options = dict(settings)
        if options.pop("name", None) != "distillation":
            raise SpecError(f"the settings are those of {settings.get('name')!r}, expected those of a distillation")
        return cls(**options)

    def __repr__(self) -> str:
        return f"Distillation({self.kind!r})"

    def _divergences(self, logits: Tensor, counted: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Of each position, (n, T); the logits are over the temperature already."""
        student = upcast(logits[counted]).log_softmax(-1)
        teacher, student = self._outcomes(student, logits, counted, batch)
        if self.direction == "forward":
            q = teacher.exp()
            each = torch.where(q > 0, q * (teacher - student), 0.0).sum(-1)
        else:
            each = (student.exp() * (student - teacher)).sum(-1)
        return each.new_zeros(counted.shape).index_put((counted,), each)

    def _outcomes(
        self, student: Tensor, logits: Tensor, counted: Tensor, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the teacher and of the student for the same outcomes, (places, outcomes) each."""
        whole, top, ids = (batch.get(name) for name in _COLUMNS)
        if (whole is None) == (top is None) or (top is None) != (ids is None):
            held = [name for name in _COLUMNS if batch.get(name) is not None]
            raise DataError(
                f"the batch has {' and '.join(held) or 'nothing'} of the teacher, expected teacher_logits, or "
                "teacher_topk_logprobs with teacher_topk_ids"
            )
        if whole is not None:
            if whole.shape != logits.shape:
                raise ShapeError(
                    f"teacher_logits have shape {tuple(whole.shape)}, expected those of the student "
                    f"{tuple(logits.shape)}: one vocabulary, the same tokens"
                )
            teacher = whole.to(student.device)[counted].to(student) / self._language.temperature
            return teacher.log_softmax(-1), student
        assert top is not None and ids is not None
        if top.shape != ids.shape or top.shape[:-1] != logits.shape[:-1]:
            raise ShapeError(
                f"teacher_topk_logprobs have shape {tuple(top.shape)} and teacher_topk_ids {tuple(ids.shape)}, "
                f"expected {(*logits.shape[:-1], 'k')} of both"
            )
        teacher = top.to(student.device)[counted].to(student)
        places = ids.to(student.device)[counted]
        return _with_rest(teacher), _with_rest(student.gather(-1, places))


def _with_rest(logps: Tensor) -> Tensor:
    """Log-probabilities (places, k), and that of all other tokens together."""
    rest = 1.0 - logps.exp().sum(-1, keepdim=True)
    # A top k that holds everything, but for rounding, leaves an outcome that neither has.
    return torch.cat([logps, rest.clamp_min(torch.finfo(logps.dtype).eps).log()], dim=-1)


def _seen(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model may see."""
    return {name: value for name, value in batch.items() if name not in (*_COLUMNS, "drawn")}


def _drawn(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {**_seen(batch), "labels": batch["drawn"]}
