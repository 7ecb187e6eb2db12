"""Policy gradient on stored rollouts, GRPO's and the plain one: a prompt with its responses is one example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from gradsift.engine.losses.counter import counter_key
from gradsift.engine.losses.language import LanguageModelLoss
from gradsift.engine.losses.reference import Reference, reference_logps, reference_name
from gradsift.engine.losses.rollouts import Rollouts, advantages_of, read_rollouts
from gradsift.kernels.errors import ShapeError, SpecError

__all__ = ["PolicyGradient"]

Aggregate = Literal["token", "sequence"]


class PolicyGradient:
    """What a policy loses on a prompt's stored responses, each weighted by its advantage.

    For token t of response o with advantage A, ``l = log p(t)``, ``r = exp(l - l_old)`` and ``d = l_ref - l``:

    - with ``old_logprobs``: ``-min(r A, clip(r, 1 - clip, 1 + clip_high) A)``, as GRPO;
    - without: ``-l A``, the plain policy gradient, which is also GRPO's at its first step, where r is 1;
    - and in both ``+ beta (exp(d) - d - 1)``, the k3 estimate of the divergence from the reference.

    Aggregated by "token" (the sum over all tokens of all responses: a prompt's share of TRL's "dapo", "bnpo" and
    "dr_grpo", but for the step's common divisor; ``loss_tokens`` are there to divide by) or by "sequence" (the mean
    over responses of the mean over tokens: TRL's "grpo").

    A batch holds rows of prompt and response: ``input_ids`` (rows, T), ``labels`` (rows, T; -100 at the prompt and at
    padding), ``owners`` (rows,), the prompt of each row from 0 on, ``rewards`` or ``advantages`` (rows,), if wanted
    ``attention_mask`` and more that the model takes, and ``old_logprobs`` and ``ref_logprobs`` (rows, T), each token's
    at its own place. Advantages from rewards are relative to the prompt's group, see ``rollouts.advantages_of``. A
    prompt whose responses all have one reward has no advantage, and without beta a gradient of zero: ``silent`` names
    it.

    Args:
        clip: how far r may fall below 1.
        clip_high: how far it may rise above; as ``clip`` unless given.
        beta: weight of the divergence; 0 for none.
        aggregate: see above.
        scale_rewards: divide advantages by their group's standard deviation.
        temperature: what the rollouts were sampled at; logits are divided by it.
        reference: where ``beta`` is not 0 and the batch has no ``ref_logprobs``: "adapter", the model itself with its
            PEFT adapters off; or another model. It must not change with the captured parameters.

    Raises:
        SpecError: an option is none of these.

    Source: Shao et al. 2024 (GRPO, arXiv 2402.03300); Yu et al. 2025 (DAPO, arXiv 2503.14476); CROPI (arXiv
    2510.26491); TRL's GRPOTrainer.
    """

    def __init__(
        self,
        clip: float = 0.2,
        clip_high: float | None = None,
        beta: float = 0.0,
        aggregate: Aggregate = "token",
        scale_rewards: bool = True,
        temperature: float = 1.0,
        reference: Reference = "adapter",
    ) -> None:
        if aggregate not in get_args(Aggregate):
            raise SpecError(f"aggregate is {aggregate!r}, expected 'token' or 'sequence'")
        high = clip if clip_high is None else clip_high
        if not 0 < clip < 1 or not high > 0 or not beta >= 0:
            raise SpecError(
                f"clip is {clip}, clip_high {high} and beta {beta}, expected a clip between 0 and 1, a positive "
                "clip_high and a beta of 0 or more"
            )
        self.clip, self.clip_high, self.beta, self.aggregate = clip, high, beta, aggregate
        self.scale_rewards, self.reference = scale_rewards, reference
        self._reference = reference_name(reference)
        self._language = LanguageModelLoss(temperature)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Loss of each prompt, (n,)."""
        rollouts = read_rollouts(batch, model)
        rows = self._tokens(model, batch, rollouts).sum(dim=1)
        return rows.new_zeros(len(rollouts.sizes)).index_add(0, rollouts.owners.to(rows.device), rows)

    def token_losses(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """What each token adds to the loss, at its own place: (n, responses, T), 0 where there is none."""
        rollouts = read_rollouts(batch, model)
        tokens = self._tokens(model, batch, rollouts)
        out = tokens.new_zeros(len(rollouts.sizes), int(rollouts.sizes.max()), tokens.shape[1])
        places = tuple(index.to(tokens.device) for index in (rollouts.owners, rollouts.places))
        return out.index_put(places, tokens)

    def loss_tokens(self, batch: Mapping[str, Any]) -> Tensor:
        """Labels that count in all responses of each prompt: int64 (n,), on the CPU."""
        rollouts = read_rollouts(batch)
        return torch.zeros_like(rollouts.sizes).index_add(0, rollouts.owners, rollouts.counted.sum(dim=1))

    def silent(self, batch: Mapping[str, Any]) -> Tensor:
        """Prompts whose responses have no advantage over each other, all right or all wrong: bool (n,)."""
        rollouts = read_rollouts(batch)
        heard = (advantages_of(batch, rollouts, self.scale_rewards) != 0).to(torch.int64)
        return torch.zeros_like(rollouts.sizes).index_add(0, rollouts.owners, heard) == 0

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        """Loss of tokens drawn from the policy at every place of the responses, with the roots of the loss's weights.

        The second moment of its gradients is the policy's Fisher information, aggregated as the loss is: the metric of
        natural policy gradients, and the second derivative of the mean divergence from the policy as it is. (The loss
        itself is no likelihood, and where an advantage is negative its own curvature is negative too.)

        Args:
            seeds: n integers, one per prompt.

        Returns:
            shape (n,), differentiable through the loss and not through the draw.

        Raises:
            ShapeError: another number of seeds.
        """
        return self(model, self.sampled_batch(model, batch, seeds))

    def sampled_batch(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The batch with the tokens that ``sampled`` draws, as ``drawn``: its plain loss is that of ``sampled``."""
        rollouts = read_rollouts(batch)
        if len(seeds) != len(rollouts.sizes):
            raise ShapeError(f"got {len(seeds)} seeds for {len(rollouts.sizes)} examples: give one per example")
        pairs = zip(rollouts.owners.tolist(), rollouts.places.tolist(), strict=True)
        own = [counter_key("response", int(seeds[owner]), place) for owner, place in pairs]
        kept = self._language.sampled_batch(model, rollouts.inputs, own)
        read = {"decoder_input_ids": kept["decoder_input_ids"]} if "decoder_input_ids" in kept else {}
        return {**batch, **read, "drawn": kept["labels"]}

    def owners(self, batch: Mapping[str, Any]) -> Tensor:
        """Of each row that the model sees the number of its prompt, int64 (rows,)."""
        return read_rollouts(batch).owners

    @property
    def sums_tokens(self) -> bool:
        """Whether the loss is a sum over the tokens that ``loss_tokens`` counts, to be divided by them for a mean."""
        return self.aggregate == "token"

    @property
    def kind(self) -> str:
        """Everything that is measured, in words: two losses measure the same if and only if these agree."""
        words = [f"policy gradient: ratios clipped to {1 - self.clip:g} and {1 + self.clip_high:g}"]
        words.append("sum over tokens" if self.aggregate == "token" else "mean of the responses' means")
        if self.beta:
            words.append(f"divergence {self.beta:g} from {self._reference}")
        if not self.scale_rewards:
            words.append("rewards not scaled")
        if self._language.temperature != 1.0:
            words.append(f"temperature {self._language.temperature:g}")
        return ", ".join(words)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it but a reference model as JSON, for ``from_settings``."""
        return {
            "name": "policy_gradient",
            "clip": self.clip,
            "clip_high": self.clip_high,
            "beta": self.beta,
            "aggregate": self.aggregate,
            "scale_rewards": self.scale_rewards,
            "temperature": self._language.temperature,
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
        if options.pop("name", None) != "policy_gradient":
            raise SpecError(f"the settings are those of {settings.get('name')!r}, expected those of a policy gradient")
        options["reference"] = options["reference"] or reference
        return cls(**options)

    def __repr__(self) -> str:
        return f"PolicyGradient({self.kind!r})"

    def _tokens(self, model: nn.Module, batch: Mapping[str, Any], rollouts: Rollouts) -> Tensor:
        """What each token adds to its prompt's loss, (rows, T)."""
        drawn = batch.get("drawn")
        if drawn is not None:
            losses = self._language.token_losses(model, {**rollouts.inputs, "labels": drawn})
            return losses * self._weights(rollouts, losses).sqrt()
        logps = -self._language.token_losses(model, rollouts.inputs)
        advantages = advantages_of(batch, rollouts, self.scale_rewards).to(logps)[:, None]
        counted = rollouts.counted.to(logps.device)
        old = self._stored(batch, "old_logprobs", logps)
        if old is None:
            losses = -logps * advantages
        else:
            # Whatever stands in a stored column where there is no label must not reach the exponential.
            ratio = torch.where(counted, logps - old, 0.0).exp()
            clipped = ratio.clamp(1 - self.clip, 1 + self.clip_high)
            losses = -torch.minimum(ratio * advantages, clipped * advantages)
        if self.beta:
            theirs = self._stored(batch, "ref_logprobs", logps)
            if theirs is None:
                theirs = reference_logps(model, rollouts.inputs, self.reference, self._language, "ref_logprobs")
            apart = torch.where(counted, theirs.to(logps) - logps, 0.0)
            losses = losses + self.beta * (apart.exp() - apart - 1)
        return torch.where(counted, losses * self._weights(rollouts, losses), 0.0)

    def _weights(self, rollouts: Rollouts, like: Tensor) -> Tensor:
        """Of a token in its prompt's loss, (rows, 1)."""
        if self.aggregate == "token":
            return torch.ones(1, 1).to(like)
        tokens = rollouts.counted.sum(dim=1).clamp_min(1)
        return (1.0 / (tokens * rollouts.sizes[rollouts.owners]))[:, None].to(like)

    @staticmethod
    def _stored(batch: Mapping[str, Any], column: str, like: Tensor) -> Tensor | None:
        if batch.get(column) is None:
            return None
        values = torch.as_tensor(batch[column])
        if values.shape != like.shape:
            raise ShapeError(
                f"{column} has shape {tuple(values.shape)}, expected {tuple(like.shape)}: each token's log-probability "
                "at the place of its label"
            )
        return values.to(like)
