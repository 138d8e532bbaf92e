"""Large pages for large tensors: where rows of a table are read at random, small ones cost more than the reads."""

import ctypes
import sys
from functools import cache

from torch import Tensor

ADVICE = 14
"""MADV_HUGEPAGE of Linux."""
SMALL = 4096
LARGE = 2**21


def ask_for_large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to keep a tensor on pages of 2 MiB, and return it; elsewhere, and for small ones, nothing happens.

    For CPU tensors that are about to be written for the first time: pages already written stay small for long. Every
    page is then taken whole, so it is not for tensors of which little is ever written.
    """
    begin = -(-tensor.data_ptr() // SMALL) * SMALL
    size = tensor.data_ptr() + tensor.nbytes - begin
    if tensor.device.type == "cpu" and sys.platform == "linux" and size >= LARGE:
        _libc().madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(size), ADVICE
        )  # may be refused: it is only advice
    return tensor


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
