"""Retrieval over rows with parts: as a dense sum over them, whatever the blocks; cosine with each part's own norm."""

from __future__ import annotations

import pytest
import torch
from stores import features, random_rows

import gradsift as gs

SPEC = gs.SketchSpec(dim=64)


def test_folding_keeps_an_example_s_parts_together() -> None:
    flat = features(random_rows(6), SPEC)
    folded = flat.fold(3)
    assert folded.values.shape == (2, 3, 64)
    torch.testing.assert_close(folded.values[1, 0], flat.values[3], rtol=0, atol=0)
    torch.testing.assert_close(folded.grad_norm[1], flat.grad_norm[3:], rtol=0, atol=0)
    assert folded.loss is not None
    assert folded.loss.shape == (2,)
    assert flat.fold(1) is flat
    with pytest.raises(gs.ShapeError, match=r"shape \(6, 64\), expected 4 rows per example"):
        flat.fold(4)
    with pytest.raises(gs.ShapeError, match=r"shape \(2, 3, 64\), expected 2 rows"):
        folded.fold(2)
