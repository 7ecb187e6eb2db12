"""Principal axes of a store's rows, half whitened and rotated at random: the numbers that are worth coding.

Products with a direction d are to survive. Under "fisher" d = A^-1 q, A = F + lambda I = L L', so that
<d, x> = <L^-1 q, L^-1 x>: axes are the principal ones of L^-1 x, in which queries are spread as rows are. Under "rows"
they are those of x itself. With variances e along the axes P, a row is coded as y = x E, E = L'^-1 P e^(-1/4) O, and a
direction reads d D, D = L P e^(1/4) O; O is a random rotation and E' D = I. Whole whitening would be e^(-1/2): with few
bits, half of it keeps more (docs/compaction.md has the table).

Each checkpoint has axes of its own; the kept ones are those of largest variance over all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsift.engine.answers.moment import second_moment
from gradsift.engine.compaction.units import Units
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import StoreError

__all__ = ["HALF", "Axes", "Principal", "principal_axes", "spectrum", "spectrum_of_few"]

HALF = 0.5
"""How much of whitening keeps most of the best rows, over sizes and scorers."""

_SMALLEST = 1e-7
"""Variances below this share of the largest are rounding: no row reaches along their axes."""

_SEED = 0x5EED
"""Of rotations."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Maps from rows to what is coded of them, and from directions to what codes are multiplied by.

    Attributes:
        encode, decode: float32 or float64 (checkpoints * dim, k), E and D above.
    """

    encode: Tensor
    decode: Tensor

    def __len__(self) -> int:
        return self.encode.shape[1]

    def project(self, rows: Tensor) -> Tensor:
        """Float32 (m, k) from rows (m, checkpoints * dim)."""
        return rows.to(torch.float32) @ self.encode.to(torch.float32)

    def turn(self, directions: Tensor) -> Tensor:
        """Float64 (q, k) from directions (q, checkpoints * dim)."""
        return directions.to(torch.float64) @ self.decode.to(torch.float64)

    def outside(self, rows: Tensor) -> float:
        """The share of rows' squared length that lies outside the axes."""
        whole = rows.to(torch.float64)
        rest = whole - self.project(rows).to(torch.float64) @ self.decode.to(torch.float64).T
        total = float(whole.square().sum())
        return float(rest.square().sum()) / total if total > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Principal:
    """All axes, most important first, from which any number may be kept.

    Attributes:
        encode, decode: float64 (checkpoints * dim, axes) before whitening and rotation: L'^-1 P and L P.
        variance: float64 (axes,), of rows along each, descending.
        metric: "fisher" or "rows".
    """

    encode: Tensor
    decode: Tensor
    variance: Tensor
    metric: str

    def __len__(self) -> int:
        return len(self.variance)

    def keep(self, count: int, whitening: float = HALF) -> Axes:
        """The first axes, whitened and rotated.

        Args:
            whitening: 0 for none, 1 for all of it.
        """
        spread = self.variance[:count] ** (whitening / 2)
        generator = torch.Generator().manual_seed(_SEED)
        draw = torch.randn(count, count, generator=generator, dtype=torch.float64)
        turned, triangle = torch.linalg.qr(draw)
        turned = turned * triangle.diagonal().sign()
        encode, decode = (self.encode[:, :count] / spread) @ turned, (self.decode[:, :count] * spread) @ turned
        return Axes(encode.to(torch.float32), decode.to(torch.float32))


def principal_axes(
    store: FeatureStore, units: Units, most: int, held: Sequence[int], weights: Tensor | None, fisher: bool
) -> Principal:
    """Axes of a store's rows, from one streamed pass per checkpoint.

    Args:
        most: axes wanted at most.
        held: rows that are left out.
        weights: float64 (n,), what rows are multiplied by first.
        fisher: along the Fisher of the store's curvature sample.

    Raises:
        StoreError: all rows are zero.
    """
    curvature = store.curvature if fisher else None
    sampled = None if curvature is None else units.fold(curvature)
    encodes, decodes, variances = [], [], []
    for checkpoint in range(units.count):
        factor = None
        if sampled is not None:
            factor = _factor(Fisher(sampled[:, checkpoint], examples=len(store)))
        rows = _rows(store, units, checkpoint, set(held), weights)
        few = len(store) - len(held) < store.features.shape[-1]
        values, vectors = spectrum_of_few(rows, factor) if few else spectrum(rows, factor)
        values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
        variances.append(values)
        if factor is None:
            encodes.append(vectors)
            decodes.append(vectors)
        else:
            encodes.append(torch.linalg.solve_triangular(factor.T, vectors, upper=True))
            decodes.append(factor @ vectors)
    values = torch.cat(variances)
    order = torch.argsort(values, descending=True, stable=True)[:most]
    order = order[values[order] > _SMALLEST * values.max().clamp_min(0)]
    if not len(order):
        raise StoreError(f"'{store.path}' has no row with a gradient: extract examples whose tokens carry loss")
    encode, decode = torch.block_diag(*encodes)[:, order], torch.block_diag(*decodes)[:, order]
    return Principal(encode, decode, values[order], "rows" if sampled is None else "fisher")


def _rows(
    store: FeatureStore, units: Units, checkpoint: int, held: set[int], weights: Tensor | None
) -> Iterator[Tensor]:
    """Blocks of the rows at one checkpoint."""
    for first, block in store.blocks():
        part = units.fold(block)[:, checkpoint]
        if weights is not None:
            part = part * weights[first : first + len(part), None].to(part.dtype)
        kept = [i for i in range(len(part)) if first + i not in held]
        if kept:
            yield part if len(kept) == len(part) else part[kept]


def spectrum(rows: Iterator[Tensor], factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Variances of rows, or of L^-1 x, and the axes they are along, (dim, dim); ascending."""
    total, count = second_moment(rows)
    moment = total / count
    if factor is not None:
        half = torch.linalg.solve_triangular(factor, moment, upper=False)
        moment = torch.linalg.solve_triangular(factor, half.T.contiguous(), upper=False)
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    return values, vectors


def spectrum_of_few(rows: Iterator[Tensor], factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same from rows' inner products, which are fewer than those of their numbers; axes (dim, rows)."""
    columns = torch.cat([block.to(torch.float64) for block in rows]).T
    if factor is not None:
        columns = torch.linalg.solve_triangular(factor, columns, upper=False)
    values, mixed = torch.linalg.eigh(columns.T @ columns / columns.shape[1])
    length = (values * columns.shape[1]).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return values, columns @ mixed / length


def _factor(fisher: Fisher) -> Tensor:
    """Cholesky factor of ``F + lambda I`` in float64."""
    rows = fisher.rows.to(torch.float64)
    matrix = rows.T @ rows / len(rows)
    matrix.diagonal().add_(fisher.damping)
    factor: Tensor = torch.linalg.cholesky(matrix)
    return factor
