"""The two passes of an extraction: every example's gradient, then the curvature sample."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.capture.capture import Capture, LossFunction
from gradsift.engine.capture.features import Features
from gradsift.engine.checkpoints.snapshots import Snapshots
from gradsift.engine.extraction.batches import Batch, as_batch, tokens_in
from gradsift.engine.extraction.curvature_plan import CurvaturePlan, Draws
from gradsift.engine.extraction.fingerprints import batch_hash, sums_tokens
from gradsift.engine.extraction.progress import Progress, Update
from gradsift.engine.store.block_writer import BlockWriter
from gradsift.engine.store.half import to_half
from gradsift.engine.store.ids import Id, SeenIds, id_kind, read_ids, seed_of
from gradsift.engine.store.writer import StoreWriter
from gradsift.kernels.errors import DataError, StoreError

__all__ = ["Captured", "Extraction", "capture_parts", "parts_of"]

logger = logging.getLogger(__name__)


def parts_of(loss_fn: LossFunction) -> Sequence[Mapping[str, Any]]:
    """What a loss says of the parts that it keeps apart; one part, of which nothing is to be said, when it does not."""
    parts: Sequence[Mapping[str, Any]] | None = getattr(loss_fn, "parts", None)
    return ({},) if parts is None else parts


class Captured(NamedTuple):
    """Rows of a batch as a store holds them.

    Attributes:
        features: values (n, parts, dim) and grad_norm (n, parts), parts of the first checkpoint first; losses are
            those of the last checkpoint.
        losses: (n, checkpoints), one column without checkpoints.
    """

    features: Features
    losses: Tensor


def capture_parts(
    capture: Capture,
    batch: Batch,
    loss_fn: LossFunction,
    together: int,
    snapshots: Snapshots | None = None,
    *,
    batch_axis: int = 0,
    adam: bool = True,
) -> Captured:
    """Rows of a batch, with all parts that capture, loss and checkpoints keep apart.

    Adam's update is of the gradient of an example's mean loss per token, where the loss is a sum over tokens: moments
    come from training on means, and unlike a gradient an update of the sum cannot be divided afterwards. Losses stay
    sums.

    Args:
        together: rows of the loss per example, ``len(parts_of(loss_fn))``.
        snapshots: mounted; None for the model as it is.
        adam: apply the moments of checkpoints that have some.
    """
    found: list[Features] = []
    for number in range(1 if snapshots is None else len(snapshots)):
        moments = None
        if snapshots is not None:
            snapshots.load(number)
            moments = snapshots.adam[number] if adam else None
        loss = loss_fn if moments is None else _PerToken.of(loss_fn, batch)
        features = capture(batch, loss, batch.get("segments"), batch_axis, moments)
        if isinstance(loss, _PerToken) and features.loss is not None:
            features = replace(features, loss=features.loss * loss.tokens.to(features.loss))
        features = features.fold(together)
        n, dim = len(features.values), features.values.shape[-1]
        found.append(
            replace(
                features,
                values=features.values.reshape(n, -1, dim),
                grad_norm=features.grad_norm.reshape(n, -1),
                groups=(),
            )
        )
    losses = torch.stack([features.loss for features in found if features.loss is not None], dim=1)
    if len(found) == 1:
        return Captured(found[0], losses)
    values = torch.cat([features.values for features in found], dim=1)
    norms = torch.cat([features.grad_norm for features in found], dim=1)
    return Captured(replace(found[-1], values=values, grad_norm=norms), losses)


class _Stored(NamedTuple):
    """What a store says of the batch that begins at some row."""

    rows: int
    hash: bytes


@dataclass(slots=True)
class Extraction:
    """What both passes share.

    Attributes:
        store: where rows go.
        capture: gives the rows.
        loss_fn: see ``extract``.
        batch_axis: see ``Capture``.
        shuffled: the loader gives another order each time, so its batches cannot be compared.
        snapshots: checkpoints at which every row is taken, mounted; None for the model as it is.
    """

    store: StoreWriter
    capture: Capture
    loss_fn: LossFunction
    batch_axis: int
    shuffled: bool
    snapshots: Snapshots | None = None

    def examples(self, batches: Iterable[Any], total: int | None, plan: CurvaturePlan | None, report: Progress) -> int:
        """Write a row of every example that has none yet; returns the number of examples."""
        clock = _Clock("examples", total, report)
        with self.store.examples() as writer:
            column = self.store.column("ids")
            seen = SeenIds(lambda n: (i for part in writer.stored(column, n) for i in part.tolist()))
            memo = _Memo(self.store, dict(writer.committed))
            first = 0
            for number, batch in enumerate(map(as_batch, batches)):
                digest = batch_hash(batch)
                stored = memo.batch_at(first)
                if stored is not None and stored.hash != digest:
                    raise StoreError(self._changed(number, first, stored.rows))
                ids = self._ids(batch)
                if stored is not None and not writer.needs(first, first + stored.rows):
                    n, computed = stored.rows, False
                else:
                    n, computed = self._write(writer, batch, ids, first, digest), True
                if ids is not None:
                    seen.add(ids)
                if plan is not None:
                    plan.add(number, n)
                first += n
                clock.tick(first, n if computed else 0, tokens_in(batch) if computed else 0)
            ends = [index * column.block + rows for index, rows in writer.committed.items()]
            if first < max([*ends, self.store.description["rows"] or 0]):
                raise StoreError(
                    f"the data ends after {first} examples but {self.store.root} was begun with more: "
                    "give the same data, or extract to another path"
                )
            writer.finish(first)
        return first

    def labels(self, loader: Iterable[Any], plan: Mapping[int, Draws], report: Progress) -> int:
        """Write the gradients of sampled labels; returns the number of rows."""
        total = sum(d.full * d.rows + d.extra for d in plan.values())
        clock = _Clock("curvature", total, report)
        row = 0
        memo = _Memo(self.store, self.store.examples_group.committed(self.store.root))
        with self.store.curvature() as writer:
            for number, batch in enumerate(map(as_batch, loader)):
                if row == total:
                    break
                if number not in plan:
                    continue
                chosen = plan[number]
                stored = memo.batch_at(chosen.first)
                if not self.shuffled and stored is not None and stored.hash != batch_hash(batch):
                    raise StoreError(self._changed(number, chosen.first, chosen.rows))
                ids = self._ids(batch) or list(range(chosen.first, chosen.first + chosen.rows))
                for draw in range(chosen.full + (chosen.extra > 0)):
                    n = chosen.rows if draw < chosen.full else chosen.extra
                    needed = writer.needs(row, row + n)
                    if needed:
                        self._write_labels(writer, batch, ids, row, n, draw)
                    row += n
                    clock.tick(row, n if needed else 0, tokens_in(batch) if needed else 0)
            if row != total:
                raise DataError(
                    f"the loader gave fewer batches the second time: {row} of {total} curvature rows could be drawn; "
                    "give a loader that can be gone through again"
                )
            writer.finish(total)
        logger.info(
            "curvature sample: %d rows of sampled-label gradients in %.1f s (%d computed in this run)",
            total,
            clock.seconds,
            clock.computed,
        )
        return total

    def _write(self, writer: BlockWriter, batch: Batch, ids: list[Id] | None, first: int, digest: bytes) -> int:
        features, losses = self._capture(batch, self.loss_fn)
        n = len(features.values)
        names = self._names(ids, first, n)
        loss = _numbers(features.loss)
        rows: dict[str, Any] = {
            **self._finite(features, losses, names),
            "loss": loss,
            "grad_norm": _numbers(features.grad_norm),
            "ids": names,
            "batch_hash": np.broadcast_to(np.frombuffer(digest, np.uint8), (n, 16)),
            "batch_rows": np.full(n, n, dtype=np.int32),
        }
        if self.snapshots is not None:
            rows["checkpoint_loss"] = _numbers(losses)
        if self.store.description["loss"]["tokens"]:
            rows["loss_tokens"] = np.asarray(getattr(self.loss_fn, "loss_tokens")(batch))  # noqa: B009
            if rows["loss_tokens"].shape != (n,):
                raise DataError(
                    f"loss_tokens gave shape {rows['loss_tokens'].shape} for {n} examples: expected one number each"
                )
        writer.append(first, rows)
        return n

    def _write_labels(self, writer: BlockWriter, batch: Batch, ids: list[Id], row: int, n: int, draw: int) -> None:
        seeds = [seed_of(self.capture.spec.seed, example, draw) for example in ids]
        rows = self._finite(*self._capture(batch, _Sampled(self.loss_fn, seeds), adam=False), ids)
        columns: dict[str, Any] = {
            **{f"curvature/{name}": values[:n] for name, values in rows.items()},
            "curvature/ids": ids[:n],
            "curvature/draw": np.full(n, draw, dtype=np.int32),
        }
        writer.append(row, columns)

    def _capture(self, batch: Batch, loss_fn: LossFunction, adam: bool = True) -> Captured:
        together = len(parts_of(self.loss_fn))
        return capture_parts(
            self.capture, batch, loss_fn, together, self.snapshots, batch_axis=self.batch_axis, adam=adam
        )

    def _ids(self, batch: Batch) -> list[Id] | None:
        ids = read_ids(batch)
        if ids is None and self.shuffled:
            raise DataError(
                "the loader shuffles and its batches have no ids, so no row could be told from another: "
                "put 'ids' in the batches, or set shuffle=False"
            )
        kind = self.store.description["ids"]
        if (ids is None and kind == "string") or any(id_kind([i]) != kind for i in ids or ()):
            raise DataError("ids are text in some examples and integers or missing in others: give all the same kind")
        return ids

    def _names(self, ids: list[Id] | None, first: int, n: int) -> list[Id]:
        if ids is None:
            return list(range(first, first + n))
        if len(ids) != n:
            raise DataError(f"a batch has {len(ids)} ids but the loss gave {n} examples: give one id for each")
        return ids

    def _finite(self, features: Features, losses: Tensor, ids: list[Id]) -> dict[str, np.ndarray]:
        values, loss = _numbers(features.values), _numbers(losses)
        good = np.isfinite(values).all(axis=(1, 2)) & np.isfinite(loss).all(axis=1)
        if not good.all():
            i = int(np.flatnonzero(~good)[0])
            bad = loss[i][~np.isfinite(loss[i])]
            what = f"a loss of {bad[0]}" if len(bad) else "a gradient that is not finite"
            raise DataError(
                f"example {ids[i]!r} has {what}: repair it or take it out of the data; "
                "the blocks before it are safe and the same command goes on from there"
            )
        if self.store.description["dtype"] == "float32":
            return {"features": values}
        half, scale = to_half(values)
        return {"features": half, "scale": scale}

    def _changed(self, number: int, first: int, rows: int) -> str:
        advice = (
            "the loader shuffles, so a stopped extraction cannot go on: set shuffle=False"
            if self.shuffled
            else "give the same data in the same batches, or extract to another path"
        )
        return (
            f"batch {number} (rows {first} to {first + rows - 1}) is not what {self.store.root} was made from: {advice}"
        )


def _numbers(values: Tensor | None) -> np.ndarray:
    assert values is not None
    return values.detach().float().cpu().numpy()


class _Sampled:
    """The loss of labels drawn from the model, as a loss: what else the loss says of its rows holds for them too."""

    def __init__(self, loss_fn: LossFunction, seeds: Sequence[int]) -> None:
        self._loss_fn = loss_fn
        self._seeds = seeds
        if hasattr(loss_fn, "owners"):
            self.owners = loss_fn.owners

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        sampled: Tensor = getattr(self._loss_fn, "sampled")(model, batch, self._seeds)  # noqa: B009
        return sampled


class _PerToken:
    """A loss over the number of its tokens, at least one.

    Attributes:
        tokens: of each loss, (n,).
    """

    def __init__(self, loss_fn: LossFunction, tokens: Tensor) -> None:
        self._loss_fn = loss_fn
        self.tokens = tokens.clamp_min(1)
        self.kind = getattr(loss_fn, "kind", None)
        if hasattr(loss_fn, "owners"):
            self.owners = loss_fn.owners

    @classmethod
    def of(cls, loss_fn: LossFunction, batch: Batch) -> LossFunction:
        """The loss itself where it is no sum over tokens."""
        if not sums_tokens(loss_fn):
            return loss_fn
        tokens = torch.as_tensor(cast(Any, loss_fn).loss_tokens(batch))
        return cls(loss_fn, tokens.repeat_interleave(len(parts_of(loss_fn))))

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        losses = self._loss_fn(model, batch)
        return losses / self.tokens.to(losses)


class _Memo:
    """Hash and size of the batches that a store was made from, read block by block."""

    def __init__(self, store: StoreWriter, committed: Mapping[int, int]) -> None:
        self._root = store.root
        self._rows = store.column("batch_rows")
        self._hash = store.column("batch_hash")
        self._committed = committed
        self._end: int | None = store.description["rows"]
        self._block = -1
        self._cached: tuple[np.ndarray, np.ndarray]

    def batch_at(self, row: int) -> _Stored | None:
        """The batch whose first row this is; None when that row was not there when this run began.

        Raises:
            StoreError: the store ends before this row.
        """
        block, place = divmod(row, self._rows.block)
        if block not in self._committed and not (self._end is not None and row >= self._end):
            return None
        if place >= self._committed.get(block, 0):
            raise StoreError(
                f"{self._root} was made from {row} examples and the data has more: "
                "give the same data, or extract to another path"
            )
        if block != self._block:
            self._cached = (self._rows.read(self._root, block), self._hash.read(self._root, block))
            self._block = block
        rows, hashes = self._cached
        return _Stored(int(rows[place]), hashes[place].tobytes())


class _Clock:
    """Counts and reports."""

    def __init__(self, stage: str, total: int | None, report: Progress) -> None:
        self._stage, self._total, self._report = stage, total, report
        self._start = time.perf_counter()
        self.computed = self._tokens = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def tick(self, rows: int, computed: int, tokens: int) -> None:
        self.computed += computed
        self._tokens += tokens
        self._report(Update(self._stage, rows, self._total, self.computed, self._tokens, self.seconds))
