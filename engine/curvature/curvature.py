"""The curvature of a model's loss: a sample of it with drawn labels, and everything that is fitted to that sample."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from gradsift.engine.answers.directional import Vector
from gradsift.engine.answers.rescore import Method
from gradsift.engine.capture.capture import Capture, LossFunction
from gradsift.engine.capture.frozen import evaluating
from gradsift.engine.capture.maps import Modules
from gradsift.engine.curvature import kept
from gradsift.engine.curvature.conjugate import Checkpoint
from gradsift.engine.curvature.corrected import Corrected
from gradsift.engine.curvature.corrections import Passes
from gradsift.engine.curvature.ekfac import EkFac, fit
from gradsift.engine.curvature.evidence import Evidence, choose
from gradsift.engine.curvature.fisher import Fisher
from gradsift.engine.curvature.matching import (
    at_one_checkpoint,
    of_plain_gradients,
    same_parameters,
    same_sketch,
    same_weights,
)
from gradsift.engine.curvature.products import Counted, Products
from gradsift.engine.curvature.registry import CORRECTIONS
from gradsift.engine.extraction.fingerprints import adapter_fingerprint, loss_kind, model_fingerprint
from gradsift.engine.scorers.stores import summed_tokens
from gradsift.engine.store.ids import seed_of
from gradsift.engine.store.reader import FeatureStore
from gradsift.kernels.errors import ShapeError, SpecError, StoreError
from gradsift.kernels.spec import SketchSpec

__all__ = ["Cost", "Curvature"]

_WEIGHED = 2000
"""Rows of a store that a damping is chosen by, about: their mean needs no more."""

logger = logging.getLogger(__name__)

Fetch = Callable[[Sequence[Any]], Mapping[str, Any]]


class Cost(NamedTuple):
    """What a correction will take: passes over the sample, batches in all of them, and seconds, as measured."""

    passes: int
    batches: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.passes} passes over the sample ({self.batches:,} batches), {_minutes(self.seconds)}"


class Curvature:
    """A sample of a model's loss with labels drawn from the model: what a query's gradient is corrected by.

    Args:
        model: in whatever mode; it runs in eval mode here and gets its own mode back.
        batches: re-iterable; N examples with the labels that were drawn for them, kept (``sampled_batch``): drawn anew
            from moved weights they would jump.
        loss_fn: ``loss_fn(model, batch) -> (n,)``, summed over its parts; for "ggn" with ``gauss_newton``.
        rows: sketched rows of the same examples in the same order, (N, dim) or (N, parts, dim), such as the store's
            ``curvature``; captured with a sketch of 4096 numbers when first needed unless given.
        modules: over which parameters, as of the store.
        examples: examples in the store, where known: see ``Fisher``.
        path: folder where EK-FAC factors are kept, such as ``"train.zarr.ekfac"``; in memory only unless given.
        derivatives: how directional derivatives are taken, as the ``method`` of ``Rescorer``.
        allow_idle, batch_axis: see ``Capture``.

    One sample serves any number of queries: ``correct`` them one by one.

    Attributes:
        k: of the damping where a call gives none: 1 until ``choose_k`` has found another.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any]],
        loss_fn: LossFunction,
        rows: Tensor | None = None,
        *,
        modules: Modules = "lora",
        examples: int | None = None,
        path: str | os.PathLike[str] | None = None,
        derivatives: Method = "auto",
        allow_idle: Sequence[str] = (),
        batch_axis: int = 0,
    ) -> None:
        self.model, self.loss_fn, self.modules, self.examples = model, loss_fn, modules, examples
        self.batches = batches
        self.k = 1.0
        self._given, self._path, self._derivatives = rows, path, derivatives
        self._allow_idle, self._batch_axis = allow_idle, batch_axis
        self._spec = SketchSpec() if rows is None else None
        self._factors: EkFac | None = None
        self._fisher: Fisher | None = None
        self._advance: Callable[[], None] | None = None

    @classmethod
    def of(
        cls,
        store: FeatureStore,
        model: nn.Module,
        loss_fn: Any,
        fetch: Fetch,
        *,
        rows: int | None = None,
        batch: int = 8,
        modules: Modules = "lora",
        path: str | os.PathLike[str] | None = None,
        allow_idle: Sequence[str] = (),
        batch_axis: int = 0,
    ) -> Self:
        """The curvature sample of a store, its labels drawn once more from the same seeds.

        Args:
            loss_fn: the store's loss, with ``sampled_batch``; summed over its parts.
            fetch: ``fetch(ids)`` gives one batch of the examples with these ids, in this order.
            rows: how many rows to use at most, spread evenly over the sample; all unless given.
            batch: examples in a batch.
            path: where EK-FAC factors are kept; beside the store, with ``.ekfac`` behind its name, unless given.
            modules, allow_idle, batch_axis: as of ``extract``.

        Raises:
            StoreError: the store holds no curvature sample, or one of several checkpoints.
            SpecError: the model, its adapter or its modules are not those that the store was extracted with.
        """
        sample = store.curvature
        if sample is None:
            raise StoreError(f"'{store.path}' holds no curvature sample: extract with curvature=2000")
        at_one_checkpoint(store)
        same_parameters(store, model, modules)
        draws = store.curvature_draws
        chosen = np.linspace(0, len(sample) - 1, min(rows or len(sample), len(sample))).round().astype(int).tolist()
        made = cls(
            model,
            (),
            loss_fn,
            sample[chosen],
            modules=modules,
            examples=len(store),
            path=f"{store.path}.ekfac" if path is None else path,
            allow_idle=allow_idle,
            batch_axis=batch_axis,
        )
        made._spec, made._sample = store.spec, _digest(sample)
        same_weights(store, made._belongs)

        def drawn(some: Sequence[int]) -> Mapping[str, Any]:
            picked = [draws[row] for row in some]
            seeds = [seed_of(store.spec.seed, name, draw) for name, draw in picked]
            found: Mapping[str, Any] = loss_fn.sampled_batch(model, fetch([name for name, _ in picked]), seeds)
            return found

        with evaluating(model):
            made.batches = [drawn(chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
        return made

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def rows(self) -> Tensor:
        """Sketched rows of the sample, on the CPU."""
        if self._given is not None:
            return self._given.detach().cpu()
        capture = Capture(self.model, SketchSpec(), self.modules, allow_idle=self._allow_idle)
        with evaluating(self.model):
            found = [
                capture(batch, self.loss_fn, batch.get("segments"), self._batch_axis).values.cpu()
                for batch in self.batches
            ]
        if not found:
            raise ShapeError("the curvature sample holds no example: give batches with drawn labels")
        return torch.cat(found)

    def choose_k(self, store: FeatureStore, losses: Tensor, tokens: Tensor | None = None) -> Evidence:
        """Set ``k`` by evidence: examples that the model has not been trained on say how much damping there must be.

        Args:
            store: the training set's rows and losses.
            losses: of unseen examples of the same kind, (m,), by the same loss; a hundred are enough.
            tokens: that each of these sums over, (m,), where the store knows its own: losses are then compared per
                token, so that longer examples are not taken for harder ones.

        Returns:
            k with what was observed and predicted; see ``evidence``.

        Raises:
            StoreError: the store holds rows of several checkpoints.
            SpecError: it holds gradients after Adam, of other parameters or of another sketch than the sample's rows.
        """
        at_one_checkpoint(store)
        of_plain_gradients(store)
        same_parameters(store, self.model, self.modules)
        same_sketch(store, self.rows, self._spec)
        seen, unseen = float(store.loss.mean()), float(losses.double().mean())
        known = summed_tokens(store)
        if tokens is not None and known is not None and int(tokens.sum()):
            unseen = float(losses.double().sum()) / int(tokens.sum()) * float(known.mean())
        stride = max(1, len(store) // _WEIGHED)
        blocks = (block[(-first) % stride :: stride] for first, block in store.blocks())
        found = choose(self.fisher(1.0), blocks, len(store), unseen - seen)
        logger.info("damping: %s", found)
        self.k = found.k
        return found

    def correct(
        self,
        v: Vector,
        method: str = "fisher",
        *,
        k: float | None = None,
        steps: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: Callable[[], None] | None = None,
    ) -> Corrected:
        """``(F + lambda I)^-1 v``; arguments, result and errors as of ``precondition``."""
        if isinstance(v, Corrected) and v.method != "none":
            raise SpecError(f"the query was corrected by {v.method!r} already: give its gradient")
        correction = _correction(method)()
        products = self.products()
        flat = products.flat.flatten(v)
        k = self.k if k is None else k
        damping = self.fisher(k).damping if method != "none" else 0.0
        kept_at = None if checkpoint is None else Checkpoint(checkpoint, self._key(method, flat, damping))
        self._advance = progress
        try:
            most = correction.steps if steps is None else steps
            answer, residuals = correction.solve(self, flat, damping, most, kept_at)
        finally:
            self._advance = None
        found = Corrected(products.flat.split(answer), method, k, damping, residuals)
        logger.info("%r", found)
        return found

    def fit(self) -> EkFac:
        """EK-FAC factors: those in memory, else those on disk, else fitted in two passes and kept.

        Those on disk that were fitted to fewer examples than this sample has are fitted again.

        Raises:
            StoreError: those on disk belong to another model, adapter, loss or sample.
            ShapeError: the batches hold another number of examples than there are rows.
        """
        if self._factors is None and self._path is not None:
            self._factors = kept.load(self._path, self._belongs)
            if self._factors is not None and self._factors.examples < len(self):
                logger.info("EK-FAC factors of %d examples are replaced by those of more", self._factors.examples)
                self._factors = None
        if self._factors is None:
            logger.info("fitting EK-FAC factors: two passes over %d examples", len(self))
            fitted = fit(
                self.model,
                self._counted(),
                self.loss_fn,
                self.modules,
                allow_idle=self._allow_idle,
                batch_axis=self._batch_axis,
            )
            self.expect(fitted.examples)
            if self._path is not None:
                kept.save(fitted, self._path, self._belongs)
            self._factors = fitted
        return self._factors

    def cost(self, method: str, steps: int | None = None, queries: int = 1) -> Cost:
        """What correcting some queries takes at most, by trying each kind of pass on the first batch."""
        total, count = self._passes(method, steps, queries), sum(1 for _ in self.batches)
        first = list(islice(self.batches, 1))
        products = Products(self.model, first, self.loss_fn, self.modules, self._derivatives)
        u = torch.full((products.flat.size,), products.flat.size**-0.5, dtype=torch.float64)
        kinds: dict[str, Callable[[], Any]] = {
            "counted": products.count,
            "along": lambda: products.times(u),
            "back": lambda: products.combine(torch.ones(1 << 16, dtype=torch.float64)),
            "curved": lambda: products.gauss_newton(u),
            "fitted": lambda: products.combine(torch.ones(1 << 16, dtype=torch.float64)),
        }
        seconds = sum(n * _seconds(kinds[kind]) for kind, n in total._asdict().items() if n) * count
        return Cost(total.total, total.total * count, seconds)

    def uses(self, method: str, steps: int | None = None, queries: int = 1) -> int:
        """How often ``progress`` is called at most: batches in all passes."""
        return self._passes(method, steps, queries).total * sum(1 for _ in self.batches)

    def _passes(self, method: str, steps: int | None, queries: int) -> Passes:
        correction = _correction(method)()
        fitted = self._factors is not None or (self._path is not None and Path(self._path).exists())
        each = correction.passes(fitted, correction.steps if steps is None else steps)
        counted, along, back, curved, fits = each
        return Passes(queries * counted, queries * along, queries * back, queries * curved, fits)

    def products(self) -> Products:
        """Products with the sample's gradients and its Gauss-Newton matrix."""
        return Products(self.model, self._counted(), self.loss_fn, self.modules, self._derivatives)

    def expect(self, examples: int) -> None:
        """Refuse batches of another number of examples than there are rows."""
        if examples != len(self):
            raise ShapeError(
                f"the batches hold {examples} examples but there are {len(self)} sketched rows: give the same sample"
            )

    def fisher(self, k: float) -> Fisher:
        """The Fisher of the sketched rows, which also says what lambda is."""
        return Fisher(self.rows, k, self.examples)

    def sketched(self, damping: float) -> Fisher:
        """The same at a lambda, decomposed once for all queries."""
        if self._fisher is None or self._fisher.damping != damping:
            self._fisher = self.fisher(1.0)
            self._fisher.damping = damping
        return self._fisher

    def by_factors(self, v: Tensor, damping: float) -> Tensor:
        """``(F + damping I)^-1 v`` by EK-FAC, for a flat v."""
        flat = self.products().flat
        return flat.join(self.fit().solve(flat.split(v), damping))

    def _counted(self) -> Counted:
        return Counted(self.batches, self._advance)

    @cached_property
    def _sample(self) -> str:
        """What data the factors are fitted to; ``of`` sets that of a whole store's, of which it may take a part."""
        return _digest(self.rows)

    @cached_property
    def _belongs(self) -> dict[str, str]:
        captured = self.products().parameters
        return {
            "adapter": adapter_fingerprint(captured),
            "model": model_fingerprint(self.model, list(captured.values())),
            "loss": loss_kind(self.loss_fn),
            "sample": self._sample,
        }

    def _key(self, method: str, flat: Tensor, damping: float) -> str:
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((method, damping, len(self), *self._belongs.items())).encode())
        digest.update(flat.numpy().tobytes())
        digest.update(_digest(self.rows).encode())
        return digest.hexdigest()


def _digest(rows: Tensor) -> str:
    return hashlib.blake2b(rows.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _correction(method: str) -> Any:
    if method not in CORRECTIONS:
        raise SpecError(f"method is {method!r}, expected {', '.join(map(repr, CORRECTIONS))}")
    return CORRECTIONS[method]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.1f} minutes"
