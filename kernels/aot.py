"""Ahead-of-time compilation of every kernel variant for real GPUs, on a machine without one.

The interpreter shows that the numbers are right; this shows what the compilers made of the kernels: registers, shared
memory, spills, matrix instructions. Needs only the triton wheel (it carries ptxas, cuobjdump and the AMD back end).
"""

# mypy: disallow-untyped-calls=False

import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradsift.kernels import outer_triton
from gradsift.kernels.errors import BackendError

__all__ = ["LIMITS", "TARGETS", "Compiled", "Variant", "compile_variant", "variants"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Shared memory of one program, in bytes."""

_MATRIX = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma\b",
    "mfma": r"\bv_mfma_",
}

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Variant(NamedTuple):
    """One specialisation that a launch can ask for."""

    kernel: str
    dtypes: str
    alignment: str
    block_r: int
    needs_matrix: bool
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: frozenset[str]
    num_warps: int
    num_stages: int


class Compiled(NamedTuple):
    """One row of the table; memory in bytes. `matrix` names the instructions and how many there are."""

    target: str
    kernel: str
    dtypes: str
    alignment: str
    block_r: int
    registers: int
    shared: int
    spills: int
    matrix: str
    problem: str


def variants() -> Iterator[Variant]:
    """Every specialisation of dtype, rank tile, alignment, mode, and with or without Adam's moments.

    Alignment "16" lets the compiler assume multiples of 16 for the long operand's address, strides and width; the
    thin one's (LoRA of rank 4 or 8) never: assuming it too changes no figure. "odd" assumes nothing: odd widths,
    and operands whose last stride is not 1. "1" has every size and stride 1, which Triton makes constants.
    """
    pairs = [(t, t) for t in _TYPES] + [(torch.bfloat16, torch.float32)]
    for dtypes in pairs:
        for block_r in (16, 32, 64):
            for alignment in ("16", "odd"):
                for atomic, adam in product((False, True), (False, True)):
                    yield _tile_variant(dtypes, block_r, alignment, atomic, adam)
    for alignment in ("16", "odd", "1"):
        yield _gather_variant(alignment)
    for atomic, adam in product((False, True), (False, True)):
        yield _tile_variant(pairs[0], 16, "1", atomic, adam)


def _tile_variant(
    dtypes: tuple[torch.dtype, torch.dtype], block_r: int, alignment: str, atomic: bool, adam: bool
) -> Variant:
    tile = outer_triton.tile_for(block_r, dtypes, alignment == "16")
    constants: dict[str, Any] = {
        "ATOMIC": atomic,
        "HAS_NORM": True,
        "HAS_ADAM": adam,
        "BLOCK_T": tile.block_t,
        "BLOCK_L": tile.block_l,
        "BLOCK_R": tile.block_r,
    }
    types = {
        "long_ptr": f"*{_TYPES[dtypes[0]]}",
        "thin_ptr": f"*{_TYPES[dtypes[1]]}",
        "bounds_ptr": "*i64",
        "keys_ptr": "*i32",
        "out_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "first_ptr": "*fp32",
        "second_ptr": "*fp32",
        **dict.fromkeys(("a_adam", "b_adam", "eps_adam"), "fp32"),
    }
    multiples = {"keys_ptr", "out_ptr", "stride_on"}
    if alignment == "16":
        constants["stride_lc"] = constants["stride_tc"] = 1
        multiples |= {"long_ptr", "long", "stride_ln", "stride_lt", "first_ptr", "second_ptr"}
    if alignment == "1":
        constants |= _ones(outer_triton._tile_kernel, types)
        multiples = set()
    return Variant(
        kernel="tile" + "-atomic" * atomic + "-adam" * adam,
        dtypes=" x ".join(dict.fromkeys(_TYPES[t] for t in dtypes)),
        alignment=alignment,
        block_r=block_r,
        needs_matrix=dtypes[0] == dtypes[1] != torch.float32,
        function=outer_triton._tile_kernel,
        types=types,
        constants=constants,
        multiples=frozenset(multiples),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _gather_variant(alignment: str) -> Variant:
    gather = outer_triton.GATHER
    types = {
        "scratch_ptr": "*fp32",
        "order_ptr": "*i32",
        "starts_ptr": "*i32",
        "keys_ptr": "*i32",
        "out_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "sqnorm_ptr": "*fp32",
    }
    multiples = {"scratch_ptr", "order_ptr", "keys_ptr", "partial_ptr", "stride_sn", "stride_on"}
    if alignment == "16":
        multiples |= {"starts_ptr", "out_ptr", "sqnorm_ptr", "blocks", "first_index", "partials"}
    constants: dict[str, Any] = {"HAS_NORM": True, "BLOCK_J": gather.block_j, "BLOCK_P": gather.block_p}
    if alignment == "1":
        constants |= _ones(outer_triton._gather_kernel, types)
        multiples = set()
    return Variant(
        kernel="gather",
        dtypes="fp32",
        alignment=alignment,
        block_r=0,
        needs_matrix=False,
        function=outer_triton._gather_kernel,
        types=types,
        constants=constants,
        multiples=frozenset(multiples),
        num_warps=gather.num_warps,
        num_stages=1,
    )


def _ones(function: Any, types: dict[str, str]) -> dict[str, int]:
    """Every size and stride as the constant 1; the constants proper are added by the caller."""
    return {name: 1 for name in function.arg_names if name not in types and not name.isupper()}


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile one variant for one of TARGETS and read the resources that it takes.

    Raises:
        BackendError: the module was imported under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    if outer_triton.INTERPRETED:
        raise BackendError("TRITON_INTERPRET is set, expected it unset: there is nothing to compile")
    signature = {}
    attributes = {}
    for i, name in enumerate(variant.function.arg_names):
        signature[name] = "constexpr" if name in variant.constants else variant.types.get(name, "i32")
        if name in variant.multiples:
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(variant.function, signature, constexprs=variant.constants, attrs=attributes),
        target=TARGETS[target],
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": True,
        },
    )
    if "cubin" in compiled.asm:
        registers, spills = _nvidia_resources(compiled.asm["cubin"])
    else:
        registers, spills = _amd_resources(compiled.asm["amdgcn"])
    text = compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _MATRIX.items()}
    matrix = " ".join(f"{name}:{count}" for name, count in counts.items() if count)
    shared = int(compiled.metadata.shared)
    problem = ""
    if spills:
        problem = "spills"
    elif shared > LIMITS[target]:
        problem = "shared memory"
    elif variant.needs_matrix and not matrix:
        problem = "no matrix instructions"
    return Compiled(
        target,
        variant.kernel,
        variant.dtypes,
        variant.alignment,
        variant.block_r,
        registers,
        shared,
        spills,
        matrix,
        problem,
    )


def _nvidia_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread; bytes of its stack and local memory, which only spills would use here."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_resources(text: str) -> tuple[int, int]:
    """Vector registers of a lane; spilled registers and bytes of private memory."""
    field = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)", text)}
    registers = field["vgpr_count"] + field.get("agpr_count", 0)
    return registers, field["vgpr_spill_count"] + field["sgpr_spill_count"] + field["private_segment_fixed_size"]
