"""Direct preference optimisation: a pair of a chosen and a rejected answer is one example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradsift.engine.losses.counter import counter_key, counter_normal, counter_uniform
from gradsift.engine.losses.language import language_model
from gradsift.engine.losses.pairs import STORED, counted_in, rows_of
from gradsift.engine.losses.reference import Reference, reference_logps, reference_name
from gradsift.kernels.errors import DataError, ShapeError, SpecError

__all__ = ["DPO"]

Form = Literal["sigmoid", "ipo"]

_HELD, _DRAWN = "held", "drawn"


class DPO:
    """Loss of a preference, by how much more the model prefers the chosen answer than a reference model does.

    With ``h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))``, log-probabilities summed
    over the labels that count:

    - "sigmoid": ``-(1 - s) logsigmoid(beta h) - s logsigmoid(-beta h)``, s the label smoothing;
    - "ipo": ``(h - 1 / (2 beta))^2``, with each answer's log ratio divided by its number of labels first.

    As of TRL's ``DPOTrainer`` (``loss_type``, ``beta``, ``label_smoothing``) with one pair's loss for its mean.

    A batch holds ``chosen_input_ids`` (n, T) and ``chosen_labels`` (n, T), -100 at the prompt and at padding, if wanted
    ``chosen_attention_mask`` and more that the model takes; the same as ``rejected_...``, of any length. With
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (n,), sums as TRL precomputes them, the reference is not run. The
    model sees 2 n rows, a pair's one after another.

    Args:
        beta: how far the model may go from the reference.
        form: see above.
        label_smoothing: how probable it is that a label is wrong, of "sigmoid".
        reference: "adapter", the model itself with its PEFT adapters off; or another model. It is run where the batch
            holds no log-probabilities; it must not change with the captured parameters.

    Raises:
        SpecError: an option is none of these.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); Azar et al. 2023 (IPO, arXiv 2310.12036); TRL.
    """

    def __init__(
        self,
        beta: float = 0.1,
        form: Form = "sigmoid",
        label_smoothing: float = 0.0,
        reference: Reference = "adapter",
    ) -> None:
        if form not in get_args(Form):
            raise SpecError(f"form is {form!r}, expected 'sigmoid' or 'ipo'")
        if not beta > 0 or not 0 <= label_smoothing < 0.5:
            raise SpecError(
                f"beta is {beta} and label_smoothing {label_smoothing}, expected a positive beta and a smoothing from "
                "0 to below 0.5"
            )
        if label_smoothing and form == "ipo":
            raise SpecError(f"label_smoothing is {label_smoothing}, which form='ipo' does not have: use 'sigmoid'")
        self.beta, self.form, self.label_smoothing, self.reference = beta, form, label_smoothing, reference
        self._reference = reference_name(reference)
        self.token_losses = _Shares(self)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each pair, (n,)."""
        logps = self._logps(model, batch)
        return self._value(self._preference(model, batch, logps), batch)

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Loss of preferences drawn from the model's own: gradients whose second moment is the true Fisher.

        "sigmoid" is a likelihood (Bradley-Terry): the chosen answer is preferred with probability sigmoid(beta h), as
        drawn. "ipo" is a squared error: its target is drawn as h plus normal noise of variance 1/2, and returned is the
        part of the error that is linear in h, which has the same gradient.

        Args:
            seeds: n integers, one per pair.

        Returns:
            shape (n,), differentiable through the loss and not through the draw.

        Raises:
            ShapeError: another number of seeds.
        """
        return self(model, self.sampled_batch(model, batch, seeds))

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the draws of ``sampled`` to be kept, as ``drawn``: its plain loss is that of ``sampled``."""
        pairs = len(rows_of(batch)["input_ids"]) // 2
        if len(seeds) != pairs:
            raise ShapeError(f"got {len(seeds)} seeds for {pairs} examples: give one per example")
        if self.form == "ipo":
            keys = np.array([counter_key("preference", int(seed)) for seed in seeds], dtype=np.uint64)
            return {**batch, _DRAWN: torch.from_numpy(counter_normal(keys, 1)[:, 0]).float()}
        seed = np.array([int(s) & (1 << 64) - 1 for s in seeds], dtype=np.uint64)
        uniform = torch.from_numpy(counter_uniform(seed, np.zeros(len(seed), dtype=np.int64)))
        with torch.no_grad():
            h = self._preference(model, batch, self._logps(model, batch)).double().cpu()
        return {**batch, _DRAWN: torch.where(uniform < (self.beta * h).sigmoid(), 1.0, -1.0).float()}

    def gauss_newton(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The number that the loss is a convex function of, and the product with its second derivative at it.

        Returns:
            h (n,); and ``hessian(t)`` for t (n,): ``beta^2 p (1 - p) t`` with p = sigmoid(beta h), or 2 t of "ipo".
        """
        h = self._preference(model, batch, self._logps(model, batch))
        if self.form == "ipo":
            return h, lambda tangent: 2 * tangent
        p = (self.beta * h.detach()).sigmoid()
        return h, lambda tangent: self.beta**2 * p * (1 - p) * tangent

    def owners(self, batch: Mapping[str, Any]) -> Tensor:
        """Of each row that the model sees the number of its pair, int64 (2 n,)."""
        return torch.arange(len(rows_of(batch)["input_ids"]) // 2).repeat_interleave(2)

    @property
    def kind(self) -> str:
        """Everything that is measured, in words: two losses measure the same if and only if these agree."""
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"dpo: {self.form}, beta {self.beta:g}{smoothing}, reference {self._reference}"

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but a reference model as JSON, for ``from_settings``."""
        return {
            "name": "dpo",
            "beta": self.beta,
            "form": self.form,
            "label_smoothing": self.label_smoothing,
            "reference": "adapter" if self.reference == "adapter" else None,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], reference: nn.Module | None = None) -> Self:
        """The loss whose ``settings`` these are, such as a store's ``metadata["loss"]["settings"]``.

        Args:
            reference: the model, where it was one.

        Raises:
            SpecError: they are those of another loss, or of one with a reference model that is not given.
        """
        options = dict(settings)
        if options.pop("name", None) != "dpo":
            raise SpecError(f"the settings are those of {settings.get('name')!r}, expected those of a DPO loss")
        options["reference"] = options["reference"] or reference
        return cls(**options)

    def __repr__(self) -> str:
        return f"DPO({self.kind!r})"

    def _logps(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Log-probability of each label at its own place, (n, 2, T)."""
        losses = language_model.token_losses(model, rows_of(batch))
        return -losses.view(-1, 2, losses.shape[1])

    def _signs(self, model: nn.Module, batch: Mapping[str, Any], like: Tensor) -> Tensor:
        """What a log-probability of each answer adds to h, (n, 2)."""
        signs = torch.tensor([1.0, -1.0]).to(like)
        if self.form == "ipo":
            return signs / counted_in(batch, model).sum(dim=2).to(like).clamp_min(1.0)
        return signs.expand(like.shape[0], 2)

    def _preference(self, model: nn.Module, batch: Mapping[str, Any], logps: Tensor) -> Tensor:
        """h, (n,)."""
        ratios = logps.sum(dim=2) - self._references(model, batch, logps)
        return (self._signs(model, batch, logps) * ratios).sum(dim=1)

    def _references(self, model: nn.Module, batch: Mapping[str, Any], logps: Tensor) -> Tensor:
        """Log-probability of each answer under the reference, (n, 2)."""
        stored = [name for name in STORED if batch.get(name) is not None]
        if not stored:
            found = reference_logps(model, rows_of(batch), self.reference, language_model, " and ".join(STORED))
            return found.sum(dim=1).view(-1, 2).to(logps)
        columns = [torch.as_tensor(batch[name]) if name in stored else None for name in STORED]
        for name, column in zip(STORED, columns, strict=True):
            if column is None:
                raise DataError(f"the batch has {stored[0]} but no {name}: give both, or neither to run the reference")
            if column.shape != (len(logps),):
                raise ShapeError(
                    f"{name} has shape {tuple(column.shape)}, expected one sum over the answer's labels for each of "
                    f"{len(logps)} pairs"
                )
        return torch.stack([column for column in columns if column is not None], dim=1).to(logps)

    def _value(self, h: Tensor, batch: Mapping[str, Any]) -> Tensor:
        drawn = batch.get(_DRAWN)
        if drawn is not None:
            drawn = drawn.to(h)
            return -functional.logsigmoid(drawn * self.beta * h) if self.form == "sigmoid" else -(2**0.5) * drawn * h
        if self.form == "ipo":
            return (h - 1 / (2 * self.beta)).square()
        right, wrong = functional.logsigmoid(self.beta * h), functional.logsigmoid(-self.beta * h)
        return -(1 - self.label_smoothing) * right - self.label_smoothing * wrong

    def _slope(self, h: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Derivative of the loss by h."""
        drawn = batch.get(_DRAWN)
        if self.form == "ipo":
            return 2 * (h - 1 / (2 * self.beta)) if drawn is None else -(2**0.5) * drawn.to(h)
        preferred = 1 - self.label_smoothing if drawn is None else (1 + drawn.to(h)) / 2
        return self.beta * ((self.beta * h).sigmoid() - preferred)


class _Shares:
    """What each token adds to the loss: ``token_losses`` of a DPO loss.

    The loss is a function of the sum h, so a token's share is that of its derivative: the slope of the loss, held at
    the weights as they are, times the token's log-probability. What is left of the loss lies evenly on the pair's
    labels as a constant, so that the shares of a pair add up to its loss at any weights.
    """

    def __init__(self, loss: DPO) -> None:
        self._loss = loss

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """(n, 2, T): of the chosen and the rejected answer, each token at its own place, 0 where there is none."""
        loss = self._loss
        logps = loss._logps(model, batch)
        signed = loss._signs(model, batch, logps)[:, :, None] * logps
        held = batch.get(_HELD)
        slope, rest = self._held(model, batch, logps, signed) if held is None else held.to(logps).unbind(1)
        counted = counted_in(batch, model).to(logps)
        even = counted / counted.sum(dim=(1, 2), keepdim=True).clamp_min(1.0)
        return slope[:, None, None] * signed + rest[:, None, None] * even

    def hold(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with each pair's slope and constant at these weights: what moved weights must not change."""
        with torch.no_grad():
            logps = self._loss._logps(model, batch)
            signed = self._loss._signs(model, batch, logps)[:, :, None] * logps
            return {**batch, _HELD: torch.stack(self._held(model, batch, logps, signed), dim=1)}

    def _held(self, model: nn.Module, batch: Mapping[str, Any], logps: Tensor, signed: Tensor) -> tuple[Tensor, Tensor]:
        h = self._loss._preference(model, batch, logps).detach()
        slope = self._loss._slope(h, batch)
        return slope, self._loss._value(h, batch) - slope * signed.detach().sum(dim=(1, 2))
