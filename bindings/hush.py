"""No progress bars and notes of the libraries that load models: what matters of them is said by this one."""

from __future__ import annotations

import logging

from gradsift.engine.extras import require

__all__ = ["hush"]


def hush(*libraries: str) -> None:
    """Silence transformers, and others that log as it does.

    Args:
        libraries: such as "diffusers"; imported after transformers, which they import and which warns.
    """
    for name in ("transformers", *libraries):
        noise = require(name).utils.logging
        noise.set_verbosity(logging.CRITICAL)
        noise.disable_progress_bar()
