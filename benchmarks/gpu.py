"""Check every kernel on this GPU, then time it; without a GPU, the same checks, tiny, in Triton's interpreter.

    python benchmarks/gpu.py [--out FOLDER]

Checks: fp64 oracle, the same bits run to run, the same bits alone and in a batch (ragged or padded), outputs
independent of what memory held before, and captured rows of a small model against autograd. A failed check ends the
run with exit code 1 before any timing. Times are medians of CUDA events with the L2 cache flushed, beside a floor:
the bytes that must move (x, g, scratch, out) at measured copy bandwidth, or the products at the measured rate of a
large matrix product, whichever is longer.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import triton  # noqa: E402

import gradsift as gs  # noqa: E402
from gradsift.kernels.adam import AdamStep  # noqa: E402
from gradsift.kernels.outer import sketch_outer, sketch_outer_reference  # noqa: E402
from gradsift.kernels.sketch import sketch_dense  # noqa: E402

DEVICE = torch.device("cuda" if GPU else "cpu")
MODES = ("triton", "triton-atomic")
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Case(NamedTuple):
    """One map: n examples of `tokens` tokens, x of `long` and g of `thin` features."""

    n: int
    tokens: int
    long: int
    thin: int
    dtype: torch.dtype
    dim: int

    @property
    def name(self) -> str:
        return f"{DTYPES[self.dtype]} n{self.n} T{self.tokens} {self.thin}x{self.long} dim{self.dim}"


def check_cases() -> list[Case]:
    """Both alignments, every rank tile, a thin side that needs several, and more than one chunk of scratch."""
    if not GPU:
        sizes = [(3, 20, 130, 5, 128), (2, 17, 64, 33, 128), (2, 5, 80, 70, 64)]
        return [
            Case(n, t, d, r, dtype, dim)
            for i, (n, t, d, r, dim) in enumerate(sizes)
            for dtype in (DTYPES if i == 0 else [torch.float32])
        ]
    sizes = [
        (8, 512, 4096, 16, 4096),
        (8, 200, 4096, 8, 4096),
        (8, 333, 1000, 32, 1024),
        (5, 77, 4097, 64, 4096),
        (4, 1024, 2048, 1, 64),
        (160, 33, 4096, 16, 4096),
        (3, 256, 2048, 2048, 8192),
    ]
    return [Case(n, t, d, r, dtype, dim) for n, t, d, r, dim in sizes for dtype in DTYPES]


def timing_cases() -> list[Case]:
    bf16, fp32 = torch.bfloat16, torch.float32
    return [
        *(Case(8, 1024, 4096, r, bf16, 4096) for r in (8, 16, 64)),
        Case(8, 1024, 14336, 16, bf16, 4096),
        Case(64, 128, 4096, 16, bf16, 4096),
        Case(1, 8192, 4096, 16, bf16, 4096),
        Case(8, 1024, 4096, 16, bf16, 65536),
        Case(8, 1024, 4096, 16, fp32, 4096),
        Case(8, 1024, 1024, 1024, bf16, 4096),
    ]


def setup(case: Case) -> tuple[gs.SketchSpec, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = (case.n * case.tokens,)
    x = torch.randn(*size, case.long, generator=generator, device=DEVICE).to(case.dtype)
    g = torch.randn(*size, case.thin, generator=generator, device=DEVICE).to(case.dtype)
    return gs.SketchSpec(dim=case.dim, seed=1), x, g


def ragged(case: Case) -> tuple[int, ...]:
    """Unequal examples, one of them empty."""
    total = case.n * case.tokens
    cuts = sorted({total * i * i // (case.n * case.n) for i in range(1, case.n)})
    return (0, *cuts, total, total)


class Checks:
    """Collects one row per check."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, case: str, check: str, passed: bool, figure: str = "") -> None:
        self.rows.append({"case": case, "check": check, "figure": figure, "passed": passed})

    def table(self) -> Table:
        table = Table(title="checks" if GPU else "interpreter: checks only, no timings")
        for column in ("case", "check", "figure", "passed"):
            table.add_column(column)
        for row in self.rows:
            table.add_row(*map(str, row.values()), style=None if row["passed"] else "red")
        return table

    @property
    def failed(self) -> bool:
        return not all(row["passed"] for row in self.rows)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that whatever a kernel leaves unwritten shows."""
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def launch(case: Case, x: Tensor, g: Tensor, segments: Any, spec: gs.SketchSpec, mode: str) -> tuple[Tensor, Tensor]:
    n = x.shape[0] if segments is None else len(segments) - 1
    norm = torch.zeros(n, device=DEVICE)
    shape = (case.thin, case.long)
    return sketch_outer(x, g, segments, spec, name="m", shape=shape, sqnorm=norm, backend=mode), norm


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def check_kernels(checks: Checks, case: Case) -> None:
    spec, x, g = setup(case)
    segments = ragged(case)
    expected, norms = sketch_outer_reference(x, g, segments, spec, "m", (case.thin, case.long))
    for mode in MODES:
        with poisoned():
            got, got_norms = launch(case, x, g, segments, spec, mode)
        for what, error in ("sketch", relative(got, expected)), ("norm", relative(got_norms, norms)):
            checks.add(case.name, f"{mode} {what} against fp64", error <= 1e-5, f"{error:.1e}")
    first = launch(case, x, g, segments, spec, "triton")
    again = all(same(first, launch(case, x, g, segments, spec, "triton")) for _ in range(5 if GPU else 1))
    checks.add(case.name, "same bits run to run", again)
    swapped, swapped_norms = launch(case._replace(thin=case.long, long=case.thin), g, x, segments, spec, "triton")
    transposed, _ = sketch_outer_reference(g, x, segments, spec, "m", (case.long, case.thin))
    error = max(relative(swapped, transposed), relative(swapped_norms, norms))
    checks.add(case.name, "the other side thin, against fp64", error <= 1e-5, f"{error:.1e}")
    alone = True
    for i in {0, (len(segments) - 1) // 2, len(segments) - 3}:
        rows = slice(segments[i], segments[i + 1])
        one = launch(case, x[rows], g[rows], (0, rows.stop - rows.start), spec, "triton")
        alone &= same(one, (first[0][i : i + 1], first[1][i : i + 1]))
        pad = launch(case, x[rows].repeat(3, 1, 1), g[rows].repeat(3, 1, 1), None, spec, "triton")
        alone &= same((pad[0][2:], pad[1][2:]), one)
    checks.add(case.name, "same bits alone, in a batch, padded", alone)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_adam(checks: Checks, case: Case) -> None:
    """Adam's update of every gradient against fp64, both ways round, and its bits alone and in a batch."""
    spec, x, g = setup(case)
    segments, shape = ragged(case), (case.thin, case.long)
    generator = torch.Generator(DEVICE).manual_seed(1)
    first = torch.randn(shape, generator=generator, device=DEVICE)
    second = torch.rand(shape, generator=generator, device=DEVICE) + 1e-3
    adam = AdamStep(first, second, 0.1, 0.001, 1e-8)
    turned = AdamStep(first.t().contiguous(), second.t().contiguous(), adam.a, adam.b, adam.eps)
    for what, left, right, size, step in (
        ("Adam", x, g, shape, adam),
        ("Adam, the other side thin", g, x, shape[::-1], turned),
    ):
        expected, norms = sketch_outer_reference(left, right, segments, spec, "m", size, step)
        for mode in MODES:
            square = torch.zeros(len(segments) - 1, device=DEVICE)
            with poisoned():
                got = sketch_outer(
                    left, right, segments, spec, name="m", shape=size, sqnorm=square, backend=mode, adam=step
                )
            error = max(relative(got, expected), relative(square, norms))
            checks.add(case.name, f"{mode} {what} against fp64", error <= 1e-5, f"{error:.1e}")
    whole = sketch_outer(x, g, segments, spec, name="m", shape=shape, backend="triton", adam=adam)
    rows = slice(segments[1], segments[2])
    own = (0, rows.stop - rows.start)
    alone = sketch_outer(x[rows], g[rows], own, spec, name="m", shape=shape, backend="triton", adam=adam)
    checks.add(case.name, "Adam, same bits alone and in a batch", torch.equal(alone[0], whole[1]))


def check_tf32(checks: Checks) -> None:
    """fp32 stays fp32 when the user allows TF32."""
    case = check_cases()[-1]._replace(dtype=torch.float32)
    spec, x, g = setup(case)
    segments = ragged(case)
    expected, _ = sketch_outer_reference(x, g, segments, spec, "m", (case.thin, case.long))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for mode in ("torch", *MODES):
            error = relative(launch(case, x, g, segments, spec, mode)[0], expected)
            checks.add(case.name, f"{mode} with TF32 allowed", error <= 1e-5, f"{error:.1e}")
    finally:
        torch.set_float32_matmul_precision(before)


def check_capture(checks: Checks, backend: str) -> None:
    """Rows of a whole model against autograd, one example at a time."""
    torch.manual_seed(0)
    width = 256 if GPU else 24
    nn = torch.nn
    first, second, third = (nn.Linear(a, b, bias=False) for a, b in ((width, 8), (8, width), (width, 5)))
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).to(DEVICE)
    x, y = torch.randn(4, 6, width, device=DEVICE), torch.randn(4, 6, 5, device=DEVICE)

    def loss(model: Any, batch: Any) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().sum((1, 2))

    spec = gs.SketchSpec(dim=256)
    capture = gs.Capture(model, spec, modules="*", backend=backend)
    got = capture({"x": x, "y": y}, loss)
    expected = torch.zeros(4, 256, dtype=torch.float64, device=DEVICE)
    for i in range(4):
        model.zero_grad()
        loss(model, {"x": x[i : i + 1], "y": y[i : i + 1]}).sum().backward()
        parameters = dict(model.named_parameters())
        for row in capture.table:
            grad = parameters[row.name].grad.reshape(1, -1)
            sketch_dense(grad.double(), spec, row.name, row.shape, expected[i : i + 1])
    error = relative(got.values, expected)
    checks.add("three nn.Linear", f"capture ({backend}) against autograd", error <= 1e-5, f"{error:.1e}")


def seconds(call: Callable[[], Any], flush: Tensor, repeats: int = 30) -> float:
    """Median of CUDA event times; L2 is overwritten before each."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def copy_bandwidth(flush: Tensor) -> float:
    """Bytes read and written per second by a copy far larger than L2."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), flush)


def matmul_rate(dtype: torch.dtype, flush: Tensor) -> float:
    """Multiply-adds per second of a large square product."""
    a = torch.randn(8192, 8192, device=DEVICE).to(dtype)
    return a.shape[0] ** 3 / seconds(lambda: a @ a, flush, repeats=10)


def floor(case: Case, bandwidth: float, rate: float) -> float:
    """Seconds that no implementation with a scratch can beat."""
    rows = case.n * case.tokens
    operands = rows * (case.long + case.thin) * case.dtype.itemsize
    scratch = 2 * 4 * case.n * case.thin * -(-case.long // 64) * 64
    out = 2 * 4 * case.n * case.dim
    return max((operands + scratch + out) / bandwidth, rows * case.long * case.thin / rate)


def time_case(case: Case, bandwidth: float, rate: float, flush: Tensor) -> list[dict[str, Any]]:
    spec, x, g = setup(case)
    x3, g3 = x.view(case.n, case.tokens, -1), g.view(case.n, case.tokens, -1)
    out, norm = torch.zeros(case.n, case.dim, device=DEVICE), torch.zeros(case.n, device=DEVICE)

    def ours(mode: str) -> Callable[[], Any]:
        return lambda: sketch_outer(
            x3, g3, None, spec, name="m", shape=(case.thin, case.long), out=out, sqnorm=norm, backend=mode
        )

    providers = {mode: ours(mode) for mode in (*MODES, "torch")}
    providers["batch weight gradient"] = lambda: g.t() @ x
    bound = floor(case, bandwidth, rate)
    rows = []
    for provider, call in providers.items():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        time = seconds(call, flush)
        peak = torch.cuda.max_memory_allocated() - held
        rows.append(
            {
                "case": case.name,
                "provider": provider,
                "microseconds": f"{time * 1e6:.1f}",
                "floor_microseconds": f"{bound * 1e6:.1f}",
                "times_floor": f"{time / bound:.2f}",
                "peak_mib": f"{peak / 2**20:.1f}",
            }
        )
    return rows


def stamp() -> dict[str, str]:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if GPU else "interpreter"
    return {"commit": commit, "device": device, "torch": torch.__version__, "triton": triton.__version__}


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [*stamp(), *rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**stamp(), **row} for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    default = here / "results" if GPU else here.parent / "build"
    parser.add_argument("--out", type=Path, default=default, help="folder of the CSV files (default: %(default)s)")
    folder = parser.parse_args().out
    console = Console(width=120)
    checks = Checks()
    for case in check_cases():
        check_kernels(checks, case)
        check_adam(checks, case)
    check_tf32(checks)
    for backend in (*MODES, "torch"):
        check_capture(checks, backend)
    console.print(checks.table())
    device = re.sub(r"\W+", "-", stamp()["device"]).strip("-").lower()
    write(folder / f"gpu-{device}-checks.csv", checks.rows)
    if checks.failed or not GPU:
        return int(checks.failed)

    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    bandwidth = copy_bandwidth(flush)
    rates = {dtype: matmul_rate(dtype, flush) for dtype in {case.dtype for case in timing_cases()}}
    rows = [row for case in timing_cases() for row in time_case(case, bandwidth, rates[case.dtype], flush)]
    table = Table(title=f"{stamp()['device']}, copy {bandwidth / 1e9:.0f} GB/s, medians with L2 flushed")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    write(folder / f"gpu-{device}.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
