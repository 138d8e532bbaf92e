"""Where a run computes and in which type, with the reasons, which the start-up table shows."""

import ctypes
import os
import sys
import time
from dataclasses import dataclass

import torch

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, check
from moesaic.train.config import TrainConfig

MARGIN = 1.2
"""bf16 must be this much faster than fp32 to be chosen on a CPU."""


@dataclass(frozen=True)
class Device:
    """Device, compute type, and why."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    why_device: str
    why_dtype: str


def choose_device(config: TrainConfig, *, stored_precision: str | None = None) -> Device:
    """Pick the accelerator where there is one. `stored_precision` is what a resumed run decided at its start."""
    device, why = accelerator()
    threads = config.threads or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    precision = config.precision if config.precision != "auto" else stored_precision
    if precision is not None:
        chosen = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        reason = "as configured" if config.precision != "auto" else "as this run began"
    elif device.type == "cuda":
        chosen, reason = torch.bfloat16, "tensor cores"
    else:
        chosen, reason = measured_dtype()
    return Device(device, chosen, threads, why, reason)


def accelerator() -> tuple[torch.device, str]:
    """The GPU of this process, or the CPU where there is none; and why."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    return torch.device("cpu"), "no CUDA device found"


def check_kernels(backend: Backend, precision: str) -> None:
    """Raise BackendError where the kernels that a run asks for cannot run here. Computes nothing."""
    device, _ = accelerator()
    likely = torch.bfloat16 if device.type == "cuda" else torch.float32
    check(backend, device, {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision, likely))


def kernels_in_words(backend: Backend, device: torch.device) -> str:
    """What computes the experts, for the start-up table."""
    if backend == "auto":
        return native.status() if device.type == "cpu" else "the fastest per shape, as measured"
    words = {
        "triton": "Triton",
        "torch": "torch.nn.functional.grouped_mm",
        "megablocks": "grouped_gemm of MegaBlocks",
    }
    return words[backend]


def precision_name(dtype: torch.dtype) -> str:
    """The word for a compute type in configs."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measured_dtype() -> tuple[torch.dtype, str]:
    """The faster type for a matrix product on this CPU; fp32 unless bf16 wins clearly."""
    seconds = {dtype: product_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = torch.bfloat16 if ratio > MARGIN else torch.float32
    return chosen, f"a bf16 product runs at {ratio:.1f}x the speed of fp32 here"


def product_seconds(dtype: torch.dtype) -> float:
    """Best of three products of 512 x 512 matrices."""
    left, right = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return best


def tune_host() -> None:
    """Process-wide settings for CPU training: denormals are zero, and freed tensors are kept for the next step.

    glibc gives large blocks back to the kernel at every free, and the kernel zeroes them at every new use: page faults
    then cost more than the arithmetic on activations. Blocks are not aligned to large pages: glibc before 2.38 finds no
    use for freed ones of the same size then, and memory grows with every step of uneven sizes.
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3
            libc.mallopt(mmap_threshold, 1 << 30)
            libc.mallopt(trim_threshold, (1 << 31) - 1)


PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by device, from the makers' data sheets."""


def peak_flops(device: Device) -> float | None:
    """Peak arithmetic of the device in the compute type; None where it is not known."""
    if device.device.type != "cuda" or device.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device.device)
    return next((peak for model, peak in PEAK_BF16.items() if model in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
