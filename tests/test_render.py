"""Coloured text and the window onto long texts."""

from __future__ import annotations

import numpy as np
import pytest
from rich.text import Text

from gradsift.bindings.render import bytes_text, coloured


def styles(text: Text) -> dict[str, str]:
    return {text.plain[span.start : span.end]: str(span.style) for span in text.spans}


def test_tokens_are_coloured_by_their_share() -> None:
    text = coloured(["the", " cat", " sat", " on"], [0.0, 4.0, -1.0, 0.1])
    assert text.plain == "the cat sat on"
    assert styles(text) == {"cat": "black on green", " sat": "red"}
    assert coloured(["the", " cat"], [3.0, -3.0], marks=True).plain == "+[the] -[cat]"
    assert coloured(["a\n", "b"], None).plain == "a↵b"
    assert styles(coloured(["the", " cat"], [0.0, 0.0], dim=[True, False])) == {"the": "dim"}


def test_a_long_text_is_shown_where_its_strongest_tokens_are() -> None:
    pieces = [f" w{i:03}" for i in range(200)]
    scores = np.zeros(200)
    scores[[120, 121]] = [5.0, -5.0]
    shown = coloured(pieces, scores, limit=50).plain
    assert "w120 w121" in shown
    assert shown.startswith("… ")
    assert shown.endswith(" …")
    assert len(shown) <= 54
    assert coloured(pieces, scores, limit=10_000).plain == "".join(pieces)
    assert coloured(["x" * 100], [1.0], limit=10).plain == "x" * 100


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (31_200_000, "31.2 MB"), (5e12, "5 TB")])
def test_bytes(size: float, text: str) -> None:
    assert bytes_text(size) == text
