"""From a record to tokens and the mask of what is trained on: text, prompt/completion, or chat messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsift.bindings.records import Record
from gradsift.engine.losses import IGNORE
from gradsift.kernels.errors import DataError

__all__ = ["Encoder", "Example", "form_of", "pad"]

_FORMS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
    "pair": ("prompt", "chosen", "rejected"),
    "rollouts": ("prompt", "responses", "rewards"),
}
_USUAL = ("messages", "prompt", "text")
Encoded = tuple[list[int], list[bool], list[str]]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Example(NamedTuple):
    """Tokens of one record.

    Attributes:
        input_ids: what the model reads. labels: int64, -100 where there is no loss; lined up with
        ``input_ids``, or an encoder-decoder's targets. pieces: the text of each label's token; joined, they
        give the text back. cut: tokens that were left out at the end to keep to ``max_length``. scored:
        labels that carry loss, after the shift.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pieces: list[str]
    cut: int
    scored: int

    def lined_up(self, shares: np.ndarray) -> list[float]:
        """Shares (T,) of exact scores, one for each piece."""
        return list(shares[: len(self.pieces)].tolist())


class Rendered(NamedTuple):
    """Text with the character ranges that carry loss."""

    text: str
    spans: list[tuple[int, int]]


def form_of(record: Record, forms: Sequence[str] = _USUAL) -> str:
    """Which columns a record is read from: ``"messages"``, ``"prompt"`` or ``"text"``, ``"pair"`` or ``"rollouts"``.

    Args:
        forms: those that will do.

    Raises:
        DataError: it has the columns of none of them.
    """
    fits = [form for form, columns in _FORMS.items() if all(column in record for column in columns)]
    found = next((form for form in fits if form in forms), None)
    if found is not None:
        return found
    wanted = ", or ".join(_listed(_FORMS[form]) for form in reversed(forms))
    hint = {"pair": ": preference pairs need --loss dpo", "rollouts": ": rollouts need --loss policy_gradient"}
    raise DataError(
        f"the columns are {', '.join(map(repr, record)) or 'none'}, expected {wanted}"
        + (hint.get(fits[0], "") if fits else "")
    )


@dataclass(slots=True)
class Encoder:
    """Turn records into tokens, all in the same way.

    Prompt and completion are joined first and tokenised together, as the model meets them; a token that
    straddles the border carries loss, for it holds the beginning of the completion. In ``text`` every token
    carries loss. In ``messages`` assistant turns do: by the chat template's ``{% generation %}`` markers,
    or, where it has none, by rendering the conversation up to and including each assistant turn, which must
    give prefixes of the whole.

    Args:
        tokenizer: of `transformers`.
        form: ``"text"``, ``"prompt"`` or ``"messages"``.
        max_length: tokens kept per record; the end is cut.
        eos: close text and completions with the end-of-sequence token, and train on it.
        encoder_decoder: prompts become ``input_ids``, completions ``labels``.
    """

    tokenizer: Any
    form: str
    max_length: int = 1024
    eos: bool = True
    encoder_decoder: bool = False
    marked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise DataError(f"max length is {self.max_length}, expected at least 2 tokens")
        if self.encoder_decoder and self.form != "prompt":
            raise DataError(
                f"the model is an encoder-decoder but the data has '{self.form}': give 'prompt' and 'completion'"
            )
        if self.form == "messages":
            template = getattr(self.tokenizer, "chat_template", None)
            if not template:
                raise DataError(
                    "the data has 'messages' but the tokenizer has no chat template: "
                    "name a tokenizer that has one, or give 'prompt' and 'completion'"
                )
            self.marked = self._fast and isinstance(template, str) and bool(_MARKER.search(template))

    @property
    def _fast(self) -> bool:
        return bool(getattr(self.tokenizer, "is_fast", False))

    @property
    def trained_on(self) -> str:
        """What carries loss, in words for the user."""
        closing = " and the end-of-sequence token" if self.eos and self.tokenizer.eos_token_id is not None else ""
        if self.form == "text":
            return f"every token of 'text'{closing}"
        if self.form == "prompt":
            return f"'completion' only{closing}"
        if self.marked:
            return "assistant turns only, as the chat template marks them"
        return "assistant turns only, found by rendering prefixes (the chat template has no {% generation %} markers)"

    def shown(self, record: Record, example: Any) -> list[str]:
        """The text of each token as people want to read it: of a chat without control tokens and default prompts."""
        if self.form != "messages":
            return list(example.pieces)
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        hidden = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        first = str(record["messages"][0]["content"])
        begin, passed, out = "".join(example.pieces).find(first), 0, []
        for piece in example.pieces:
            passed += len(piece)
            out.append("" if piece in hidden or passed <= begin else piece)
        return out

    def encode(self, records: Sequence[Record]) -> list[Example | DataError]:
        """Tokens of each record, or what is wrong with it (column and cause; the caller knows the place)."""
        results: list[Example | DataError] = []
        for record in records:
            try:
                results.append(self._encode(record))
            except DataError as error:
                results.append(error)
        return results

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Columns of a batch of these, filled up on the right to one length."""
        tokenizer = self.tokenizer
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        batch: dict[str, Any] = {
            "input_ids": pad([e.input_ids for e in examples], fill),
            "attention_mask": pad([np.ones(len(e.input_ids), dtype=np.int64) for e in examples], 0),
            "labels": pad([e.labels for e in examples], IGNORE),
        }
        if self.encoder_decoder:
            batch["decoder_attention_mask"] = (batch["labels"] != IGNORE).to(torch.int64)
        return batch

    def _encode(self, record: Record) -> Example:
        if self.encoder_decoder:
            return self._encode_pair(record)
        rendered = self._render(record)
        ids, counted, pieces = self._tokens(rendered)
        if self.form != "messages":
            self._close(ids, counted, pieces)
        cut = max(0, len(ids) - self.max_length)
        keep = len(ids) - cut
        labels = np.where(counted, ids, IGNORE)[:keep].astype(np.int64)
        scored = int((labels[1:] != IGNORE).sum())
        if not scored:
            raise DataError(self._no_loss(sum(counted[1:]), keep))
        return Example(np.asarray(ids[:keep], dtype=np.int64), labels, pieces[:keep], cut, scored)

    def _encode_pair(self, record: Record) -> Example:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        source = self.tokenizer(prompt, verbose=False)["input_ids"]
        target, counted, pieces = self._tokens(Rendered(completion, []))
        self._close(target, counted, pieces)
        cut = max(0, len(source) - self.max_length) + max(0, len(target) - self.max_length)
        labels = np.asarray(target[: self.max_length], dtype=np.int64)
        source = np.asarray(source[: self.max_length], dtype=np.int64)
        return Example(source, labels, pieces[: self.max_length], cut, len(labels))

    def _no_loss(self, beyond: int, keep: int) -> str:
        column = {"text": "text", "prompt": "completion", "messages": "messages"}[self.form]
        if beyond:
            return f"column '{column}': all {beyond} tokens to train on lie beyond the first {keep}: raise --max-length"
        cause = "no assistant turn" if self.form == "messages" else "no token that can be predicted"
        return f"column '{column}': {cause}, so there is nothing to train on"

    def _render(self, record: Record) -> Rendered:
        if self.form == "messages":
            return self._render_chat(record)
        if self.form == "text":
            text = _text(record, "text")
            return Rendered(text, [(0, len(text))])
        prompt, completion = _text(record, "prompt", empty=True), _text(record, "completion")
        return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))])

    def _render_chat(self, record: Record) -> Rendered:
        messages = _messages(record)
        whole = self._template(messages)
        if self.marked:
            return Rendered(whole, self._marked_spans(messages, whole))
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise DataError(
                    "column 'messages': begins with an assistant turn, whose start is unknown without "
                    "{% generation %} markers in the chat template"
                )
            before = self._template(messages[:i], add_generation_prompt=True)
            after = self._template(messages[: i + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise DataError(
                    f"column 'messages': turn {i + 1} renders differently inside the whole, so what "
                    "to train on is unknown: use a chat template with {% generation %} markers"
                )
            end = len(after)
            closing = self.tokenizer.eos_token
            if closing and after.rstrip().endswith(closing):
                end = len(after.rstrip())
            spans.append((len(before), end))
        return Rendered(whole, spans)

    def _template(self, messages: list[Record], **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:
            # Templates raise their own complaints ("roles must alternate") through jinja2.
            if type(error).__module__.split(".", maxsplit=1)[0] != "jinja2":
                raise
            raise DataError(f"column 'messages': the chat template refuses it: {error}") from None

    def _marked_spans(self, messages: list[Record], whole: str) -> list[tuple[int, int]]:
        marked = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = np.asarray(marked["assistant_masks"], dtype=bool)
        offsets = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if offsets["input_ids"] != marked["input_ids"]:
            raise DataError("column 'messages': the chat template's markers do not line up with the tokens")
        spans: list[tuple[int, int]] = []
        previous = False
        for (a, b), trained in zip(offsets["offset_mapping"], mask, strict=True):
            if trained and previous:
                spans[-1] = (spans[-1][0], b)
            elif trained:
                spans.append((a, b))
            previous = bool(trained)
        return spans

    def _tokens(self, rendered: Rendered) -> Encoded:
        """Token ids, which of them carry loss, and the text of each."""
        special = self.form != "messages"
        if not self._fast:
            return self._tokens_by_prefix(rendered, special)
        encoding = self.tokenizer(rendered.text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        begin, end = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
        # Tokens without text (added ones, or trimmed whitespace) stand where the text before them ends.
        without = offsets[:, 0] == offsets[:, 1]
        begin = np.where(without, end, begin)
        counted = np.zeros(len(offsets), dtype=bool)
        for a, b in rendered.spans:
            counted |= np.where(without, (begin >= a) & (begin <= b), (end > a) & (begin < b))
        borders = np.concatenate([[0], end]).tolist()
        pieces = [rendered.text[a:b] for a, b in pairwise(borders)]
        return list(encoding["input_ids"]), counted.tolist(), pieces

    def _tokens_by_prefix(self, rendered: Rendered, special: bool) -> Encoded:
        """For tokenizers without offsets: a border lies where the tokens of the text before it differ."""
        ids = list(self.tokenizer(rendered.text, add_special_tokens=special, verbose=False)["input_ids"])
        counted = [False] * len(ids)
        for a, b in rendered.spans:
            first = self._agree(rendered.text[:a], ids, special)
            last = len(ids) if b == len(rendered.text) else self._agree(rendered.text[:b], ids, special)
            counted[first:last] = [True] * (last - first)
        return ids, counted, [self.tokenizer.decode([i]) for i in ids]

    def _agree(self, prefix: str, ids: list[int], special: bool) -> int:
        start = self.tokenizer(prefix, add_special_tokens=special, verbose=False)["input_ids"] if prefix else []
        same = np.asarray([a == b for a, b in zip(start, ids, strict=False)] + [False])
        return int(same.argmin())

    def _close(self, ids: list[int], counted: list[bool], pieces: list[str]) -> None:
        closing = self.tokenizer.eos_token_id
        if self.eos and closing is not None and (not ids or ids[-1] != closing):
            ids.append(closing)
            counted.append(True)
            pieces.append("")


def pad(rows: Sequence[np.ndarray], fill: int) -> Tensor:
    """Rows of different lengths as one int64 tensor, filled up on the right."""
    out = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


def _listed(columns: Sequence[str]) -> str:
    """Such as ``'prompt', 'chosen' and 'rejected'``."""
    *first, last = map(repr, columns)
    return f"{', '.join(first)} and {last}" if first else last


def _text(record: Record, column: str, empty: bool = False) -> str:
    if record.get(column) is None:
        raise DataError(f"column '{column}': missing, expected text")
    value = record[column]
    if not isinstance(value, str):
        raise DataError(f"column '{column}': {type(value).__name__} {_short(value)}, expected text")
    if not value and not empty:
        raise DataError(f"column '{column}': empty, so there is nothing to train on")
    return value


def _messages(record: Record) -> list[Record]:
    value = record.get("messages")
    if not isinstance(value, list) or not value:
        raise DataError(f"column 'messages': {_short(value)}, expected a list of {{role, content}}")
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"column 'messages': turn {i} is {_short(message)}, expected {{role, content}}")
    # Arrow fills keys that other turns have with null; a template would take them for real.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
