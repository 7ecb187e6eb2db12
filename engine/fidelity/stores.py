"""Where the stores of an evaluation lie: beside its outcomes, unless another process is at work there."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["own_folder"]


@contextmanager
def own_folder(beside: Path) -> Iterator[Path]:
    """A folder that no other process writes to.

    The first process gets the one that is kept, with what an earlier run left there; others get one that goes when they
    are through. A process that is killed gives its folder back.
    """
    beside.mkdir(parents=True, exist_ok=True)
    with (beside / "stores.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with tempfile.TemporaryDirectory(dir=beside) as folder:
                yield Path(folder)
            return
        yield beside / "stores"
