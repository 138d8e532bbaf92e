"""Calls of C++ kernels on numpy arrays, for planners: they have few numbers, and little time."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from moesaic.kernels import native


def run_compiled(name: str, arrays: Sequence[np.ndarray], sizes: Sequence[int]) -> bool:
    """Run a kernel on contiguous arrays, which it may change; False where there is none, and the caller does it
    itself."""
    if not _there():
        return False
    assert all(array.flags.c_contiguous for array in arrays)
    native.run(name, torch.int64, *[ctypes.c_void_p(array.ctypes.data) for array in arrays], *sizes)
    return True


@cache  # asking takes as long as a small plan
def _there() -> bool:
    return native.serves(torch.empty(0, dtype=torch.int64))
