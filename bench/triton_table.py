"""Compile every shipped Triton kernel for GPUs that are not here; read registers, spills and shared memory.

A variant fails where it keeps values on the stack, asks for more shared memory than the GPU has, is a matrix product
without tensor cores, or takes descriptors of tiles and does not copy by them. Results: bench/results/triton_compile.md.

    python bench/triton_table.py [--targets sm_80 sm_90 sm_100 gfx942] [--only PREFIX] [--json] [--write]
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled

import triton
from timing import table, write_result
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import moesaic.kernels.triton as shipped
from moesaic.kernels.triton.variant import Variant

KIB = 1024
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
"""Target and shared memory that one program may use, in bytes."""
MATRIX = {
    "sm_80": r"\bHMMA",
    "sm_90": r"\b(HGMMA|HMMA)",
    "sm_100": r"\b(UTCHMMA|UTCQMMA|UTC\w*MMA|HMMA)",
    "gfx942": "v_mfma",
}
"""The instructions of tensor cores."""
TMA = r"\bUTMALDG"
"""The instruction of NVIDIA GPUs from Hopper on that copies a tile."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """What became of a variant on a target."""

    name: str
    target: str
    registers: int
    stack: int
    """Bytes per thread; anything there is a spill."""
    shared: int
    """Bytes per program."""
    matrix: int
    """Instructions of tensor cores."""
    problems: tuple[str, ...]


def variants(prefix: str = "") -> list[Variant]:
    """All that the package ships, by name."""
    found = []
    for module in pkgutil.iter_modules(shipped.__path__):
        make = getattr(importlib.import_module(f"{shipped.__name__}.{module.name}"), "variants", None)
        found += make() if make else []
    return sorted((v for v in found if v.name.startswith(prefix)), key=lambda variant: variant.name)


def compile_variant(variant: Variant, target: str) -> Compiled:
    """Compile, disassemble, count."""
    gpu, limit = TARGETS[target]
    names = list(variant.kernel.arg_names)
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    wide = [
        names.index(name)
        for name, kind in signature.items()
        if kind.startswith("*") or name in variant.aligned
    ]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in wide},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    if gpu.backend == "hip":
        options["num_stages"] = min(variant.stages, 2)  # what the launcher passes there
    try:
        built = triton.compile(source, target=gpu, options=options)
    except Exception as error:
        return Compiled(variant.name, target, 0, 0, 0, 0, (f"does not compile: {str(error)[:200]}",))
    registers, stack, text = (
        inspect_amd(built.asm["amdgcn"]) if gpu.backend == "hip" else inspect_nvidia(built.asm["cubin"])
    )
    matrix = len(re.findall(MATRIX[target], text))
    problems = []
    if stack:
        problems.append(f"{stack} bytes on the stack")
    if built.metadata.shared > limit:
        problems.append(f"{built.metadata.shared} bytes of shared memory, more than {limit}")
    if variant.matrix and not matrix:
        problems.append("no tensor cores")
    if any(kind.startswith("tensordesc") for kind in signature.values()) and not re.search(TMA, text):
        problems.append("no TMA")
    return Compiled(variant.name, target, registers, stack, built.metadata.shared, matrix, tuple(problems))


def inspect_nvidia(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack and machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), code


def inspect_amd(text: str) -> tuple[int, int, str]:
    """Registers, stack and machine code."""
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    stack = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return int(registers[1]) if registers else 0, int(stack[1]) if stack else 0, text


def tool(name: str, *arguments: str) -> str:
    """The output of a tool that comes with triton."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def job(task: tuple[str, str]) -> Compiled:
    name, target = task
    return compile_variant(next(v for v in variants(name) if v.name == name), target)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    arguments.add_argument("--only", default="", help="names that begin so")
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--write", action="store_true", help="write bench/results/triton_compile.md")
    options = arguments.parse_args()
    tasks = [
        (variant.name, target)
        for variant in variants(options.only)
        for target in options.targets
        if not variant.targets or target in variant.targets
    ]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        results = list(pool.map(job, tasks))
    if options.json:
        print(json.dumps([asdict(result) for result in results]))
    else:
        header = ["kernel", "target", "registers", "stack", "shared", "tensor cores", ""]
        rows = [
            [
                r.name,
                r.target,
                str(r.registers),
                str(r.stack),
                str(r.shared),
                str(r.matrix),
                "; ".join(r.problems),
            ]
            for r in results
        ]
        print(table(header, rows))
        if options.write:
            title = "Every shipped Triton kernel, compiled ahead of time"
            note = (
                f"triton {triton.__version__}. Nothing here ran: registers per thread, stack in bytes per thread, "
                "shared memory in bytes per program, instructions of tensor cores."
            )
            write_result(
                "triton_compile",
                title,
                "python bench/triton_table.py --write",
                1,
                [note, table(header, rows)],
            )
    sys.exit(any(result.problems for result in results))


if __name__ == "__main__":
    main()
