"""Checks of the rows: against autograd, in sum, alone against in a batch, twice, and from one example to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradsift.engine.capture.capture import Capture
from gradsift.engine.capture.layout import owners_of
from gradsift.engine.capture.names import unwrap_parallel
from gradsift.engine.check.batches import segments_of
from gradsift.engine.check.case import Case
from gradsift.engine.check.parts import relative, repeatable, trainable
from gradsift.engine.check.report import Result
from gradsift.engine.extraction.batches import tokens_in
from gradsift.kernels.errors import CaptureError

__all__ = ["batch", "conservation", "energy", "features", "idle_cause", "isolation", "mode"]

PerKind = dict[str, float]


def mode(case: Case) -> Result:
    """Whether two captures of the same batch agree."""
    with repeatable(case.model):
        first = case.together.values
    with repeatable(case.model, seed=1):
        second = case.parts(case.batch).values
    difference = float(relative(second, first).max())
    limit = 2e-2 if case.low_precision else 1e-4
    state = "training mode" if case.model.training else "evaluation mode"
    if difference <= limit:
        return Result("mode", "ok", f"two captures of the same batch agree ({state})", difference, limit)
    dropouts = [
        module.p
        for module in case.model.modules()
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0
    ]
    if dropouts:
        cause = f"dropout is active in {len(dropouts)} modules (p = {max(dropouts):g}): call model.eval()"
    elif case.model.training:
        cause = "the model is in training mode and draws random numbers: call model.eval()"
    else:
        cause = "its forward is random although it is in evaluation mode: fix its seed in every call"
    return Result(
        "mode", "fail", f"two captures of the same batch differ by {difference:.0%}: {cause}", difference, limit
    )


def features(case: Case) -> tuple[Result, PerKind]:
    """Rows of one example at a time against plain autograd."""
    with repeatable(case.model):
        got = case.alone
    with repeatable(case.model):
        expected = case.oracle
    errors = {name: float(relative(rows, expected[name]).max()) for name, rows in got.items()}
    limit = 2e-2 if case.low_precision else 1e-5
    worst = max(errors, key=lambda name: errors[name])
    where = f"largest relative error {errors[worst]:.1e}, at {worst}"
    if not errors[worst] <= limit:
        bad = sum(not error <= limit for error in errors.values())
        text = (
            f"rows differ from autograd in {bad} of {len(errors)} parameters ({where}): the weight is used in a way "
            "that its module does not show, such as a call around it; leave that map out of modules=[...]"
        )
        return Result("features", "fail", text, errors[worst], limit), case.kinds(errors)
    text = f"rows are autograd's gradients, one example at a time ({where})"
    return Result("features", "ok", text, errors[worst], limit), case.kinds(errors)


def conservation(case: Case) -> tuple[Result, PerKind]:
    """Rows of a batch, and of a tap, against the gradient of its summed loss."""
    with repeatable(case.model):
        rows = case.together.rows
    with repeatable(case.model):
        total = case.autograd(case.batch)
    errors = {}
    for name, parts in rows.items():
        scale = max(float(parts.double().square().sum().sqrt()), float(total[name].norm()))
        errors[name] = float((parts.double().sum(0) - total[name]).norm()) / scale if scale else 0.0
    limit = 2e-2 if case.low_precision else 1e-5
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= limit:
        text = (
            f"rows do not add up to the gradient of the batch's loss ({errors[worst]:.1e} apart at {worst}): the "
            "weight is used in a way that its module does not show"
        )
        return Result("conservation", "fail", text, errors[worst], limit), case.kinds(errors)
    tapped = _tapped(case)
    if isinstance(tapped, str):
        return Result("conservation", "fail", tapped), case.kinds(errors)
    text = f"rows add up to the gradient of the batch's loss, in a capture and under a tap ({tapped:.0e} apart)"
    return Result("conservation", "ok", text, max(errors[worst], tapped), limit), case.kinds(errors)


def batch(case: Case) -> tuple[Result, PerKind]:
    """Rows of the same examples alone and in one batch."""
    with repeatable(case.model):
        alone = case.alone
    with repeatable(case.model):
        together = case.together.rows
    errors = {name: float(relative(together[name], rows).max()) for name, rows in alone.items() if name in together}
    worst = max(errors, key=lambda name: errors[name])
    a, b = (torch.cat([rows[name].double() for name in errors], 1) for rows in (alone, together))
    # In low precision single maps may be mostly rounding; the whole row must not be.
    low = case.low_precision
    limit, measured = (5e-2, float(relative(b, a).max())) if low else (1e-4, errors[worst])
    if measured <= limit:
        where = f"{measured:.0e} apart" + ("" if low else f" at {worst}")
        text = f"an example has the same row alone and among {_lengths(case)} ({where})"
        return Result("batch", "ok", text, measured, limit), case.kinds(errors)
    ratio = (a * b).sum(1) / a.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    if bool((relative(b, a * ratio[:, None]) < limit).all()):
        cause = (
            f"in the batch it is {_range(ratio)} times as long: the loss is "
            "divided by something of the whole batch, such as its examples or its tokens; return a sum per example"
        )
    elif segments_of(case.batch) is not None:
        cause = "packed examples see each other: restart position_ids in every example and set use_cache=False, or pad"
    else:
        cause = (
            "what else is in the batch changes it: look at attention_mask and position_ids under padding, experts "
            "with a capacity, and layers with batch statistics"
        )
    text = (
        f"the row of an example alone and among {len(case.singles)} differ by {measured:.1e} (most at {worst}): {cause}"
    )
    return Result("batch", "fail", text, measured, limit), case.kinds(errors)


def isolation(case: Case) -> Result:
    """Whether one example's loss reaches another's rows."""
    if len(case.singles) < 2:
        return Result("isolation", "skip", "the batch holds one example: nothing can leak")
    try:
        with repeatable(case.model):
            loss = case.together.loss
        with repeatable(case.model):
            case.capture.isolate(case.batch, case.loss_fn, loss, segments_of(case.batch), case.batch_axis)
    except CaptureError as error:
        return Result("isolation", "fail", str(error))
    packed = " (packed)" if segments_of(case.batch) is not None else ""
    return Result("isolation", "ok", f"the loss of one example reaches its own tokens only{packed}")


def idle_cause(case: Case) -> str:
    """Why maps gave no gradient, in the words of a capture."""
    capture = Capture(case.model, case.spec, case.modules, case.backend, case.allow_idle)
    try:
        capture(case.batch, case.loss_fn, segments_of(case.batch), case.batch_axis)
    except CaptureError as error:
        return str(error)
    return "maps gave no gradient for one example at a time, but did in a batch"


def energy(case: Case) -> PerKind:
    """Share of the squared gradient norm in each kind of map, mean over the examples; empty when rows are missing."""
    if not case.ready("together"):
        return {}
    squares = case.together.squares
    total = torch.stack(list(squares.values())).sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    return case.kinds({name: float((square / total).mean()) for name, square in squares.items()}, sum)


def _range(values: Tensor) -> str:
    low, high = f"{float(values.min()):.3g}", f"{float(values.max()):.3g}"
    return low if low == high else f"{low} to {high}"


def _lengths(case: Case) -> str:
    """How many examples, and of how many tokens where that is known."""
    tokens = [tokens_in(single) for single in case.singles if isinstance(single, Mapping)]
    if not any(tokens):
        return str(len(case.singles))
    if min(tokens) == max(tokens):
        return f"{len(tokens)} of the same length, so no padding was tried"
    return f"{len(tokens)} of {min(tokens)} to {max(tokens)} tokens"


def _tapped(case: Case) -> float | str:
    """Conservation as a tap measures it on a backward pass of the whole batch; the complaint where it does not hold."""
    capture = Capture(case.model, case.spec, case.modules, case.backend, ("*",))
    capture.probed = True  # leaks are another check's business
    parameters: list[torch.nn.Parameter] = [p for found in case.maps for p in found.parameters.values()]
    model = unwrap_parallel(case.model)
    try:
        with (
            repeatable(case.model),
            trainable(case.model, parameters),
            torch.enable_grad(),
            capture.tap(segments_of(case.batch), case.batch_axis, owners=owners_of(case.loss_fn, case.batch)) as tap,
        ):
            loss: Tensor = case.loss_fn(model, case.batch).sum()
            loss.backward()  # type: ignore[no-untyped-call]
    except CaptureError as error:
        return str(error)
    return tap.conservation or 0.0
