"""Rows that belong to examples by a map: noised copies of an example, crops, frames, in any number and order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import SPEC, error, fill
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import gradsift as gs

TOLERANCE = 1e-5
IDENTITY = gs.SketchSpec(kind="identity")
CHANNELS, SIDE = 3, 5
MODULES = ["time", "conv", "flat", "out"]


class Mixed(nn.Module):
    """Maps on (rows, d), images, flattened and whole tokens; a kernel of its own for each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.time = nn.Linear(2, 6)
        self.conv = nn.Conv2d(CHANNELS, 6, 3, padding=1)
        self.flat = nn.Linear(6, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = (self.conv(x) + self.time(t)[:, :, None, None]).tanh()
        tokens = y.flatten(2).transpose(1, 2)
        flat = self.flat(tokens.reshape(-1, 6)).tanh()  # (rows * T, d), as in some feed-forward blocks
        return self.out(flat.view(len(x), -1, 4))


class Measured:
    """Each example seen as several rows; its loss is their sum."""

    def __init__(self, owners: Sequence[int] | None, n: int) -> None:
        self._owners, self._n = owners, n

    def owners(self, batch: dict[str, Tensor]) -> Sequence[int] | None:
        return self._owners

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        y = model(batch["x"], batch["t"])
        rows = y.square().flatten(1).mean(1) + y.flatten(1).sum(1)
        if self._owners is None:
            return rows
        return rows.new_zeros(self._n).index_add(0, torch.as_tensor(self._owners), rows)


def seen(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(rows, CHANNELS, SIDE, SIDE, generator=generator),
        "t": torch.randn(rows, 2, generator=generator),
    }


def expected(model: nn.Module, owners: Sequence[int], n: int, modules: Any) -> Tensor:
    """Sums of rows that were captured one at a time."""
    capture = gs.Capture(model, IDENTITY, modules=modules)
    data = seen(len(owners))
    total = torch.zeros(n, capture.spec.dim, dtype=torch.float64)
    for row, owner in enumerate(owners):
        single = {key: value[row : row + 1] for key, value in data.items()}
        total[owner] += capture(single, Measured(None, 1)).values[0].double()
    return total


def built(lora: bool) -> tuple[Any, Any]:
    model: Any = Mixed()
    if lora:
        return fill(get_peft_model(model, LoraConfig(r=2, target_modules=MODULES))), "lora"
    return model, MODULES


MAPS: dict[str, tuple[list[int], int]] = {
    "three rows each": ([0, 0, 0, 1, 1, 1, 2, 2, 2], 3),
    "one row each": ([0, 1, 2], 3),
    "all rows of one example": ([0, 0, 0], 1),
    "ragged": ([0, 0, 1, 2, 2, 2], 3),
    "measurement-major": ([0, 1, 2, 0, 1, 2], 3),
    "any order": ([2, 0, 1, 0, 2, 2, 0], 3),
    "an example without rows": ([0, 0, 2, 2], 3),
    "the last without rows": ([1, 1, 0, 0], 4),
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", MAPS)
def test_rows_are_sums_of_single_rows(case: str, lora: bool) -> None:
    owners, n = MAPS[case]
    model, modules = built(lora)
    total = expected(model, owners, n, modules)
    exact = gs.Capture(model, IDENTITY, modules=modules)
    features = exact(seen(len(owners)), Measured(owners, n))
    assert features.values.shape == (n, exact.spec.dim)
    present = [i for i in range(n) if i in owners]
    assert error(features.values[present], total[present]) <= TOLERANCE
    assert error(features.grad_norm[present], total[present].norm(dim=1)) <= TOLERANCE
    absent = [i for i in range(n) if i not in owners]
    assert not features.values[absent].any()
    assert not features.grad_norm[absent].any()
    assert exact.probed == (n > 1)
    sketched = gs.Capture(model, SPEC, modules=modules)(seen(len(owners)), Measured(owners, n))
    matrices = [gs.sketch_matrix(SPEC, row.name, row.shape).double() for row in exact.table]
    assert error(sketched.values, total @ torch.cat(matrices, dim=1).t()) <= TOLERANCE


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", ["three rows each", "any order"])
def test_backends_agree(case: str, backend: str, device: torch.device) -> None:
    owners, n = MAPS[case]
    model, modules = built(lora=True)
    data = {key: value.to(device) for key, value in seen(len(owners)).items()}
    reference = gs.Capture(model, SPEC, modules=modules, backend="torch")(seen(len(owners)), Measured(owners, n))
    features = gs.Capture(model.to(device), SPEC, modules=modules, backend=backend)(data, Measured(owners, n))
    assert error(features.values.cpu(), reference.values.double()) <= TOLERANCE


@pytest.mark.parametrize("case", ["three rows each", "ragged", "any order"])
def test_tap_takes_owners(case: str) -> None:
    owners, n = MAPS[case]
    model, modules = built(lora=True)
    capture = gs.Capture(model, IDENTITY, modules=modules)
    with capture.tap(owners=owners) as tap:
        Measured(owners, n)(model, seen(len(owners))).sum().backward()
    assert tap.conservation is not None
    assert tap.conservation <= TOLERANCE
    assert capture.probed
    assert error(tap.values, expected(model, owners, n, modules)) <= TOLERANCE


def test_a_map_that_is_called_twice_with_other_lengths() -> None:
    class Twice(Mixed):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            return self.out(self.flat(tokens).tanh()) + self.out(self.flat(tokens[:, :2].cos())).sum(1, keepdim=True)

    owners, n = MAPS["any order"]
    model, modules = Twice(), ["conv", "flat", "out"]
    features = gs.Capture(model, IDENTITY, modules=modules)(seen(len(owners)), Measured(owners, n))
    total = expected(model, owners, n, modules)
    assert error(features.values, total) <= TOLERANCE
    assert error(features.grad_norm, total.norm(dim=1)) <= TOLERANCE


def test_rows_along_another_axis() -> None:
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map = nn.Linear(2, 4)

        def forward(self, _: Tensor, t: Tensor) -> Tensor:
            steps = torch.stack([t, t.cos(), t.sin()])  # (steps, rows, d)
            return self.map(steps).tanh().transpose(0, 1)

    owners, n = MAPS["any order"]
    capture = gs.Capture(Second(), IDENTITY, modules="map")
    features = capture(seen(len(owners)), Measured(owners, n), batch_axis=1)
    single = [
        capture({k: v[i : i + 1] for k, v in seen(len(owners)).items()}, Measured(None, 1), batch_axis=1).values[0]
        for i in range(len(owners))
    ]
    total = torch.zeros(n, capture.spec.dim).index_add(0, torch.tensor(owners), torch.stack(single))
    assert error(features.values, total.double()) <= TOLERANCE


@pytest.mark.parametrize("case", ["three rows each", "any order"])
def test_rows_that_reach_another_example_are_found(case: str) -> None:
    """Owners that are not the true ones: a loss then reaches rows that are said to be another's."""
    owners, n = MAPS[case]
    claimed = [*owners[1:], owners[0]]

    class Wrong(Measured):
        def owners(self, batch: Any) -> Sequence[int]:
            return claimed

    model, modules = built(lora=False)
    with pytest.raises(gs.CaptureError, match=r"reaches rows of example \d: examples do not lie.*as the owners say"):
        gs.Capture(model, SPEC, modules=modules)(seen(len(owners)), Wrong(owners, n))


class Claims(Measured):
    """Says anything."""

    def __init__(self, claimed: Any) -> None:
        super().__init__([0, 0, 1, 1], 2)
        self._claimed = claimed

    def owners(self, batch: Any) -> Any:
        return self._claimed


WRONG: list[tuple[Any, type[Exception], str]] = [
    ([0, 0, 1], gs.CaptureError, r"out: axis 0 of an activation.* holds 4 entries but there are 3 owners"),
    ([0, 0, 2, 2], gs.CaptureError, "owners name example 2 but loss_fn returned 2 losses: expected owners from 0 to 1"),
    ([0, 0, -1, 1], gs.ShapeError, "owners holds -1, expected indices of examples from 0 on"),
    ([], gs.ShapeError, r"owners has shape \(0,\).*expected the index of an example for each row"),
    ([0.0, 0.0, 1.0, 1.0], gs.ShapeError, r"owners has shape \(4,\) and torch.float32"),
    ([[0, 0], [1, 1]], gs.ShapeError, r"owners has shape \(2, 2\)"),
    ([True, False, True, True], gs.ShapeError, "torch.bool"),
]


@pytest.mark.parametrize(("claimed", "kind", "words"), WRONG)
def test_wrong_owners_are_refused(claimed: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        gs.Capture(Mixed(), SPEC, modules=MODULES)(seen(4), Claims(claimed))


def test_convolution_with_too_few_owners_is_refused() -> None:
    with pytest.raises(gs.CaptureError, match="conv: the convolution sees 4 images but there are 3 owners"):
        gs.Capture(Mixed(), SPEC, modules="conv")(seen(4), Claims([0, 0, 1]))


def test_segments_and_owners_together_are_refused() -> None:
    with pytest.raises(gs.ShapeError, match="segments and owners were given"):
        gs.Capture(Mixed(), SPEC, modules="conv")(seen(4), Claims([0, 0, 1, 1]), segments=[0, 2, 4])


def test_loss_without_owners_for_this_batch_has_one_row_each() -> None:
    model, modules = built(lora=True)
    capture = gs.Capture(model, SPEC, modules=modules)
    plain = capture(seen(3), Measured(None, 3)).values
    assert torch.equal(plain, capture(seen(3), Measured([0, 1, 2], 3)).values)
