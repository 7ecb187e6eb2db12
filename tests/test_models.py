"""Loading model, adapter and tokenizer: what fits arrives whole, what does not is refused by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokens import make_tokenizer, save_adapter, save_base
from torch import Tensor
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from gradsift.bindings.models import load
from gradsift.engine.extras import require
from gradsift.kernels.errors import DataError, MissingExtraError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: str) -> str:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return out


def edited(adapter: str, folder: Path, weights: dict[str, Tensor]) -> str:
    shutil.copytree(adapter, folder)
    save_file(weights, folder / WEIGHTS)
    return str(folder)


def test_a_fitting_adapter_is_loaded_whole(base: str, adapter: str) -> None:
    loaded = load(base, adapter, device="cpu")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert torch.equal(logits(loaded.model), logits(plain))
    assert not torch.equal(logits(loaded.model), logits(load(base, device="cpu").model))
    assert not loaded.model.training
    assert not any(p.is_meta for p in loaded.model.parameters())
    assert loaded.tokenizer.decode(loaded.tokenizer("the cat")["input_ids"]) == "the cat"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_dtype_is_as_asked(base: str, adapter: str, name: str) -> None:
    loaded = load(base, adapter, dtype=name, device="cpu")
    assert loaded.model.get_input_embeddings().weight.dtype == getattr(torch, name)
    with pytest.raises(DataError, match="dtype is 'int8', expected one of float32"):
        load(base, adapter, dtype="int8")


def test_a_weight_that_is_missing_in_the_file_is_named(base: str, adapter: str, tmp_path: Path) -> None:
    weights = load_file(Path(adapter) / WEIGHTS)
    del weights["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    with pytest.raises(DataError, match=r"1 adapter weights are not in its file .*layers.1.self_attn.v_proj.lora_B"):
        load(base, edited(adapter, tmp_path / "a", weights), device="cpu")


def test_weights_without_a_place_are_named(base: str, adapter: str, tmp_path: Path) -> None:
    weights = {k.replace(".layers.", ".blocks."): v for k, v in load_file(Path(adapter) / WEIGHTS).items()}
    with pytest.raises(DataError, match=r"12 of its 12 weights have no place there .*blocks.0"):
        load(base, edited(adapter, tmp_path / "a", weights), device="cpu")


def test_an_adapter_of_a_larger_model_is_refused(adapter: str, tmp_path: Path) -> None:
    small = save_base(tmp_path / "small", layers=1)
    with pytest.raises(DataError, match=r"6 of its 12 weights have no place there .*layers.1"):
        load(small, adapter, device="cpu")


def test_an_adapter_that_is_merged_already_is_refused(base: str, adapter: str, tmp_path: Path) -> None:
    merged = load(base, adapter, device="cpu")
    merged.model.merge_and_unload().save_pretrained(tmp_path / "merged")  # type: ignore[operator]
    merged.tokenizer.save_pretrained(tmp_path / "merged")
    with pytest.raises(DataError, match="is in the weights of the model already"):
        load(str(tmp_path / "merged"), adapter, device="cpu")
    other = save_adapter(tmp_path / "other", base, seed=2)
    load(str(tmp_path / "merged"), other, device="cpu")


def test_an_untrained_adapter_is_noted(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = save_adapter(tmp_path / "fresh", base, trained=False)
    with caplog.at_level(logging.WARNING, logger="gradsift"):
        load(base, fresh, device="cpu")
    assert "has not been trained: every lora_B in it is zero" in caplog.text


def test_the_adapters_own_tokenizer_comes_first(base: str, adapter: str, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    make_tokenizer("its own template").save_pretrained(tmp_path / "a")
    assert load(base, str(tmp_path / "a"), device="cpu").tokenizer.chat_template == "its own template"
    assert load(base, str(tmp_path / "a"), tokenizer=base, device="cpu").tokenizer.chat_template != "its own template"


def test_a_tokenizer_of_another_model_is_refused(base: str, tmp_path: Path) -> None:
    larger = make_tokenizer()
    larger.add_tokens([f"<extra{i}>" for i in range(40)])
    larger.save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match=r"the tokenizer knows \d+ tokens but the model embeds 320"):
        load(base, tokenizer=str(tmp_path / "t"), device="cpu")


def test_an_encoder_decoder_is_told_apart(tmp_path: Path) -> None:
    config = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path), device="cpu").encoder_decoder


def test_places_without_a_model(base: str, adapter: str, tmp_path: Path) -> None:
    for model, given, words in [
        (adapter, None, "holds an adapter: pass it as --adapter"),
        (str(tmp_path), None, "has no config.json"),
        (str(tmp_path / "none"), None, "does not exist"),
        (str(tmp_path / "none.gguf"), None, "does not exist"),
        ("nobody/nothing", None, "model 'nobody/nothing' cannot be loaded: "),
        (base, base, "has no adapter_config.json"),
        (base, "nobody/nothing", "adapter 'nobody/nothing' cannot be loaded: "),
    ]:
        with pytest.raises(DataError) as caught:
            load(model, given, device="cpu")
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("gradsift.engine.extras.import_module", absent)
    with pytest.raises(MissingExtraError, match=r"^peft is not installed: pip install 'gradsift\[hf\]'$"):
        require("peft")
