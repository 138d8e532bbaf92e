"""The two products around an expert's non-linearity, with the non-linearity as their epilogue.

Both gather their rows as they read them, so no copy of tokens in the order of experts is ever stored. See grouped.py
for how tiles are found and walked over.

Dims: T tokens, R rows, D width, F hidden width, G input matrices: 2 where KIND is gated, else 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels.triton.grouped import (
    Blocks,
    Tiles,
    addressable,
    box,
    launched,
    matrix_tile,
    place,
    programs,
    row_tile,
    rows_of,
    strips,
    tiles_across,
    weight_tile,
)


@triton.jit
def activated(gate, up, KIND: tl.constexpr):
    """The non-linearity, in fp32; kinds without a gate have no `up`."""
    if KIND == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif KIND == "drelu":
        return tl.maximum(gate, 0.0, tl.PropagateNan.ALL) * tl.maximum(up, 0.0, tl.PropagateNan.ALL)
    elif KIND == "gelu":
        return gate * (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    else:
        positive = tl.maximum(gate, 0.0, tl.PropagateNan.ALL)
        return positive * positive


@triton.jit
def gate_slope(gate, up, KIND: tl.constexpr):
    """The non-linearity's derivative by `gate`."""
    if KIND == "swiglu":
        sigmoid = tl.sigmoid(gate)
        return (sigmoid + (1 - sigmoid) * (gate * sigmoid)) * up  # in this order exact for large gates too
    elif KIND == "drelu":
        return tl.where(gate > 0, tl.maximum(up, 0.0, tl.PropagateNan.ALL), 0.0)
    elif KIND == "gelu":
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        return density * gate + (0.5 + 0.5 * tl.erf(gate * 0.7071067811865476))
    else:
        return 2 * tl.maximum(gate, 0.0, tl.PropagateNan.ALL)


@triton.jit
def up_slope(gate, up, KIND: tl.constexpr):
    """The non-linearity's derivative by `up`."""
    if KIND == "swiglu":
        return gate * tl.sigmoid(gate)
    else:
        return tl.where(up > 0, tl.maximum(gate, 0.0, tl.PropagateNan.ALL), 0.0)


@triton.jit
def hidden_kernel(
    x,
    w1,
    tokens,
    table,
    used,
    hidden,
    active,
    limit,
    D,
    F,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden = x[tokens] @ w1[expert].T, and its activation. Gate and up columns of a tile are computed together."""
    tiles_m = tl.load(used).to(tl.int32)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, GROUP_M)  # type: ignore[misc]  # a tuple
        expert, start, local, own = rows_of(table, limit, m, BLOCK_M)  # type: ignore[misc]  # a tuple
        source = tl.load(tokens + start + local) if GATHER else start + local
        first = n.to(tl.int64) * BLOCK_N
        width = (F - first).to(tl.int32)  # columns from here on
        depth = tl.arange(0, BLOCK_K)
        left = x + source[:, None] * D + depth[None, :]
        matrix = 2 * expert if GATED else expert
        if not TMA:
            size = tl.cast(F, tl.int64) * D
            line = tl.minimum(
                tl.arange(0, BLOCK_N), width - 1
            )  # beyond the matrix its last row, which is not stored
            right = w1 + matrix * size + first * D + (line[None, :] * D + depth[:, None])
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            a = row_tile(left, depth, D - k, EVEN_K)
            if TMA:
                b = weight_tile(w1, matrix, k, first, True, BLOCK_K, BLOCK_N)
            else:
                b = matrix_tile(right, depth, line, D - k, width, EVEN_K, True)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            gate = tl.dot(a, b, gate, input_precision="ieee")
            if GATED:
                if TMA:
                    c = weight_tile(w1, matrix + 1, k, first, True, BLOCK_K, BLOCK_N)
                else:
                    c = matrix_tile(right + size, depth, line, D - k, width, EVEN_K, True)
                if UPCAST:
                    c = c.to(tl.float32)
                up = tl.dot(a, c, up, input_precision="ieee")
            left += BLOCK_K
            if not TMA:
                right += BLOCK_K
        stride = 2 * F if GATED else F
        hidden_tile = hidden + start * stride + first
        active_tile = active + start * F + first
        gates = strips(gate, PARTS, BLOCK_M, BLOCK_N)
        ups = strips(up, PARTS, BLOCK_M, BLOCK_N) if GATED else gates
        for i in tl.static_range(PARTS):
            across = i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            mask = own[:, None] & (across < width)[None, :]
            to = hidden_tile + (local[:, None] * stride + across[None, :])
            tl.store(to, gates[i].to(hidden.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(to + F, ups[i].to(hidden.dtype.element_ty), mask=mask)
            value = activated(gates[i], ups[i], KIND)
            to = active_tile + (local[:, None] * F + across[None, :])
            tl.store(to, value.to(active.dtype.element_ty), mask=mask)


@triton.jit
def hidden_gradient_kernel(
    grad,
    w2,
    tokens,
    order,
    gates,
    table,
    used,
    hidden,
    grad_hidden,
    active,
    partial,
    limit,
    R,
    D,
    F,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROUTED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the activation is grad[tokens] @ w2[expert]; stores that of `hidden`, and the activation.

    Where rows are ROUTED, both are times the row's gate, and `partial` gets this tile's share of the gate's gradient.
    """
    tiles_m = tl.load(used).to(tl.int32)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, GROUP_M)  # type: ignore[misc]  # a tuple
        expert, start, local, own = rows_of(table, limit, m, BLOCK_M)  # type: ignore[misc]  # a tuple
        source = tl.load(tokens + start + local) if ROUTED else start + local
        first = n.to(tl.int64) * BLOCK_N
        width = (F - first).to(tl.int32)  # columns from here on
        across = tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        left = grad + source[:, None] * D + depth[None, :]
        if not TMA:
            right = w2 + expert * D * F + first + (depth[:, None] * F + across[None, :])
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            a = row_tile(left, depth, D - k, EVEN_K)
            if TMA:
                b = weight_tile(w2, expert, k, first, False, BLOCK_K, BLOCK_N)
            else:
                b = matrix_tile(right, depth, across, D - k, width, EVEN_K, EVEN_N)
                right += BLOCK_K * F
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
            left += BLOCK_K
        stride = 2 * F if GATED else F
        hidden_tile = hidden + start * stride + first
        grad_tile = grad_hidden + start * stride + first
        active_tile = active + start * F + first
        if ROUTED:
            scale = tl.load(gates + tl.load(order + start + local)).to(tl.float32)[:, None]
        share = tl.zeros((BLOCK_M,), tl.float32)
        parts = strips(total, PARTS, BLOCK_M, BLOCK_N)
        for i in tl.static_range(PARTS):
            columns = i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            mask = own[:, None] & (columns < width)[None, :]
            at = local[:, None] * stride + columns[None, :]
            part = parts[i]
            gate = tl.load(hidden_tile + at, mask=mask, other=0.0).to(tl.float32)
            up = gate
            if GATED:
                up = tl.load(hidden_tile + F + at, mask=mask, other=0.0).to(tl.float32)
            value = activated(gate, up, KIND)
            if ROUTED:
                share += tl.sum(part * value, 1)
                part *= scale
                value *= scale
            to = active_tile + (local[:, None] * F + columns[None, :])
            tl.store(to, value.to(active.dtype.element_ty), mask=mask)
            kind = grad_hidden.dtype.element_ty
            tl.store(grad_tile + at, (gate_slope(gate, up, KIND) * part).to(kind), mask=mask)
            if GATED:
                tl.store(grad_tile + F + at, (up_slope(gate, up, KIND) * part).to(kind), mask=mask)
        if ROUTED:
            tl.store(partial + n.to(tl.int64) * R + start + local, share, mask=own)


def hidden_layer(
    x: Tensor, w1: Tensor, tokens: Tensor | None, tiles: Tiles, rows: int, blocks: Blocks, *, kind: str
) -> tuple[Tensor, Tensor]:
    """The hidden layer (R, G * F) of every row, and its activation (R, F)."""
    _, matrices, width, dim = w1.shape
    hidden, active = x.new_empty(rows, matrices * width), x.new_empty(rows, width)
    grid = (programs(tiles.limit * tiles_across(width, blocks.n), blocks.per_sm, x.device),)
    tma = blocks.tma and addressable(w1)
    weights = w1.flatten(0, 1)
    hidden_kernel[grid](
        x,
        TensorDescriptor.from_tensor(weights, box(blocks, transposed=True)) if tma else weights,
        tiles.table if tokens is None else tokens,
        tiles.table,
        tiles.used,
        hidden,
        active,
        tiles.limit,
        dim,
        width,
        **launched(
            blocks,
            KIND=kind,
            GATED=matrices == 2,
            GATHER=tokens is not None,
            TMA=tma,
            EVEN_K=dim % blocks.k == 0,
            PARTS=blocks.parts,
        ),
    )
    return hidden, active


def hidden_gradient(
    grad: Tensor,
    w2: Tensor,
    hidden: Tensor,
    tokens: Tensor | None,
    order: Tensor | None,
    gates: Tensor | None,
    tiles: Tiles,
    blocks: Blocks,
    *,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the hidden layer, the activation, and parts of the gates' gradients: (R, GF), (R, F), (tiles, R)."""
    _, dim, width = w2.shape
    rows = hidden.shape[0]
    grad_hidden, active = hidden.new_empty(hidden.shape), hidden.new_empty(rows, width)
    across = tiles_across(width, blocks.n)
    partial = hidden.new_empty(across if gates is not None else 0, rows, dtype=torch.float32)
    grid = (programs(tiles.limit * across, blocks.per_sm, grad.device),)
    tma = blocks.tma and addressable(w2)
    hidden_gradient_kernel[grid](
        grad,
        TensorDescriptor.from_tensor(w2, box(blocks, transposed=False)) if tma else w2,
        tiles.table if tokens is None else tokens,
        tiles.table if order is None else order,
        grad if gates is None else gates,
        tiles.table,
        tiles.used,
        hidden,
        grad_hidden,
        active,
        partial,
        tiles.limit,
        rows,
        dim,
        width,
        **launched(
            blocks,
            KIND=kind,
            GATED=hidden.shape[1] == 2 * width,
            ROUTED=gates is not None,
            TMA=tma,
            EVEN_K=dim % blocks.k == 0,
            EVEN_N=width % blocks.n == 0,
            PARTS=blocks.parts,
        ),
    )
    return grad_hidden, active, partial
