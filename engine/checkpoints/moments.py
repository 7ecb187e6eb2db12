"""AdamMoments: an optimizer's state for the captured parameters, ready to be applied to one example's gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from gradsift.engine.extras import require
from gradsift.kernels.adam import AdamStep
from gradsift.kernels.errors import DataError

__all__ = ["FORMS", "AdamMoments"]

FORMS = ("less", "torch")

_FIRST, _SECOND = "exp_avg.", "exp_avg_sq."


@dataclass(frozen=True, slots=True, eq=False)
class AdamMoments:
    """Moments of every captured parameter, as ``adam_moments`` reads them.

    With the update after one more step, on the gradient g of a single example,

        m' = beta1 m + (1 - beta1) g        v' = beta2 v + (1 - beta2) g^2

    a row is a sketch of ``m' / sqrt(v' + eps)`` in the form "less", as its authors' code has it: eps inside the root
    and no bias correction; or of ``(m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)``, t one more than the steps
    made, in the form "torch": the step that AdamW would take, without learning rate and weight decay. With gradients
    near 1e-5 the first is nearly momentum SGD and the second is not: eps inside the root bounds it from below by 1e-4.

    Attributes:
        first, second: canonical parameter name -> m and v, float32, on the CPU unless moved.
        steps: canonical parameter name -> optimizer steps made; only the form "torch" needs them.
        beta1, beta2, eps: the optimizer's.
        form: "less" or "torch".
    """

    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    steps: Mapping[str, int]
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    form: str = "less"
    _ready: dict[str, AdamStep] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DataError(f"the form of Adam is {self.form!r}, expected 'less' or 'torch'")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise DataError(
                f"Adam has betas {self.beta1}, {self.beta2} and eps {self.eps}, expected betas in [0, 1) and eps > 0"
            )
        if self.form == "torch" and (missing := next((n for n in self.first if self.steps.get(n, 0) < 1), None)):
            raise DataError(
                f"Adam's state of {missing} does not say after how many steps it is, which the bias correction of "
                "form='torch' divides by: save the optimizer's step, or use form='less'"
            )

    @property
    def preconditioner(self) -> dict[str, Any]:
        """What a store says of it."""
        return {"kind": "adam", "form": self.form, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}

    @property
    def fingerprint(self) -> str:
        """Hash of names and moments, every byte of them, and of the steps where they count."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.first:
            digest.update(f"{name} {self.steps.get(name) if self.form == 'torch' else ''};".encode())
            for moment in (self.first[name], self.second[name]):
                digest.update(moment.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def step(self, name: str) -> AdamStep:
        """The update of one parameter.

        Raises:
            DataError: there are no moments for it.
        """
        if name not in self._ready:
            if name not in self.first:
                raise DataError(
                    f"there are no Adam moments for {name}: read them for this model and these modules "
                    "(gradsift.adam_moments)"
                )
            self._ready[name] = self._made(name)
        return self._ready[name]

    def _made(self, name: str) -> AdamStep:
        c1 = c2 = 1.0
        inside, outside = self.eps, 0.0
        if self.form == "torch":
            t = self.steps[name] + 1
            c1, c2 = 1 / (1 - self.beta1**t), 1 / (1 - self.beta2**t)
            inside, outside = 0.0, self.eps
        # float64 until the constant is in: 1e-8 beside moments of 1e-12
        first = (self.first[name].double() * (c1 * self.beta1)).float()
        second = (self.second[name].double() * (c2 * self.beta2) + inside).float()
        return AdamStep(first, second, c1 * (1 - self.beta1), c2 * (1 - self.beta2), outside)

    def to(self, device: torch.device | str) -> AdamMoments:
        """The same moments on a device, so that no batch has to move them."""
        first, second = ({n: t.to(device) for n, t in moments.items()} for moments in (self.first, self.second))
        return replace(self, first=first, second=second, _ready={})

    def save(self, path: str | PathLike[str]) -> None:
        """Write a .safetensors file that ``adam_moments`` reads: ``exp_avg.NAME`` and ``exp_avg_sq.NAME`` of every
        parameter, and ``beta1``, ``beta2``, ``eps`` and, if known, ``step`` in its metadata."""
        tensors = {_FIRST + n: t.detach().cpu().contiguous() for n, t in self.first.items()}
        tensors |= {_SECOND + n: t.detach().cpu().contiguous() for n, t in self.second.items()}
        numbers = {"beta1": repr(self.beta1), "beta2": repr(self.beta2), "eps": repr(self.eps)}
        if len(made := set(self.steps.values())) == 1:
            numbers["step"] = str(made.pop())
        require("safetensors.torch").save_file(tensors, str(path), metadata=numbers)

    @classmethod
    def load(cls, path: Path, form: str) -> Self:
        """What ``save`` wrote, or anybody else in that form; canonical names.

        Raises:
            DataError: the file does not hold pairs of moments with their betas.
        """
        library = require("safetensors")
        try:
            with library.safe_open(str(path), framework="pt", device="cpu") as file:
                numbers = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, library.SafetensorError) as error:
            raise DataError(f"'{path}' cannot be read as safetensors ({error}): save the moments again") from None
        first = {n.removeprefix(_FIRST): t.float() for n, t in tensors.items() if n.startswith(_FIRST)}
        second = {n.removeprefix(_SECOND): t.float() for n, t in tensors.items() if n.startswith(_SECOND)}
        if not first or first.keys() != second.keys() or len(tensors) != 2 * len(first):
            raise DataError(f"'{path}' holds no pairs of tensors named exp_avg.NAME and exp_avg_sq.NAME: write both")
        if absent := [key for key in ("beta1", "beta2", "eps") if key not in numbers]:
            raise DataError(f"'{path}' has no {absent[0]} in its metadata: write beta1, beta2 and eps of the optimizer")
        made = dict.fromkeys(first, int(numbers["step"])) if "step" in numbers else {}
        betas = float(numbers["beta1"]), float(numbers["beta2"])
        return cls(first, second, made, *betas, float(numbers["eps"]), form)
