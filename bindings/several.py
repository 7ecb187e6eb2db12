"""Records with several answers to one prompt: a preference pair, or rollouts with their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from gradsift.bindings.encode import Encoder, Example
from gradsift.bindings.records import Record
from gradsift.engine.losses import IGNORE
from gradsift.kernels.errors import DataError

__all__ = ["Several", "SeveralEncoder", "SilentError"]


_OF_TOKENS = ("old_logprobs", "ref_logprobs")


class SilentError(DataError):
    """A prompt whose responses all have one reward: nothing is to be learnt from it."""


class Several(NamedTuple):
    """Tokens of one record, answer by answer.

    Attributes:
        answers: each with its prompt.
        rewards: of each answer; none of a pair, whose first is the chosen one.
    """

    answers: list[Example]
    rewards: list[float] | None = None

    @property
    def input_ids(self) -> np.ndarray:
        """Of all answers, one after another."""
        return np.concatenate([answer.input_ids for answer in self.answers])

    @property
    def labels(self) -> np.ndarray:
        """Lined up with ``input_ids``."""
        return np.concatenate([answer.labels for answer in self.answers])

    @property
    def pieces(self) -> list[str]:
        """Text of each token."""
        return [piece for answer in self.answers for piece in answer.pieces]

    @property
    def cut(self) -> int:
        """Tokens that were left out."""
        return sum(answer.cut for answer in self.answers)

    @property
    def scored(self) -> int:
        """Labels that carry loss."""
        return sum(answer.scored for answer in self.answers)

    def lined_up(self, shares: np.ndarray) -> list[float]:
        """Shares (answers, T) of exact scores, one for each piece."""
        return [s for row, one in zip(shares, self.answers, strict=False) for s in row[: len(one.pieces)].tolist()]


@dataclass(slots=True)
class SeveralEncoder:
    """Turn records with several answers into tokens, each as a prompt with its completion.

    Args:
        tokenizer, max_length, eos: as of ``Encoder``.
        form: ``"pair"`` (columns prompt, chosen, rejected) or ``"rollouts"`` (prompt, responses, rewards).
    """

    tokenizer: Any
    form: str
    max_length: int = 1024
    eos: bool = True
    encoder_decoder: bool = field(init=False, default=False)
    _single: Encoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._single = Encoder(self.tokenizer, "prompt", self.max_length, self.eos)

    @property
    def trained_on(self) -> str:
        """What carries loss, in words for the user."""
        answers = "'chosen' and 'rejected'" if self.form == "pair" else "every response"
        return self._single.trained_on.replace("'completion' only", f"{answers} only")

    def shown(self, record: Record, example: Any) -> list[str]:
        """The text of each token for people: the prompt once, and before each answer what it is."""
        del record
        names = ["chosen", "rejected"] if example.rewards is None else [f"reward {r:g}" for r in example.rewards]
        out: list[str] = []
        for place, (name, answer) in enumerate(zip(names, example.answers, strict=True)):
            pieces, prompt = list(answer.pieces), int((answer.labels != IGNORE).argmax())
            if place:
                pieces[:prompt] = [""] * prompt
            marked = max(prompt - 1, 0)  # of the prompt, so that it is not coloured as the answer's
            mark = f" [{name}] "
            pieces[marked] = pieces[marked] + mark if prompt else mark + pieces[marked]
            out += pieces
        return out

    def encode(self, records: Sequence[Record]) -> list[Several | DataError]:
        """Tokens of each record, or what is wrong with it."""
        results: list[Several | DataError] = []
        for record in records:
            try:
                results.append(self._pair(record) if self.form == "pair" else self._rollouts(record))
            except DataError as error:
                results.append(error)
        return results

    def collate(self, examples: Sequence[Several]) -> dict[str, Any]:
        """Columns of a batch of these: those of ``DPO`` or of ``PolicyGradient``."""
        if self.form == "pair":
            sides = enumerate(("chosen", "rejected"))
            return {
                f"{side}_{name}": column
                for place, side in sides
                for name, column in self._single.collate([e.answers[place] for e in examples]).items()
            }
        owners = [i for i, example in enumerate(examples) for _ in example.answers]
        rewards = [r for example in examples for r in example.rewards or ()]
        return {
            **self._single.collate([answer for example in examples for answer in example.answers]),
            "owners": torch.tensor(owners),
            "rewards": torch.tensor(rewards, dtype=torch.float64),
        }

    def _pair(self, record: Record) -> Several:
        return Several([self._answer(record, side, record.get(side)) for side in ("chosen", "rejected")])

    def _rollouts(self, record: Record) -> Several:
        for column in _OF_TOKENS:
            if record.get(column) is not None:
                raise DataError(
                    f"column '{column}': text is tokenised anew, so numbers of the tokens that were sampled need not "
                    "line up: leave it out, or use gs.losses.PolicyGradient with the tokens themselves"
                )
        responses, rewards = record.get("responses"), record.get("rewards")
        if not isinstance(responses, list) or len(responses) < 2:
            raise DataError("column 'responses': expected a list of two texts or more")
        if not isinstance(rewards, list) or len(rewards) != len(responses) or not all(map(_is_number, rewards)):
            raise DataError(f"column 'rewards': expected a list of {len(responses)} numbers, one for each response")
        if len(set(map(float, rewards))) == 1:
            raise SilentError(
                f"column 'rewards': all {len(rewards)} responses have reward {float(rewards[0]):g}, so there is "
                "nothing to learn from them"
            )
        named = [f"responses[{i}]" for i in range(len(responses))]
        answers = [self._answer(record, name, text) for name, text in zip(named, responses, strict=True)]
        return Several(answers, [float(reward) for reward in rewards])

    def _answer(self, record: Record, column: str, text: Any) -> Example:
        (found,) = self._single.encode([{"prompt": record.get("prompt"), "completion": text}])
        if isinstance(found, DataError):
            raise DataError(str(found).replace("column 'completion'", f"column '{column}'"))
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
