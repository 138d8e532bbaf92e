"""Which implementation of an op runs: Triton on GPUs, C++ on CPUs, plain torch anywhere, or what the user names.

A backend that was asked for and cannot run is an error; `auto` takes the best that can.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from moesaic.kernels import native

Backend = Literal["auto", "triton", "torch", "megablocks"]
"""`torch` and `megablocks` name the library whose grouped matrix product runs; all else is plain torch then."""
Engine = Literal["triton", "cpp", "torch"]


class BackendError(ValueError):
    """A backend was asked for that cannot run here; the message says why and what can."""


def engine(backend: Backend, *tensors: Tensor | None) -> Engine:
    """The implementation that serves these tensors; None counts as absent. Raises BackendError."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if backend == "triton":
        reason = triton_refusal(device)
        if reason:
            raise BackendError(f"kernels: triton cannot run: {reason}; use 'auto' or 'torch'")
        return "triton"
    if backend != "auto":
        return "torch"
    if device.type == "cuda":
        return "torch" if triton_refusal(device) else "triton"
    return "cpp" if native.serves(*tensors) else "torch"


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton cannot run on a device, or None where it can."""
    problem, interpreted = _triton()
    if problem:
        return problem
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return None
    return f"the tensors are on {device.type}, and Triton runs on GPUs"


@cache
def _triton() -> tuple[str | None, bool]:
    """Why triton cannot be imported, or None; and whether its kernels run in the interpreter."""
    try:
        import triton  # noqa: F401

        from moesaic.kernels.triton.variant import INTERPRETED
    except ImportError as error:
        return f"the package triton is not there ({error})", False
    return None, INTERPRETED
