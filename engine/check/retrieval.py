"""Checks of rankings on a pool of examples: low against full precision, and the sketch against exact gradients."""

from __future__ import annotations

from glob import escape
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from gradsift.engine.capture.maps import Map
from gradsift.engine.check.batches import cast, segments_of
from gradsift.engine.check.case import Case
from gradsift.engine.check.parts import PartCapture, in_dtype, kind_of, repeatable
from gradsift.engine.check.report import Result, Verdict
from gradsift.kernels.spec import SketchSpec

__all__ = ["overlap", "precision", "sketch"]

PerKind = dict[str, float]

_EXACT_NUMBERS = 1 << 28
"""Numbers of exact gradients that are held at once: 1 GiB."""

_TOP = 10


def precision(case: Case) -> tuple[Result, PerKind]:
    """Rows of the model in bfloat16 (or its own low precision) against float32."""
    weights = [p for p in case.model.parameters() if p.is_floating_point()]
    own = {p.dtype for p in weights} & {torch.bfloat16, torch.float16}
    if any(not p.is_floating_point() and p.numel() > 1 for p in case.model.parameters()):
        return Result(
            "precision", "skip", "the weights are quantised, so there is no full precision to compare with"
        ), {}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return Result("precision", "skip", "autocast decides the precision here: call check outside of it"), {}
    low = own.pop() if own else torch.bfloat16
    word = str(low).removeprefix("torch.")
    changed = weights if own else _base_weights(case, weights)
    changed = [p for p in changed if p.dtype == (low if own else torch.float32)] or changed
    full_rows, low_rows, count = _both(case, changed, torch.float32 if own else low)
    if own:
        full_rows, low_rows = low_rows, full_rows
    cosines = {kind: torch.cosine_similarity(low_rows[kind], full_rows[kind], dim=1) for kind in full_rows}
    full, reduced = (torch.stack(list(rows.values())).sum(0) for rows in (full_rows, low_rows))
    alive = full.norm(dim=1) > 0
    if not bool(alive.any()):
        return Result("precision", "skip", "no example has a gradient"), {}
    total = torch.cosine_similarity(full, reduced, dim=1)[alive]
    per_kind = {kind: float(c[alive].mean()) for kind, c in cosines.items()}
    k = _k(count)
    kept = overlap(full @ full.T, reduced @ reduced.T, k)
    mean, least = float(total.mean()), float(total.min())
    text = (
        f"rows in {word} and in float32 have cosine {mean:.4f} (least {least:.3f}), and {kept:.0%} of the top {k} "
        f"among {count} examples survive"
    )
    if mean >= 0.99 and kept >= 0.8:
        return Result("precision", "ok", text, mean, 0.99), per_kind
    if own:
        verdict: Verdict = "fail" if mean < 0.9 else "warn"
        return Result("precision", verdict, f"{text}: load the model with dtype float32", mean, 0.99), per_kind
    return Result("precision", "warn", f"{text}: keep float32, as the model is now", mean, 0.99), per_kind


def sketch(case: Case) -> tuple[Result, PerKind]:
    """Rankings and inner products of the sketch against those of exact gradients."""
    if case.spec.kind == "identity":
        return Result("sketch", "skip", "kind='identity' does not project"), {}
    count = sum(n for _, n in case.pool)
    maps = _fitting(case.maps, _EXACT_NUMBERS // max(count, 1))
    rows, exact = _exact_and_sketched(case, maps)
    count = len(rows.values)
    k = _k(count)
    dot = rows.values.double() @ rows.values.double().T
    alive = exact.gram.diagonal() > 0
    pairs = (alive[:, None] & alive).triu(1)
    if not bool(pairs.any()):
        return Result("sketch", "skip", "fewer than two examples have a gradient"), {}
    error, theory = _error(dot, exact.gram, pairs), _theory(exact, pairs, case.spec.dim)
    per_kind = {
        kind: _error(rows.by_kind[kind].double() @ rows.by_kind[kind].double().T, gram, (gram.diagonal() > 0) & pairs)
        for kind, gram in exact.by_kind.items()
        if kind in rows.by_kind and bool(((gram.diagonal() > 0) & pairs).any())
    }
    recall, listed = overlap(exact.gram, dot, k), overlap(exact.gram, dot, k, among=3 * k)
    part = "" if len(maps) == len(case.maps) else f" (on {len(maps)} of {len(case.maps)} maps)"
    text = (
        f"dim {case.spec.dim} finds {recall:.0%} of the exact top {k} among {count} examples{part}, {listed:.0%} in a "
        f"short list of {min(3 * k, count - 1)} (chance {k / max(count - 1, 1):.0%}); inner products are off by "
        f"{error:.1%}, in theory {theory:.1%}"
    )
    if error > 3 * theory + 1e-6:
        return Result("sketch", "fail", f"{text}: this is no rounding, report it", error, 3 * theory), per_kind
    if listed < 0.9:
        return Result("sketch", "warn", f"{text}: take a larger dim, and re-score a longer list", listed, 0.9), per_kind
    return Result("sketch", "ok", text, error, 3 * theory), per_kind


def overlap(truth: Tensor, found: Tensor, k: int, among: int | None = None) -> float:
    """Mean share of each row's k largest entries of ``truth`` that are among the largest of ``found``.

    Args:
        truth, found: (n, n) scores; the diagonal does not count.
        k: how many are true.
        among: how many of ``found`` are looked at; k unless given.
    """
    n = len(truth)
    k, among = min(k, n - 1), min(among or k, n - 1)
    if k < 1:
        return 1.0
    top, listed = (
        scores.clone().fill_diagonal_(-torch.inf).topk(size, dim=1).indices
        for scores, size in ((truth, k), (found, among))
    )
    return float((top[:, :, None] == listed[:, None, :]).any(2).double().mean())


class _Rows(NamedTuple):
    values: Tensor
    by_kind: dict[str, Tensor]


class _Exact(NamedTuple):
    """Gram matrices (n, n) in float64: of gradients, per kind of map, and of their squared entries."""

    gram: Tensor
    by_kind: dict[str, Tensor]
    squares: Tensor


def _k(count: int) -> int:
    """Ten, or as many as leave three times as many wrong answers."""
    return max(1, min(_TOP, (count - 1) // 4))


def _base_weights(case: Case, weights: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """What a model loaded in low precision would hold in it: everything, but for LoRA's A and B."""
    adapters = {id(p) for found in case.maps if found.kind == "lora" for p in found.parameters.values()}
    return [p for p in weights if id(p) not in adapters]


def _both(
    case: Case, changed: list[torch.nn.Parameter], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Rows per kind of the pool as the model is, and with some weights in another dtype, within the time."""
    here: list[dict[str, Tensor]] = []
    there: list[dict[str, Tensor]] = []
    begun = perf_counter()
    for index, (batch, _) in enumerate(case.pool):
        here.append(case.ranked(index).rows)
        with repeatable(case.model), in_dtype(changed, dtype):
            there.append(case.parts(cast(batch, dtype), by_kind=True).rows)
        if perf_counter() - begun > case.seconds / 2:
            break
    kinds = [kind for kind in here[0] if all(kind in rows for rows in here + there)]
    first, second = ({kind: torch.cat([rows[kind] for rows in all_]) for kind in kinds} for all_ in (here, there))
    return first, second, len(next(iter(first.values())))


def _fitting(maps: list[Map], numbers: int) -> list[Map]:
    """Maps spread evenly over the model whose gradients of one example are at most so many numbers."""
    sizes = [sum(p.numel() for p in found.parameters.values()) for found in maps]
    step = max(1, -(-sum(sizes) // max(numbers, 1)))
    return maps[step // 2 :: step] or maps[:1]


def _exact_and_sketched(case: Case, maps: list[Map]) -> tuple[_Rows, _Exact]:
    everything = len(maps) == len(case.maps)
    modules = case.modules if everything else [escape(found.name) for found in maps]
    exact = PartCapture(case.model, SketchSpec(kind="identity"), modules, case.backend)
    short = case.capture if everything else PartCapture(case.model, case.spec, modules, case.backend)
    kind = {row.name: kind_of(found.name) for found in exact.maps for row in found.table}
    gradients: list[Tensor] = []
    rows: list[dict[str, Tensor]] = []
    begun = perf_counter()
    for index, (batch, _) in enumerate(case.pool):
        segments = segments_of(batch)
        if everything:
            rows.append(case.ranked(index).rows)
        else:
            with repeatable(case.model):
                part = short.parts(batch, case.loss_fn, lambda found, _: kind_of(found.name), segments, case.batch_axis)
            rows.append(part.rows)
        with repeatable(case.model):
            whole = exact.parts(batch, case.loss_fn, lambda *_: "", segments, case.batch_axis)
        gradients.append(whole.values)
        if perf_counter() - begun > case.seconds / 2:
            break
    by_kind = {name: torch.cat([r[name] for r in rows]) for name in rows[0] if all(name in r for r in rows)}
    values = torch.cat([torch.stack(list(r.values())).sum(0) for r in rows])
    return _Rows(values, by_kind), _grams(torch.cat(gradients), exact.spec, kind)


def _grams(gradients: Tensor, spec: SketchSpec, kind: dict[str, str]) -> _Exact:
    n = len(gradients)
    by_kind: dict[str, Tensor] = {}
    squares = torch.zeros(n, n, dtype=torch.float64)
    offset = 0
    for name, shape in spec.layout:
        size = torch.Size(shape).numel()
        part = gradients[:, offset : offset + size]
        offset += size
        gram = by_kind.setdefault(kind[name], torch.zeros(n, n, dtype=torch.float64))
        gram += (part @ part.T).double()
        part = part.square()
        squares += (part @ part.T).double()
    return _Exact(torch.stack(list(by_kind.values())).sum(0), by_kind, squares)


def _error(got: Tensor, gram: Tensor, pairs: Tensor) -> float:
    """RMS over pairs of (<Sx, Sy> - <x, y>) / (|x| |y|)."""
    norm = gram.diagonal().sqrt()
    error = (got - gram) / (norm[:, None] * norm).clamp_min(torch.finfo(torch.float64).tiny)
    return float(error[pairs].square().mean().sqrt())


def _theory(exact: _Exact, pairs: Tensor, dim: int) -> float:
    """Root of the mean variance of a CountSketch: (1 + cos^2 - 2 sum x_k^2 y_k^2 / (|x|^2 |y|^2)) / dim."""
    square = exact.gram.diagonal()
    scale = (square[:, None] * square).clamp_min(torch.finfo(torch.float64).tiny)
    variance = (1 + exact.gram.square() / scale - 2 * exact.squares / scale) / dim
    return float(variance[pairs].mean().clamp_min(0).sqrt())
