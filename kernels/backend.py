"""Which implementation of an op runs: Triton on GPUs, C++ on CPUs, plain torch anywhere, or what the user names.

A backend that was asked for and cannot run is an error; `auto` takes the best that can.
"""

from functools import cache
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moesaic.kernels import native

Backend = Literal["auto", "triton", "torch", "megablocks"]
"""`torch` and `megablocks` name the library whose grouped matrix product runs; all else is plain torch then."""
Engine = Literal["triton", "cpp", "torch"]


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message says why and what can."""


def engine(backend: str, *tensors: Tensor | None) -> Engine:
    """The implementation that serves these tensors; None counts as absent. Raises BackendError.

    `backend` is a `Backend`, which the schema of a custom op knows as a string. `megablocks` has but the experts'
    products, which check for themselves; all else is plain torch with it, whatever its type. Tensors without storage,
    of which memory is estimated, never reach a kernel of a GPU: it would read from address 0.
    """
    given = next(tensor for tensor in tensors if tensor is not None)
    device = given.device
    if backend == "triton":
        check(backend, device, given.dtype)
    elif backend != "auto":
        return "torch"
    elif device.type != "cuda":
        return "cpp" if native.serves(*tensors) else "torch"
    elif triton_refusal(device):
        return "torch"
    return "torch" if isinstance(given, FakeTensor) else "triton"


def check(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise BackendError where a backend that was asked for cannot run."""
    reason = refusal(backend, device, dtype)
    if reason:
        raise BackendError(f"kernels: {backend} cannot run: {reason}; use 'auto' or 'torch'")


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None where it can."""
    problem, interpreted = _triton()
    if problem:
        return problem
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return None
    return f"it needs a GPU, and the device is {device.type}"


def refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on a device in a compute type, or None where it can."""
    if backend == "triton":
        return triton_refusal(device)
    return library_refusal(device, dtype) if backend == "megablocks" else None


def library_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why grouped_gemm, the part of MegaBlocks that runs with today's Triton, cannot run here, or None."""
    problem = _grouped_gemm()
    if problem:
        return problem
    if device.type != "cuda" or dtype != torch.bfloat16:
        return f"its package grouped_gemm takes bf16 on GPUs, not {str(dtype).removeprefix('torch.')} on {device.type}"
    return None


@cache
def _grouped_gemm() -> str | None:
    try:
        import_module("grouped_gemm")  # by name: nothing of ours depends on it
    except (ImportError, OSError) as error:
        return f"its package grouped_gemm does not import ({error})"
    return None


@cache
def _triton() -> tuple[str | None, bool]:
    """Why triton cannot be imported, or None; and whether its kernels run in the interpreter."""
    try:
        import triton  # noqa: F401

        from moesaic.kernels.triton.variant import INTERPRETED
    except ImportError as error:
        return f"the package triton is not there ({error})", False
    return None, INTERPRETED
