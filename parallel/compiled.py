"""Calls of C++ kernels on numpy arrays, for planners: they have few numbers, and little time."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from moesaic.kernels import native

_Start = ctypes.c_char * 0
"""Where a buffer begins; raises for arrays that are not contiguous or not writable. Quicker than `.ctypes`."""


def run_compiled(
    name: str, arrays: Sequence[np.ndarray | Sequence[np.ndarray]], sizes: Sequence[int]
) -> bool:
    """Run a kernel on contiguous, writable arrays, a sequence of which it gets as an array of pointers; False where
    there is none, and the caller does it itself."""
    if not _there():
        return False
    pointers = [
        ctypes.c_void_p(_address(given)) if isinstance(given, np.ndarray) else _addresses(given)
        for given in arrays
    ]
    native.run(name, torch.int64, *pointers, *sizes)
    return True


def _address(array: np.ndarray) -> int:
    return ctypes.addressof(_Start.from_buffer(array.data))


def _addresses(arrays: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*map(_address, arrays))


def as_kernel_input(array: np.ndarray, dtype: type) -> np.ndarray:
    """The array itself where a kernel can take it, else a copy."""
    return array if array.flags.carray and array.dtype == dtype else np.array(array, dtype, order="C")


@cache  # asking takes as long as a small plan
def _there() -> bool:
    return native.serves(torch.empty(0, dtype=torch.int64))
