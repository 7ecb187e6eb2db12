"""What retrainings gave, kept on disk: a killed evaluation goes on where it was, and several share the work."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from gradsift.kernels.errors import DataError

__all__ = ["Outcomes", "Run"]

Run = tuple[tuple[int, ...], int]
"""The examples that are trained on, ascending, and a seed."""

_WANTED = "wanted.json"
_LOOK = 0.5
"""Seconds between looks for work."""


class Outcomes:
    """Losses of the queries after retrainings, each in a file of its own.

    Args:
        folder: where files are; made when needed. Several processes may use one at a time: a file appears whole or not
            at all, and each process takes what is missing in an order of its own.
        key: what else the losses depend on, such as the data, the queries and the training; anything that changes
            them must change it.
        compute: ``compute(rows, seed) -> (q,)``, trains and measures.
    """

    def __init__(self, folder: Path, key: str, compute: Callable[[Sequence[int], int], np.ndarray]) -> None:
        self.folder = folder
        self._key = key
        self._compute = compute

    def path(self, run: Run) -> Path:
        """Where the outcome of a run is kept."""
        text = json.dumps([self._key, list(run[0]), run[1]])
        return self.folder / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.npy"

    def want(self, runs: Sequence[Run]) -> None:
        """Say which runs will be asked for, so that others can begin with them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._whole(self.folder / _WANTED, lambda file: file.write(json.dumps(runs).encode()))

    def lend(self, go_on: Callable[[], bool]) -> None:
        """Work on whatever another process says it will ask for, as long as ``go_on()``."""
        while go_on():
            missing: list[Run] = []
            if (self.folder / _WANTED).exists():
                wanted = json.loads((self.folder / _WANTED).read_text())
                missing = self.missing([(tuple(rows), seed) for rows, seed in wanted])
            if missing:
                self._take(missing[int(np.random.default_rng().integers(len(missing)))])
            else:
                time.sleep(_LOOK)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not on disk, each once."""
        return [run for run in dict.fromkeys(runs) if not self.path(run).exists()]

    def get(
        self,
        runs: Sequence[Run],
        report: Callable[[int, int], None] = lambda done, total: None,
        queries: int | None = None,
    ) -> np.ndarray:
        """Losses after each run, float64 (runs, q); what is missing is computed and kept.

        Args:
            report: called with runs done and runs in all, those on disk included.
            queries: q, where it is known.

        Raises:
            DataError: a run gave another number of losses, or one that is not finite.
        """
        missing = self.missing(runs)
        total = len(dict.fromkeys(runs))
        order = np.random.default_rng().permutation(len(missing))  # processes in containers may share their numbers
        report(total - len(missing), total)
        if missing:
            self.want(runs)
        for done, place in enumerate(order.tolist()):
            self._take(missing[place], queries)
            report(total - len(missing) + done + 1, total)
        return np.stack([np.load(self.path(run)) for run in runs])

    def _take(self, run: Run, queries: int | None = None) -> None:
        """Compute a run, unless another process has been here."""
        if not self.path(run).exists():
            losses = self._checked(self._compute(*run), run[1], queries)
            self._whole(self.path(run), lambda file: np.save(file, losses))

    @staticmethod
    def _checked(losses: np.ndarray, seed: int, queries: int | None) -> np.ndarray:
        losses = np.asarray(losses, dtype=np.float64)
        expected = losses.size if queries is None else queries
        if losses.shape != (expected,) or not expected or not np.isfinite(losses).all():
            many = "" if queries is None else f", and there are {queries}"
            raise DataError(
                f"a retraining with seed {seed} gave losses of shape {losses.shape}, or some that are not finite: "
                f"expected one finite loss per query{many}"
            )
        return losses

    def _whole(self, path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        """Write a file that appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
            write(file)
        Path(file.name).replace(path)
