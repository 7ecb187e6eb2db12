"""Records to masked tokens to batches: what is trained on, what is refused and where, and the order of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokens import CHAT, MARKED, make_tokenizer, write_jsonl

from gradsift.bindings.data import Dataset
from gradsift.bindings.encode import Encoder
from gradsift.bindings.records import open_records
from gradsift.engine.losses import IGNORE, language_model
from gradsift.kernels.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def trained(data: Dataset, index: int = 0) -> list[str]:
    """The runs of text that carry loss."""
    example = data.example(index)
    runs, previous = [], False
    for piece, label in zip(example.pieces, example.labels, strict=True):
        if label != IGNORE:
            runs = [*runs[:-1], runs[-1] + piece] if previous else [*runs, piece]
        previous = label != IGNORE
    return runs


def opened(tmp_path: Path, records: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Dataset:
    return Dataset.open(write_jsonl(tmp_path / "train.jsonl", records), tokenizer, **options)


def test_text_is_trained_on_whole_and_closed(tmp_path: Path, tokenizer: Any) -> None:
    data = opened(tmp_path, [{"text": "the cat sat"}], tokenizer)
    example = data.example(0)
    assert "".join(example.pieces) == "the cat sat"
    assert example.labels.tolist() == example.input_ids.tolist()
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert data.encoder.trained_on == "every token of 'text' and the end-of-sequence token"
    open_end = opened(tmp_path, [{"text": "the cat sat"}], tokenizer, eos=False)
    assert open_end.example(0).input_ids.tolist() == example.input_ids[:-1].tolist()


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("the cat", " sat on the mat", " sat on the mat"),
        ("the cat ", "sat", " sat"),  # the space joins the first token of the completion
        ("the c", "at sat", " cat sat"),  # a token across the border carries loss
        ("", "the cat", "the cat"),
        ("où ça ", "là-bas", "là-bas"),
        ("the\n", "cat", "cat"),
    ],
)
def test_completion_is_trained_on_only(
    tmp_path: Path, tokenizer: Any, prompt: str, completion: str, expected: str
) -> None:
    data = opened(tmp_path, [{"prompt": prompt, "completion": completion}], tokenizer)
    assert "".join(data.example(0).pieces) == prompt + completion
    found = "".join(trained(data))
    assert found.endswith(completion)
    assert found == expected or found == " " + expected
    joint = tokenizer(prompt + completion)["input_ids"]
    assert data.example(0).input_ids.tolist() == [*joint, tokenizer.eos_token_id]


CONVERSATION = [
    {"role": "system", "content": "hello"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "the mat"},
]


@pytest.mark.parametrize(("template", "words"), [(CHAT, "no {% generation %} markers"), (MARKED, "marks them")])
def test_assistant_turns_are_trained_on_only(tmp_path: Path, template: str, words: str) -> None:
    tokenizer = make_tokenizer(template)
    data = opened(tmp_path, [{"messages": CONVERSATION}], tokenizer)
    assert trained(data) == ["sat on<|im_end|>", "the mat<|im_end|>"]
    assert words in data.encoder.trained_on
    expected = tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert data.example(0).input_ids.tolist() == list(expected)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    last_only = "{% for m in messages %}{{ m['role'] + (m['content'] if loop.last else '') + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="column 'messages': turn 3 renders differently"):
        opened(tmp_path, [{"messages": CONVERSATION}], make_tokenizer(last_only))


def test_without_offsets_borders_are_found_by_prefix(tmp_path: Path, tokenizer: Any) -> None:
    class Slow:
        """The same tokenizer, as one that cannot tell where its tokens stand."""

        is_fast = False
        chat_template, eos_token, eos_token_id, pad_token_id = CHAT, "<|im_end|>", tokenizer.eos_token_id, 0

        def __call__(self, text: str, **options: Any) -> Any:
            return tokenizer(text, **options)

        def decode(self, ids: list[int]) -> str:
            return str(tokenizer.decode(ids))

        def apply_chat_template(self, *args: Any, **options: Any) -> Any:
            return tokenizer.apply_chat_template(*args, chat_template=CHAT, **options)

    for form, record in (
        ("prompt", {"prompt": "the cat", "completion": " sat on"}),
        ("prompt", {"prompt": "the c", "completion": "at sat"}),
        ("text", {"text": "the cat"}),
        ("messages", {"messages": CONVERSATION}),
    ):
        fast_tokenizer = make_tokenizer(CHAT)
        (slow,) = Encoder(Slow(), form).encode([record])
        (fast,) = Encoder(fast_tokenizer, form).encode([record])
        assert not isinstance(slow, DataError)
        assert not isinstance(fast, DataError)
        assert slow.labels.tolist() == fast.labels.tolist()


def test_encoder_decoder_takes_the_prompt_as_input(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "the", "completion": " mat is on"}]
    data = opened(tmp_path, records, tokenizer, encoder_decoder=True)
    batch = data.fetch([0, 1])
    assert batch["input_ids"][0].tolist()[:2] == tokenizer("the cat")["input_ids"]
    assert batch["labels"].shape == batch["decoder_attention_mask"].shape
    assert language_model.loss_tokens(batch).tolist() == [data.example(i).scored for i in range(2)]
    with pytest.raises(DataError, match="encoder-decoder but the data has 'text'"):
        opened(tmp_path, [{"text": "the cat"}], tokenizer, encoder_decoder=True)


def test_counts_agree_with_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"prompt": "the cat" * i, "completion": " sat on" * (i + 1)} for i in range(7)]
    data = opened(tmp_path, records, tokenizer, max_length=20)
    batch = data.fetch(range(7))
    assert language_model.loss_tokens(batch).tolist() == [data.example(i).scored for i in range(7)]
    assert data.survey.scored == int(language_model.loss_tokens(batch).sum())
    assert data.survey.tokens == int(batch["attention_mask"].sum())
    assert data.survey.cut == sum(data.example(i).cut > 0 for i in range(7)) > 0


BAD = [
    ({"prompt": "the"}, "column 'completion': missing"),
    ({"prompt": "the", "completion": 3}, "column 'completion': int 3, expected text"),
    ({"prompt": None, "completion": "x"}, "column 'prompt': missing"),
    ({"prompt": "the", "completion": ""}, "column 'completion': empty"),
    ({"prompt": "the cat " * 30, "completion": "sat"}, "column 'completion': all 2 tokens to train on lie beyond"),
    ({"prompt": "the", "completion": "x", "id": 1.5}, "column 'id': 1.5"),
]


@pytest.mark.parametrize(("record", "words"), BAD)
def test_a_bad_record_is_named_by_line_and_column(
    tmp_path: Path, tokenizer: Any, record: dict[str, Any], words: str
) -> None:
    good = {"prompt": "the", "completion": " cat", "id": "a"}
    record = {"id": "b", **record}
    with pytest.raises(DataError) as caught:
        opened(tmp_path, [good, record], tokenizer, max_length=32)
    assert str(caught.value).startswith(f"train.jsonl line 2, {words}")
    assert "\n" not in str(caught.value)
    data = opened(tmp_path, [good, record, {**good, "id": "c"}], tokenizer, max_length=32, skip_bad=True)
    assert [data.id(i) for i in range(len(data))] == ["a", "c"]
    assert data.survey.bad == 1
    assert words in data.survey.named[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": oops}', "line 2, column 10: not JSON: Expecting value"),
        (b"[1, 2]", "line 2: a JSON array, expected an object: write one object per line"),
        (b"", "line 2: the line is empty"),
        (b'{"text": "caf\xe9"}', "line 2: byte 14 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: bytes, words: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "the cat"}\n' + line + b'\n{"text": "sat"}\n')
    with pytest.raises(DataError) as caught:
        Dataset.open(str(path), tokenizer)
    assert str(caught.value).startswith(f"train.jsonl {words}")
    assert len(Dataset.open(str(path), tokenizer, skip_bad=True)) == 2


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "'hi', expected a list"),
        ([], "[], expected a list"),
        ([{"role": "user"}], "turn 1 is {'role': 'user'}"),
        ([{"role": "user", "content": "the"}], "no assistant turn"),
        ([{"role": "assistant", "content": "the"}], "begins with an assistant turn"),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: Any, words: str) -> None:
    good = {"messages": CONVERSATION}
    with pytest.raises(DataError) as caught:
        opened(tmp_path, [good, {"messages": messages}], make_tokenizer(CHAT))
    assert str(caught.value).startswith("train.jsonl line 2, column 'messages': ")
    assert words in str(caught.value)


def test_a_template_that_complains_is_quoted(tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}"
    with pytest.raises(DataError, match="line 1, column 'messages': the chat template refuses it: must begin"):
        opened(tmp_path, [{"messages": CONVERSATION}], make_tokenizer(strict))


def test_files_that_are_no_data(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("the cat")
    for name, words in [
        ("none.jsonl", "does not exist"),
        ("empty.jsonl", "holds no records"),
        ("notes.txt", "ends in '.txt'"),
        (".", "is a folder"),
    ]:
        with pytest.raises(DataError, match=words):
            open_records(tmp_path / name)
    with pytest.raises(DataError, match=r"train.jsonl line 1: the columns are 'x', expected 'text'"):
        opened(tmp_path, [{"x": "the"}], tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        opened(tmp_path, [{"messages": CONVERSATION}], tokenizer)


def test_csv_and_parquet_read_as_jsonl_does(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    tokenizer = make_tokenizer(CHAT)
    (tmp_path / "t.csv").write_text('id,prompt,completion\na,NA,12\nb,"the, cat","sat\non"\n', encoding="utf-8")
    data = Dataset.open(str(tmp_path / "t.csv"), tokenizer)
    assert data.record(0) == {"id": "a", "prompt": "NA", "completion": "12"}
    assert data.record(1)["completion"] == "sat\non"
    assert data.fetch([1, 0])["ids"] == ["b", "a"]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": CONVERSATION}]), tmp_path / "t.parquet")
    table = Dataset.open(str(tmp_path / "t.parquet"), tokenizer)
    lines = opened(tmp_path, [{"messages": CONVERSATION}], tokenizer)
    assert table.example(0).labels.tolist() == lines.example(0).labels.tolist()
    (tmp_path / "bad.csv").write_text("prompt,completion\nx,\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.csv record 1, column 'completion': empty"):
        Dataset.open(str(tmp_path / "bad.csv"), tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"bad.parquet cannot be read as parquet"):
        open_records(tmp_path / "bad.parquet")


def many(tmp_path: Path, tokenizer: Any, n: int = 41, named: bool = False) -> Dataset:
    records = [{"text": "the cat " * (1 + (7 * i) % 11) + str(i)} for i in range(n)]
    if named:
        records = [{"id": f"r{i}", **record} for i, record in enumerate(records)]
    return opened(tmp_path, records, tokenizer)


def test_batches_cover_every_example_once_and_repeat(tmp_path: Path, tokenizer: Any) -> None:
    data = many(tmp_path, tokenizer)
    batches = data.batches(block=16, batch_tokens=120, batch_size=6)
    seen = [batch["ids"] for batch in batches]
    assert seen == [batch["ids"] for batch in batches]
    assert sorted(i for ids in seen for i in ids) == list(range(41))
    assert batches.rows == 41
    assert len(batches) == len(seen)
    for batch in batches:
        rows, width = batch["input_ids"].shape
        assert rows <= 6
        assert rows == 1 or rows * width <= 120
        assert len({i // 16 for i in batch["ids"]}) == 1
        for i, row in enumerate(batch["ids"]):
            example = data.example(row)
            assert torch.equal(batch["input_ids"][i, : len(example.input_ids)], torch.tensor(example.input_ids))
            assert int(batch["attention_mask"][i].sum()) == len(example.input_ids)
            assert (batch["labels"][i, len(example.labels) :] == IGNORE).all()


def test_lengths_are_sorted_inside_a_block_only(tmp_path: Path, tokenizer: Any) -> None:
    batches = list(many(tmp_path, tokenizer).batches(block=16, batch_tokens=200))
    order = [i for batch in batches for i in batch["ids"]]
    assert sorted(order[:16]) == list(range(16))
    padded = sum(batch["input_ids"].numel() for batch in batches)
    kept = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert padded <= 1.35 * kept


@pytest.mark.parametrize("named", [False, True])
def test_examples_are_found_by_id(tmp_path: Path, tokenizer: Any, named: bool) -> None:
    path = many(tmp_path, tokenizer, named=named).records
    data = Dataset(path, Encoder(tokenizer, "text"), check=False)
    ids: list[str | int] = ["r7", "r0", "r40"] if named else [7, 0, 40]
    assert data.find(ids) == [7, 0, 40]
    assert data.fetch(data.find(ids))["ids"] == ids
    with pytest.raises(DataError, match=r"is not in the data: give the file that was extracted"):
        data.find(["r99" if named else 99])
    with pytest.raises(DataError, match="opened without a check"):
        data.batches(block=8)


def test_find_steps_over_records_that_were_left_out(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"id": "a", "text": "the cat"}), "oops", json.dumps({"id": "b", "text": "sat on"})]
    path.write_text("\n".join(lines), encoding="utf-8")
    surveyed = Dataset.open(str(path), tokenizer, skip_bad=True)
    assert surveyed.find(["b"]) == [1]
    assert Dataset.open(str(path), tokenizer, check=False).find(["b", "a"]) == [2, 0]


def test_an_id_that_comes_twice_is_never_that_of_a_record_that_was_left_out(tmp_path: Path, tokenizer: Any) -> None:
    texts = [("a", ""), ("b", "the cat"), ("a", "sat on"), ("b", "mat"), ("c", "the mat")]
    records = [{"id": name, "text": text} for name, text in texts]
    path = Path(write_jsonl(tmp_path / "train.jsonl", records))
    surveyed = Dataset.open(str(path), tokenizer, skip_bad=True)
    assert [surveyed.id(i) for i in range(len(surveyed))] == ["b", "c"]
    assert "train.jsonl line 3, column 'id': 'a' was given to an earlier record" in surveyed.survey.named[1]
    later = Dataset.open(str(path), tokenizer, check=False)
    assert [later.record(i)["text"] for i in later.find(["b", "c"])] == ["the cat", "the mat"]
    path = Path(write_jsonl(tmp_path / "twice.jsonl", records[1:4:2]))
    with pytest.raises(DataError, match=r"twice\.jsonl line 2, column 'id': 'b' was given to an earlier record"):
        Dataset.open(str(path), tokenizer, skip_silent=True)


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_a_chat_is_shown_without_what_the_template_adds(tmp_path: Path, template: str) -> None:
    data = opened(tmp_path, [{"messages": CONVERSATION[1:3]}], make_tokenizer("{{ 'You are good.\n' }}" + template))
    example = data.example(0)
    shown = data.encoder.shown(data.record(0), example)
    assert len(shown) == len(example.pieces)
    assert "".join(shown) == "the cat?\nassistant\nsat on\n"
