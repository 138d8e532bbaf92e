"""The weighted sum of a token's rows, and what else walks over assignments.

Each program has one token and some columns, and adds the token's rows in order: no atomics, equal bits every time.

Dims: T tokens, R rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.variant import Variant

MOST_UNROLLED = 16
"""Up to so many rows per token are loaded side by side, where every token has the same number."""
TILE = 1024
"""Numbers that a program sums up at a time: a part of one wide token, or several narrow ones."""


@triton.jit
def combine_kernel(
    rows,
    where,
    offsets,
    weights,
    out,
    T,
    D,
    PER_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t] = sum of weights[a] * rows[where[a]]; PER_TOKEN: assignments per token, 0 where that varies."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    own, wide = token < T, (column < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if PER_TOKEN:
        for k in tl.static_range(PER_TOKEN):
            total += weighted_rows(
                rows, where, weights, token * PER_TOKEN + k, own, column, wide, D, WEIGHTED
            )
    else:
        start = tl.load(offsets + token, mask=own, other=0)
        count = tl.load(offsets + token + 1, mask=own, other=0) - start
        for k in range(tl.max(count, 0)):
            total += weighted_rows(rows, where, weights, start + k, k < count, column, wide, D, WEIGHTED)
    to = out + token[:, None] * D + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=own[:, None] & wide)


@triton.jit
def weighted_rows(rows, where, weights, assignment, own, column, wide, D, WEIGHTED: tl.constexpr):
    """One row per token, in fp32; zeros where it has none."""
    row = tl.load(where + assignment, mask=own, other=0)
    found = tl.load(rows + row[:, None] * D + column[None, :], mask=own[:, None] & wide, other=0.0).to(
        tl.float32
    )
    if WEIGHTED:
        found *= tl.load(weights + assignment, mask=own, other=0.0).to(tl.float32)[:, None]
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


@on_its_device
def combine(
    rows: Tensor, where: Tensor, offsets: Tensor, weights: Tensor | None, per_token: int | None
) -> Tensor:
    """The sum of every token's rows, times weights where given; tokens without rows get zeros."""
    tokens, dim = offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(tokens, dim)
    width = min(triton.next_power_of_2(dim), TILE)
    height = min(TILE // width, triton.next_power_of_2(tokens))
    unrolled = per_token if per_token is not None and per_token <= MOST_UNROLLED else 0
    combine_kernel[(triton.cdiv(tokens, height), triton.cdiv(dim, width))](
        rows,
        where,
        offsets,
        where if weights is None else weights,
        out,
        tokens,
        dim,
        PER_TOKEN=unrolled,
        WEIGHTED=weights is not None,
        BLOCK_T=height,
        BLOCK_D=width,
        num_warps=4,  # type: ignore[call-arg]  # of the launcher
    )
    return out


@triton.jit
def combine_backward_kernel(
    grad,
    rows,
    weights,
    tokens,
    where,
    grad_rows,
    grad_weights,
    R,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_rows[where[a]] = weights[a] * grad[t], grad_weights[a] = rows[where[a]] . grad[t], in one pass."""
    assignment = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    own = assignment < R
    row = tl.load(where + assignment, mask=own, other=0)
    token = tl.load(tokens + row, mask=own, other=0)
    weight = tl.load(weights + assignment, mask=own, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        here = own[:, None] & (column < D)[None, :]
        at = row[:, None] * D + column[None, :]
        coming = tl.load(grad + token[:, None] * D + column[None, :], mask=here, other=0.0).to(tl.float32)
        total += tl.sum(coming * tl.load(rows + at, mask=here, other=0.0).to(tl.float32), 1)
        tl.store(grad_rows + at, (coming * weight[:, None]).to(grad_rows.dtype.element_ty), mask=here)
    tl.store(grad_weights + assignment, total.to(grad_weights.dtype.element_ty), mask=own)


@on_its_device
def combine_gradients(
    grad: Tensor, rows: Tensor, weights: Tensor, tokens: Tensor, where: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weights of a sum, given that of its result."""
    grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
    assignments, dim = rows.shape
    width = min(triton.next_power_of_2(dim), TILE)
    height = max(1, min(TILE // width, 16))
    combine_backward_kernel[(triton.cdiv(assignments, height),)](
        grad,
        rows,
        weights,
        tokens,
        where,
        grad_rows,
        grad_weights,
        assignments,
        dim,
        BLOCK_R=height,
        BLOCK_D=width,
        num_warps=4,  # type: ignore[call-arg]
    )
    return grad_rows, grad_weights


def variants() -> list[Variant]:
    """The gradient of a sum; the other kernels are listed with the experts, which use them too."""
    pointers = dict.fromkeys(("grad", "rows", "grad_rows"), "*bf16")
    pointers |= {"weights": "*fp32", "grad_weights": "*fp32", "tokens": "*i64", "where": "*i64"}
    return [
        Variant(
            f"combine_backward_d{width}",
            combine_backward_kernel,
            pointers | {"R": "i32", "D": "i32"},
            {"BLOCK_R": max(1, min(TILE // width, 16)), "BLOCK_D": width},
            aligned=frozenset({"D"}),
        )
        for width in (64, 256, 1024)
    ]


def gate_gradients(partial: Tensor, where: Tensor, dtype: torch.dtype) -> Tensor:
    """(tiles, R) parts in the order of rows -> (R,) in the order of assignments."""
    tiles, rows = partial.shape
    out = partial.new_empty(rows, dtype=dtype)
    gate_gradient_kernel[(triton.cdiv(rows, 256),)](
        partial,
        where,
        out,
        rows,
        tiles,
        BLOCK=256,
        num_warps=4,  # type: ignore[call-arg]
    )
    return out
