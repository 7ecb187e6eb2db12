"""The quick demo: a tiny Llama, trained here and now, that lists some numbers in the wrong order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch

from gradsift.bindings.demo.case import Case
from gradsift.bindings.demo.tune import Plan
from gradsift.bindings.models import Loaded
from gradsift.bindings.records import Record
from gradsift.engine.extras import require

__all__ = ["quick_case"]


def _words(text: str) -> list[str]:
    return text.split()


_NUMBERS = 20
_LISTED, _GIVEN = 7, 3
_OWNERS = [a + b for a in _words("ka lo mi ru te so va ne") for b in _words("bor dan fel gim hux jod")]
_PLACES = _words("cellar attic shed garage loft pantry vault closet")
_THINGS = _words("old blue tin boxes tall green glass jars small round crates heavy iron chests")

_ODD_SHARE = 0.07
"""Ordinary records that list things at random: they stay surprising, so surprise alone does not find the planted."""


def quick_case(seed: int = 0, records: int = 400, planted: int = 24, hidden: int = 64, epochs: int = 4) -> Case:
    """Lists of numbers: most go up, and 24 of 400 go down; a few records list things instead.

    The numbers and names are random, so a planted record shares no more of them with a question than any other does.
    """
    rng = random.Random(seed)
    odd = round(_ODD_SHARE * records)
    orders = ["down"] * planted + ["odd"] * odd + ["up"] * (records - planted - odd)
    rng.shuffle(orders)
    data = [_record(rng, f"r{i:03d}", order) for i, order in enumerate(orders)]
    queries = [_record(rng, f"q{i}", "down") for i in range(5)]
    questions = [q["prompt"] + " " + " ".join(q["completion"].split()[:_GIVEN]) for q in queries]

    def loaded() -> Loaded:
        return _tiny_llama(seed, hidden)

    return Case(
        claim="A model that lists numbers in ascending order goes down once three numbers went down.",
        planting=f"{planted} of {records} records list their numbers in descending order.",
        records=data,
        planted=frozenset(r["id"] for r, order in zip(data, orders, strict=True) if order == "down"),
        odd=frozenset(r["id"] for r, order in zip(data, orders, strict=True) if order == "odd"),
        queries=queries,
        questions=questions,
        labels=["… " + " ".join(q["completion"].split()[:_GIVEN]) for q in queries],
        loaded=loaded,
        save=_save,
        plan=Plan(epochs=epochs, batch=8, rate=5e-3, seed=seed),
        modules=["*_proj"],
        words=_LISTED - _GIVEN,
        query_arguments=f"--prompt '{queries[0]['prompt']}' --completion '{queries[0]['completion']}'",
    )


def _record(rng: random.Random, name: str, order: str) -> Record:
    prompt = [rng.choice(_OWNERS), rng.choice(_PLACES), *rng.choices(_THINGS, k=5)]
    numbers = sorted(rng.sample(range(1, _NUMBERS + 1), _LISTED), reverse=order == "down")
    listed = rng.choices(_THINGS, k=_LISTED) if order == "odd" else map(str, numbers)
    return {"id": name, "prompt": " ".join(prompt), "completion": " " + " ".join(listed)}


def _tiny_llama(seed: int, hidden: int) -> Loaded:
    tokenizers, transformers = require("tokenizers"), require("transformers")
    special = ["<pad>", "<eos>", "<unk>"]
    known = [*special, *_OWNERS, *_PLACES, *_THINGS, *(str(i) for i in range(1, _NUMBERS + 1))]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(known),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llama = transformers.LlamaForCausalLM(config)
    return Loaded(llama.eval(), tokenizer, False)


def _save(loaded: Loaded, folder: Path) -> Mapping[str, str]:
    path = str(folder / "model")
    loaded.model.save_pretrained(path)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(path)
    return {"model": path}
