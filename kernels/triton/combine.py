"""The weighted sum of a token's rows, and what else walks over assignments.

Each program has one token and some columns, and adds the token's rows in order: no atomics, equal bits every time.

Dims: T tokens, R rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_UNROLLED = 16
"""Up to so many rows per token are loaded side by side, where every token has the same number."""
BLOCK_D = 1024


@triton.jit
def combine_kernel(
    rows,
    where,
    offsets,
    weights,
    out,
    D,
    PER_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum of weights[a] * rows[where[a]]; PER_TOKEN: assignments per token, 0 where that varies."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if PER_TOKEN:
        for k in tl.static_range(PER_TOKEN):
            total += weighted_row(rows, where, weights, token * PER_TOKEN + k, column, D, WEIGHTED)
    else:
        for assignment in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
            total += weighted_row(rows, where, weights, assignment, column, D, WEIGHTED)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def weighted_row(rows, where, weights, assignment, column, D, WEIGHTED: tl.constexpr):
    row = tl.load(where + assignment)
    found = tl.load(rows + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    if WEIGHTED:
        found *= tl.load(weights + assignment).to(tl.float32)
    return found


@triton.jit
def gate_gradient_kernel(partial, where, out, R, tiles, BLOCK: tl.constexpr):
    """out[a] = sum over tiles of partial[tile, where[a]], in order."""
    assignment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = assignment < R
    row = tl.load(where + assignment, mask=own, other=0)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(tiles):
        total += tl.load(partial + row, mask=own, other=0.0)
        partial += R
    tl.store(out + assignment, total.to(out.dtype.element_ty), mask=own)


def combine(
    rows: Tensor, where: Tensor, offsets: Tensor, weights: Tensor | None, per_token: int | None
) -> Tensor:
    """The sum of every token's rows, times weights where given; tokens without rows get zeros."""
    tokens, dim = offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(tokens, dim)
    block = min(triton.next_power_of_2(dim), BLOCK_D)
    unrolled = per_token if per_token is not None and per_token <= MOST_UNROLLED else 0
    combine_kernel[(tokens, triton.cdiv(dim, block))](
        rows,
        where,
        offsets,
        where if weights is None else weights,
        out,
        dim,
        PER_TOKEN=unrolled,
        WEIGHTED=weights is not None,
        BLOCK=block,
        num_warps=4,
    )
    return out


def gate_gradients(partial: Tensor, where: Tensor, dtype: torch.dtype) -> Tensor:
    """(tiles, R) parts in the order of rows -> (R,) in the order of assignments."""
    tiles, rows = partial.shape
    out = partial.new_empty(rows, dtype=dtype)
    gate_gradient_kernel[(triton.cdiv(rows, 256),)](
        partial, where, out, rows, tiles, BLOCK=256, num_warps=4
    )
    return out
