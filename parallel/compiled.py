"""Calls of C++ kernels on numpy arrays, for planners: they have few numbers, and little time."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from moesaic.kernels import native

_Start = ctypes.c_char * 0
"""Where a buffer begins; raises for arrays that are not contiguous or not writable. Quicker than `.ctypes`."""


def run_compiled(name: str, arrays: Sequence[np.ndarray], sizes: Sequence[int]) -> bool:
    """Run a kernel on contiguous, writable arrays; False where there is none, and the caller does it
    itself."""
    if not _there():
        return False
    pointers = [ctypes.c_void_p(ctypes.addressof(_Start.from_buffer(array.data))) for array in arrays]
    native.run(name, torch.int64, *pointers, *sizes)
    return True


@cache  # asking takes as long as a small plan
def _there() -> bool:
    return native.serves(torch.empty(0, dtype=torch.int64))
