"""What is said of every published method that gradsift implements: in `gradsift methods` and in docs/methods.md."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Method"]


@dataclass(frozen=True, slots=True)
class Method:
    """One scorer, selector or correction, in words.

    Attributes:
        name: what users write, such as ``"less"``.
        formula: what is computed, in one line of plain text.
        needs: what the store must hold, such as ``"several checkpoints, Adam rows"``.
        cost: passes over the store and memory, such as ``"1 pass, O(dim^2)"``.
        source: paper and, where it is our own reading of it, that.
        published: a figure of its authors with its setting, or "none found".
    """

    name: str
    formula: str
    needs: str
    cost: str
    source: str
    published: str
