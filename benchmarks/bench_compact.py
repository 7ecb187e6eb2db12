"""Compacted stores: recall by bytes on a language model that was really trained, and a query to 10^6 of 128 bytes.

Recall is of the sketch's own best 10, as `gradsift compact` prints it, over ways to code; and of the exact best 10,
when exact gradients decide on the list of 100 that the codes give.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_search import DIM, Setup
from paired import FULL, paired
from torch import Tensor, nn
from trained_lm import train

import gradsift as gs
from gradsift.engine.compaction.axes import HALF, principal_axes, spectrum, spectrum_of_few
from gradsift.engine.compaction.codes import BITS, decode, encode
from gradsift.engine.compaction.layout import SCALE_BYTES, group
from gradsift.engine.compaction.measure import Coding, ask, held_rows, measure
from gradsift.engine.compaction.units import units_of
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.extras import require
from gradsift.engine.losses import language_model
from gradsift.engine.store.block_writer import BlockWriter
from gradsift.engine.store.format import write_description
from gradsift.engine.store.ids import seed_of

FEW = 400 if FULL else 40
RECORDS, QUERIES, SAMPLE, SKETCH = (3000, 16, 600, 4096) if FULL else (200, 2, 20, 512)
SIZES = (64, 128, 256, 512) if FULL else (64,)
ROWS = 1_000_000 if FULL else 20_000
ROUNDS = 15 if FULL else 2
BYTES, K, BATCH = 128, 10, 50


class Trained:
    """A model, a store of its records, and the same gradients without a sketch."""

    def __init__(self, folder: Path) -> None:
        sizes = {"width": 64, "steps": 300, "epochs": 1} if FULL else {"width": 32, "steps": 2, "epochs": 1}
        self.model, self.records, unseen = train(RECORDS, unseen=QUERIES, **sizes)
        batches = [
            {"input_ids": self.records[i : i + BATCH], "ids": list(range(i, min(i + BATCH, RECORDS)))}
            for i in range(0, RECORDS, BATCH)
        ]
        spec = gs.SketchSpec(dim=SKETCH)
        self.store = gs.extract(
            self.model, batches, language_model, folder / "a.zarr", spec=spec, curvature=SAMPLE, progress=False
        )
        self.asked = gs.Capture(self.model, spec)({"input_ids": unseen}, language_model)
        draws = self.store.curvature_draws
        seeds = [seed_of(spec.seed, example, draw) for example, draw in draws]
        drawn = self.records[[example for example, _ in draws]]
        self.sample = [
            language_model.sampled_batch(self.model, {"input_ids": drawn[i : i + BATCH]}, seeds[i : i + BATCH])
            for i in range(0, len(drawn), BATCH)
        ]
        whole = gs.Capture(self.model, gs.SketchSpec(kind="identity"))
        rows, queries, sampled = (
            torch.cat([whole(batch, language_model).values for batch in some])
            for some in (batches, [{"input_ids": unseen}], self.sample)
        )
        directions = {"fisher": Fisher(sampled, examples=RECORDS).solve(queries), "dot": queries.double()}
        self.truth = {name: torch.topk(d @ rows.double().T, K).indices.numpy() for name, d in directions.items()}
        self.vectors = [gs.gradient(self.model, {"input_ids": q[None]}, language_model) for q in unseen]

    def exact(self, scorer: str) -> gs.Rescorer:
        """Exact scores of the queries."""
        vectors: list[Any] = self.vectors
        if scorer == "fisher":
            curvature = gs.Curvature(self.model, self.sample, language_model, self.store.curvature, examples=RECORDS)
            vectors = [gs.precondition(v, "fisher", curvature=curvature) for v in vectors]
        return gs.Rescorer(self.model, self._fetch, language_model.token_losses, vectors)

    def _fetch(self, rows: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for part in self.records[list(rows)].split(BATCH):
            yield {"input_ids": part}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("scorer", ["fisher", "dot"])
@pytest.mark.parametrize("metric", ["fisher", "rows"])
def test_ways_to_code(benchmark: Any, trained: Trained, scorer: str, metric: str) -> None:
    store, units = trained.store, units_of(trained.store)
    held = held_rows(store)
    question = ask(store, units, scorer, None, held)
    most = 8 * (max(SIZES) - SCALE_BYTES)
    axes = principal_axes(store, units, most, held, None, metric == "fisher")

    def recalls(bytes: int, bits: int, whitening: float) -> str:
        count = 8 * (bytes - SCALE_BYTES) // bits
        if count > len(axes):
            return "none"
        found = measure(store, units, question, Coding(axes.keep(count, whitening), bits, bytes), None, lambda _: None)
        return f"{found.alone:.3f} / {found.listed:.3f}"

    facts = []
    for size in SIZES:
        figures = ", ".join(f"{bits} bit {recalls(size, bits, HALF)}" for bits in BITS)
        facts.append(f"{size} bytes: {figures}")
    whitened = ", ".join(f"{name} {recalls(BYTES, 2, w)}" for name, w in (("none", 0.0), ("half", HALF), ("all", 1.0)))
    facts.append(f"{BYTES} bytes, 2 bit, whitening: {whitened}")
    about = f"recall@{K} of the sketch's own {scorer}, alone / list of 100, axes of {metric}"
    benchmark.extra_info["facts"] = [f"{about}, {fact}" for fact in facts]
    benchmark.pedantic(axes.keep, args=(min(len(axes), most // 8),), rounds=1)


@pytest.mark.parametrize("scorer", ["fisher", "dot"])
def test_two_stages(benchmark: Any, trained: Trained, scorer: str, tmp_path: Path) -> None:
    """Codes find, exact gradients decide: against exact scores of every record."""
    exact, truth, facts = trained.exact(scorer), trained.truth[scorer], []
    for size in SIZES:
        small = gs.compact(trained.store, tmp_path / str(size), bytes=size, scorer=scorer, progress=False)
        found = [gs.topk(small, trained.asked, K, scorer, rescore=how).rows for how in (None, exact)]
        alone, decided = (_recall(rows, truth) for rows in found)
        facts.append(
            f"recall@{K} of exact {scorer} over {RECORDS:,} records, {small.bytes} bytes: alone {alone:.3f}; "
            f"list of 100 decided by exact gradients {decided:.3f}"
        )
        if FULL and size >= BYTES:
            assert decided >= 0.97, facts
    whole = _recall(gs.topk(trained.store, trained.asked, K, scorer, rescore=exact).rows, truth)
    facts.append(
        f"recall@{K} of exact {scorer} over {RECORDS:,} records, {4 * SKETCH:,} bytes (the whole sketch): "
        f"list of 100 decided by exact gradients {whole:.3f}"
    )
    benchmark.extra_info["facts"] = facts
    benchmark.pedantic(gs.topk, args=(small, trained.asked, K, scorer), rounds=1)


@pytest.mark.parametrize("scorer", ["fisher", "dot"])
def test_inverted_file(benchmark: Any, trained: Trained, scorer: str, tmp_path: Path) -> None:
    """What clusters of rows would spare a query: how much of the codes' best 10 lies in the clusters nearest to it."""
    faiss = require("faiss")
    small = gs.compact(trained.store, tmp_path / "small", bytes=BYTES, scorer=scorer, progress=False)
    rows = np.concatenate([decode(codes, scale, small.bits).numpy() for _, codes, scale in small.chunks])
    asked = trained.asked.values.double()
    if scorer == "fisher":
        asked = Fisher(trained.store.curvature, examples=RECORDS).solve(asked)
    asked = small.axes_maps.turn(asked).numpy()
    truth = np.argsort(-(asked @ rows.T.astype(np.float64)), axis=1)[:, :K]
    clusters = 64 if FULL else 8
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], clusters, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    sizes = np.array([index.invlists.list_size(i) for i in range(clusters)])
    facts = []
    for probed in (clusters // 8, clusters // 4, clusters // 2, clusters):
        index.nprobe = probed
        found = index.search(asked.astype(np.float32), K)[1]
        _, near = index.quantizer.search(asked.astype(np.float32), probed)
        facts.append(f"{sizes[near].sum(axis=1).mean() / len(rows):.2f} of the rows {_recall(found, truth):.3f}")
    assert facts[-1] == "1.00 of the rows 1.000"
    benchmark.extra_info["facts"] = [
        f"inverted file of {clusters} clusters over {BYTES} bytes, recall@{K} of the codes' own {scorer}, "
        f"{len(asked)} queries, reading {'; '.join(facts)}"
    ]
    benchmark.pedantic(index.search, args=(asked.astype(np.float32), K), rounds=1)


def test_axes_of_few_rows(benchmark: Any) -> None:
    """From inner products of rows, which are fewer than those of their numbers."""
    generator = torch.Generator().manual_seed(0)
    rows, sample = (torch.randn(n, SKETCH, generator=generator) for n in (FEW, 2 * FEW))
    matrix = sample.T.double() @ sample.double() / len(sample)
    matrix.diagonal().add_(1.0)
    factor = torch.linalg.cholesky(matrix)
    calls = {"numbers": lambda: spectrum(iter([rows]), factor), "rows": lambda: spectrum_of_few(iter([rows]), factor)}
    paired(benchmark, f"axes of {FEW:,} rows of {SKETCH:,} numbers along a Fisher", calls, "numbers", rounds=2)


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.isin(wanted, some).mean() for some, wanted in zip(found, truth, strict=True)]))


def million(folder: Path) -> gs.CompactStore:
    """A compacted store whose rows are drawn instead of extracted, which would take 16 GB of sketches."""
    small = gs.compact(_template(folder), folder / "small", bytes=BYTES, scorer="dot", progress=False)
    description = {**small.metadata, "rows": ROWS, "complete": True}
    generator = torch.Generator().manual_seed(0)
    root = folder / "million"
    (root / "axes").mkdir(parents=True)
    for name in ("encode", "decode"):
        (root / "axes" / name).mkdir()
        (small.path / "axes" / name / "c.0.0").rename(root / "axes" / name / "c.0.0")
    with BlockWriter(root, group(description), lambda: None) as writer:
        for first in range(0, ROWS, 10_000):
            n = min(10_000, ROWS - first)
            lengths = torch.exp(0.7 * torch.randn(n, 1, generator=generator))
            codes, scale = encode(torch.randn(n, small.axes, generator=generator) * lengths, small.bits)
            ids = np.arange(first, first + n)
            columns = {"codes": codes, "scale": scale, "grad_norm": lengths.numpy(), "loss": np.zeros(n), "ids": ids}
            writer.append(first, columns)
        writer.finish(ROWS)
    write_description(root, description)
    return gs.CompactStore.open(root)


def _template(folder: Path) -> gs.FeatureStore:
    """A few rows of the sketch's size, from whose axes the large store is made."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(500, 64, generator=generator), "ids": list(range(i, i + 500))} for i in (0, 500, 1000)]
    model = nn.Linear(64, 64, bias=False)
    spec = gs.SketchSpec(dim=DIM)
    return gs.extract(model, batches, _fit, folder / "template", spec=spec, modules="*", curvature=0, progress=False)


def _fit(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["x"].flip(1)).square().sum(dim=1)


@pytest.mark.parametrize("queries", [1, 8])
def test_million(benchmark: Any, tmp_path: Path, queries: int) -> None:
    store, rows = million(tmp_path), Setup(tmp_path)
    asked = torch.randn(queries, DIM, generator=torch.Generator().manual_seed(2))
    start = time.perf_counter()
    first = gs.topk(store, asked, K, "dot")
    begun = time.perf_counter() - start
    reference = store.scan_codes(asked.double(), K)
    assert np.array_equal(first.rows, reference.rows)
    assert np.array_equal(first.scores, reference.scores)
    if queries == 1:
        benchmark.extra_info["facts"] = [
            f"compacted store of {ROWS:,} rows, {store.bytes} bytes each: the first query, which builds the index, "
            f"{begun:.1f} s"
        ]
    plain = f"{len(rows):,} whole rows of {DIM} numbers"
    ways = {
        plain: lambda: gs.topk(rows, asked, K, "dot"),
        f"{ROWS:,} compacted rows of {store.bytes} bytes": lambda: gs.topk(store, asked, K, "dot"),
    }
    paired(benchmark, f"top-{K} in a compacted store, {queries} queries", ways, plain, ROUNDS)
