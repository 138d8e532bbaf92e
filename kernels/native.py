"""The C++ kernels of the CPU: compiled for this processor at first use, kept in the cache, called by name.

They know no autograd: each op's file says when it takes them and what it does without. A machine without a compiler
runs the plain torch code, and `status()` says why.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from moesaic.kernels.cache import cache_folder

SOURCES = Path(__file__).with_name("cpp")
SUFFIX = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}
SERVED = (torch.float32, torch.float64, torch.int64)
BLOCK = 64
"""Rows of one partial sum; common.h has the same number."""
COMPILE = "-x c++ -std=c++17 -O3 -march=native -fPIC -fopenmp -fno-math-errno -fno-trapping-math"

_simulating = False


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why."""


def serves(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these: plain CPU tensors of one type, fp32 or float64, or int64 for ops on integers;
    None counts as absent.

    Tensors of other classes (fake, distributed) and traced code are served by torch.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0].dtype in SERVED and _plain(given)


def serves_bf16(*tensors: Tensor) -> bool:
    """Whether bf16 tensors are better served by kernels that compute in fp32 than by torch.

    So it is where the processor has no arithmetic in bf16: torch then emulates it, at a fraction of fp32's speed. Where
    it has some, torch's products are taken; which is faster there has not been measured.
    """
    return tensors[0].dtype == torch.bfloat16 and _plain(list(tensors)) and not _computes_bf16()


def _plain(given: list[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    classes = (Tensor, nn.Parameter, FakeTensor) if _simulating else (Tensor, nn.Parameter)
    dtype = given[0].dtype
    plain = all(type(t) in classes and t.device.type == "cpu" and t.dtype == dtype for t in given)
    return plain and _library() is not None


@cache
def _computes_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})  # the last is ARM's


@contextmanager
def simulated() -> Iterator[None]:
    """Within it, fake tensors are served as plain ones would be, and nothing is computed: to see what would be kept."""
    global _simulating
    before, _simulating = _simulating, True
    try:
        yield
    finally:
        _simulating = before


Argument = Tensor | int | float | ctypes.c_void_p | ctypes.Array[ctypes.c_void_p] | None


def run(name: str, dtype: torch.dtype, *args: Argument) -> int:
    """Call a kernel on torch's threads. Tensors must be contiguous.

    Returns what the kernel returns, of which only kernels that check their input make use; 0 where nothing is computed.
    """
    if _simulating:
        return 0
    library = _library()
    assert library is not None, "serves() was not asked"
    function = getattr(
        library, f"{name}_{SUFFIX[dtype]}"
    )  # kept by the library, where [] would look it up again
    return function(*[_pass(value) for value in args], ctypes.c_int64(torch.get_num_threads()))


@cache
def gemm(dtype: torch.dtype) -> ctypes.c_void_p | None:
    """The matrix product of torch's BLAS, for kernels that call it themselves; None where it cannot be found."""
    return _symbol({torch.float32: "sgemm_", torch.float64: "dgemm_"}[dtype])


@cache
def gemm_threads() -> ctypes.c_void_p | None:
    """MKL's function that limits the threads of its products to a number, for one calling thread; None without MKL."""
    return _symbol("MKL_Set_Num_Threads_Local")


def _symbol(name: str) -> ctypes.c_void_p | None:
    folder = Path(torch.__file__).with_name("lib")
    for path in (*folder.glob("libtorch_cpu.so"), *folder.glob("libtorch_cpu.dylib")):
        function = getattr(ctypes.CDLL(str(path)), name, None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return None


def blocks(rows: int) -> int:
    """How many partial sums there are for so many rows."""
    return -(-rows // BLOCK)


def status() -> str:
    """What the CPU's kernels are, for people: how they were built, or why they are not there."""
    built = _built()
    return f"torch ({built})" if isinstance(built, str) else "C++, compiled for this processor"


def build() -> Path:
    """Compile the kernels where the cache has none for this processor and compiler. Raises BuildError."""
    compiler = _compiler()
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())}
    identity = (sources, COMPILE, compiler, compiler.stat().st_mtime_ns, _processor())
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = cache_folder() / "kernels"
    target = folder / f"cpu-{digest}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unit = "\n".join(f'#include "{name}"' for name in sources if name.endswith(".cpp"))
            object_file, built = f"{scratch}/cpu.o", f"{scratch}/cpu.so"
            _compile([str(compiler), *COMPILE.split(), f"-I{SOURCES}", "-c", "-", "-o", object_file], unit)
            # linked without OpenMP: its symbols come from the runtime that torch has loaded, whose threads are shared
            _compile([str(compiler), "-shared", object_file, "-o", built], "")
            Path(built).replace(target)  # whole or not at all, whoever else is building
    except OSError as error:
        raise BuildError(f"{error.filename}: {error.strerror}") from error
    return target


def _compile(command: list[str], text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    if done.returncode:
        first = next(
            (line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200]
        )
        raise BuildError(f"{Path(command[0]).name} failed: {first}")


def _compiler() -> Path:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return Path(found).resolve()
    raise BuildError(f"no C++ compiler found: {wanted or 'g++, clang++ or c++'}")


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return repr((platform.machine(), platform.processor(), sorted(known)))


@cache
def _built() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("MOESAIC_NATIVE") == "0":
        return "MOESAIC_NATIVE is 0"
    try:
        path = build()
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged
            path.unlink()
            return ctypes.CDLL(str(build()))
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return str(error)


def _library() -> ctypes.CDLL | None:
    built = _built()
    return None if isinstance(built, str) else built


def _pass(value: Argument) -> object:
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        assert value.dtype in SUFFIX, value.dtype
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else value
