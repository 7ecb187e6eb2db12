"""What retrainings gave, kept on disk: a killed evaluation goes on where it was, and several share the work."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gradsift.kernels.errors import DataError

__all__ = ["Outcomes", "Run"]

Run = tuple[tuple[int, ...], int]
"""The examples that are trained on, ascending, and a seed."""


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

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that are not on disk, each once."""
        return [run for run in dict.fromkeys(runs) if not self.path(run).exists()]

    def get(self, runs: Sequence[Run], report: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
        """Losses after each run, float64 (runs, q); what is missing is computed and kept.

        Args:
            report: called with runs done and runs in all, those on disk included.
        """
        missing = self.missing(runs)
        total = len(dict.fromkeys(runs))
        order = np.random.default_rng(os.getpid()).permutation(len(missing))
        report(total - len(missing), total)
        for done, place in enumerate(order.tolist()):
            rows, seed = run = missing[place]
            if not self.path(run).exists():  # another process may have been here
                self._write(self.path(run), self._checked(self._compute(rows, seed), seed))
            report(total - len(missing) + done + 1, total)
        return np.stack([np.load(self.path(run)) for run in runs])

    @staticmethod
    def _checked(losses: np.ndarray, seed: int) -> np.ndarray:
        losses = np.asarray(losses, dtype=np.float64)
        if losses.ndim != 1 or not len(losses) or not np.isfinite(losses).all():
            raise DataError(
                f"a retraining with seed {seed} gave losses of shape {losses.shape}, or some that are not finite: "
                "expected one finite loss per query"
            )
        return losses

    def _write(self, path: Path, losses: np.ndarray) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
            np.save(file, losses)
        Path(file.name).replace(path)
