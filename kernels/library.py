"""The grouped products of other people's libraries: `F.grouped_mm` of torch, and grouped_gemm, which MegaBlocks uses.

Both leave unaligned widths alone; torch's also leaves rows beyond the last offset unwritten, so rows are exact here.
"""

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.backend import Backend

ALIGNMENT = 16
"""Bytes that the strides of a matrix must be a multiple of."""
MOST_GROUPS = 1023
"""That `F.grouped_mm` takes on a GPU."""
MOST_NUMBERS = 2**31 - 1
"""In one tensor on a GPU: kernels of the libraries count in 32 bits."""


def library_serves(counts: Tensor, *tensors: Tensor) -> bool:
    """Whether the libraries take these: on GPUs bf16, on the CPU also fp32 and fp16; aligned widths."""
    dtype = tensors[0].dtype
    if tensors[0].is_cuda and (
        counts.shape[0] > MOST_GROUPS or any(tensor.numel() > MOST_NUMBERS for tensor in tensors)
    ):
        return False
    dtypes = (torch.bfloat16,) if tensors[0].is_cuda else (torch.float32, torch.bfloat16, torch.float16)
    widths = {size for tensor in tensors for size in tensor.shape[-2 if tensor.ndim == 3 else -1 :]}
    return dtype in dtypes and all(width * dtype.itemsize % ALIGNMENT == 0 for width in widths)


def library_product(rows: Tensor, weights: Tensor, counts: Tensor, backend: Backend) -> Tensor:
    """(N, I), (M, I, O) -> (N, O)."""
    if backend == "megablocks":
        return import_module("grouped_gemm").backend.gmm(rows, weights.contiguous(), counts.cpu())
    return F.grouped_mm(rows, weights, offs=counts.cumsum(0).to(torch.int32))


def library_outer(left: Tensor, right: Tensor, counts: Tensor, backend: Backend) -> Tensor:
    """(N, O), (N, I) -> (M, O, I)."""
    if backend == "megablocks":
        return import_module("grouped_gemm").backend.gmm(left, right, counts.cpu(), trans_a=True)
    return F.grouped_mm(left.T, right, offs=counts.cumsum(0).to(torch.int32))
