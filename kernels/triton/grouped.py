"""Matrix products of consecutive groups of rows, as persistent Triton kernels.

The host never learns how many rows a group has: a small kernel cuts the groups into tiles of BLOCK_M rows and lists
them, and a fixed number of programs walks over the list. Rows of a tile beyond its group repeat the last row, so loads
of rows need no masks. What would read beyond a matrix is masked, or reads its last row again.

Dims: N rows, E groups, K inputs, O outputs. Tiles are BLOCK_M x BLOCK_N, BLOCK_K inputs at a time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moesaic.kernels.triton.variant import INTERPRETED


@dataclass(frozen=True)
class Blocks:
    """Launch constants of one product."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    per_sm: int = 1
    """Programs per multiprocessor; two overlap one's epilogue with the other's products, if both fit."""

    parts: int = 2
    """Strips of columns, 2 or 4, that an epilogue with a non-linearity takes one after the other."""

    tma: bool = False
    """Whether the hardware of Hopper and later copies whole tiles (TMA), where `addressable` says that it can."""

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


GROUP_M = 8
"""Tiles of rows that are computed for one tile of columns before the next: both then stay in L2."""


@dataclass(frozen=True)
class Tiles:
    """All tiles of rows, group by group: int64 tensors on the device."""

    table: Tensor
    """(3, limit): group, first row, number of rows. Valid up to `used`."""
    used: Tensor
    """(1,): number of tiles."""
    starts: Tensor
    """(E,): first row of each group."""

    @property
    def limit(self) -> int:
        """What the host knows: there are at most so many."""
        return self.table.shape[1]


def cut_rows(counts: Tensor, rows: int, block: int) -> Tiles:
    """The tiles of `rows` rows, of which each group has `counts`."""
    groups = counts.shape[0]
    limit = min(rows, rows // block + groups)
    table = counts.new_empty((3, limit), dtype=torch.int64)
    used, starts = counts.new_empty(1, dtype=torch.int64), counts.new_empty(groups, dtype=torch.int64)
    cut_kernel[(groups,)](
        counts,
        table,
        used,
        starts,
        groups,
        limit,
        BLOCK_M=block,
        BLOCK=1024,
        num_warps=4,  # type: ignore[call-arg]
    )
    return Tiles(table, used, starts)


@triton.jit
def cut_kernel(counts, table, used, starts, groups, limit, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """One program per group: count rows and tiles before it, then list its own."""
    group = tl.program_id(0)
    rows_before = tl.zeros((BLOCK,), tl.int64)
    tiles_before = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, group, BLOCK):
        other = first + tl.arange(0, BLOCK)
        count = tl.load(counts + other, mask=other < group, other=0).to(tl.int64)
        rows_before += count
        tiles_before += (count + BLOCK_M - 1) // BLOCK_M
    start = tl.sum(rows_before, 0)
    first_tile = tl.sum(tiles_before, 0)
    count = tl.load(counts + group).to(tl.int64)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    tl.store(starts + group, start)
    if group == groups - 1:
        tl.store(used, first_tile + tiles)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        row = tile * BLOCK_M
        to = table + first_tile + tile
        tl.store(to, tl.zeros((BLOCK,), tl.int64) + group, mask=tile < tiles)
        tl.store(to + limit, start + row, mask=tile < tiles)
        tl.store(to + 2 * limit, tl.minimum(count - row, BLOCK_M), mask=tile < tiles)


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Which rows and columns a tile has: down GROUP_M tiles of rows, then on to the next tile of columns."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    return first + inside % height, inside // height


@triton.jit
def rows_of(table, limit, m, BLOCK_M: tl.constexpr):
    """Group of a tile of rows, its first row, its rows counted from there, and which of them are its own.

    Addresses are a 64-bit scalar plus 32 bits within the tile, which takes fewer registers than 64 bits throughout.
    """
    group = tl.load(table + m)
    start = tl.load(table + limit + m)
    size = tl.load(table + 2 * limit + m).to(tl.int32)
    local = tl.arange(0, BLOCK_M)
    return group, start, tl.minimum(local, size - 1), local < size


@triton.jit
def strips(tile, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile cut into 2 or 4 strips of columns. Epilogues take one after the other: all do not fit in registers."""
    left, right = halves(tile, BLOCK_M, BLOCK_N)  # type: ignore[misc]  # a tuple
    if PARTS == 2:
        return left, right
    else:  # a plain return here would be compiled for both
        first, second = halves(left, BLOCK_M, BLOCK_N // 2)  # type: ignore[misc]  # a tuple
        third, fourth = halves(right, BLOCK_M, BLOCK_N // 2)  # type: ignore[misc]  # a tuple
        return first, second, third, fourth


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def product_kernel(
    rows,
    weights,
    table,
    used,
    out,
    limit,
    K,
    OUT,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = rows @ weights[group]; TRANSPOSED: weights are stored (E, O, K), else (E, K, O).

    TMA: `rows` and `weights` are descriptors of tiles.
    """
    tiles_m = tl.load(used).to(tl.int32)
    tiles_n = tl.cdiv(OUT, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, GROUP_M)  # type: ignore[misc]  # a tuple
        group, start, local, own = rows_of(table, limit, m, BLOCK_M)  # type: ignore[misc]  # a tuple
        first = n.to(tl.int64) * BLOCK_N
        across = tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        width = (OUT - first).to(tl.int32)  # columns from here on
        if not TMA:
            left = rows + start * K + (local[:, None] * K + depth[None, :])
            matrix = weights + group * K * OUT
            if TRANSPOSED:
                right = matrix + first * K + (tl.minimum(across, width - 1)[None, :] * K + depth[:, None])
            else:
                right = matrix + first + (depth[:, None] * OUT + across[None, :])
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if TMA:
                a = rows.load([start.to(tl.int32), k])
                b = weight_tile(weights, group, k, first, TRANSPOSED, BLOCK_K, BLOCK_N)
            else:
                a = row_tile(left, depth, K - k, EVEN_K)
                b = matrix_tile(right, depth, across, K - k, width, EVEN_K, EVEN_N or TRANSPOSED)
                left += BLOCK_K
                right += BLOCK_K if TRANSPOSED else BLOCK_K * OUT
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        to = out + start * OUT + first + (local[:, None] * OUT + across[None, :])
        tl.store(to, total.to(out.dtype.element_ty), mask=own[:, None] & (across < width)[None, :])


@triton.jit
def weight_tile(
    weights, matrix, k, first, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """By TMA: BLOCK_K inputs from k, BLOCK_N outputs from `first`; zeros beyond the matrix."""
    matrix, first = matrix.to(tl.int32), first.to(tl.int32)
    if TRANSPOSED:
        return tl.trans(tl.reshape(weights.load([matrix, first, k]), (BLOCK_N, BLOCK_K)))
    else:
        return tl.reshape(weights.load([matrix, k, first]), (BLOCK_K, BLOCK_N))


@triton.jit
def row_tile(rows, depth, deep, EVEN_K: tl.constexpr):
    """The next BLOCK_K inputs of rows, which have `deep` more; zeros beyond."""
    if EVEN_K:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=(depth < deep)[None, :], other=0.0)


@triton.jit
def matrix_tile(matrix, depth, across, deep, wide, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr):
    """The next BLOCK_K rows of a matrix, which goes on for `deep` rows and `wide` columns; zeros beyond."""
    if EVEN_K and EVEN_N:
        return tl.load(matrix)
    elif EVEN_N:
        return tl.load(matrix, mask=(depth < deep)[:, None], other=0.0)
    elif EVEN_K:
        return tl.load(matrix, mask=(across < wide)[None, :], other=0.0)
    else:
        return tl.load(matrix, mask=(depth < deep)[:, None] & (across < wide)[None, :], other=0.0)


@triton.jit
def outer_kernel(
    left,
    right,
    tokens,
    starts,
    counts,
    out,
    groups,
    M,
    OUT,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[group] = left[rows].T @ right[rows] over the rows of a group; (R, M), (R, O) -> (E, M, O).

    A gathered side is read at `tokens[row]`. Groups without rows get zeros.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(OUT, BLOCK_N)
    each = tiles_m * tiles_n
    for tile in range(tl.program_id(0), groups * each, tl.num_programs(0)):
        group = tile // each
        m, n = place(tile % each, tiles_m, tiles_n, GROUP_M)  # type: ignore[misc]  # a tuple
        start = tl.load(starts + group)
        size = tl.load(counts + group).to(tl.int32)
        line = m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        left_tile = depth[:, None] * M + line[None, :]
        right_tile = depth[:, None] * OUT + column[None, :]
        # Where to read is known one step ahead: a copy that waits for its address would cost a stage of the pipeline.
        if GATHER_LEFT or GATHER_RIGHT:
            source = tl.load(tokens + start + depth, mask=depth < size, other=0)
        for k in range(0, size, BLOCK_K):
            own = depth < size - k
            left_mask = own[:, None] if EVEN_M else own[:, None] & (line < M)[None, :]
            right_mask = own[:, None] if EVEN_N else own[:, None] & (column < OUT)[None, :]
            if GATHER_LEFT:
                a = tl.load(left + source[:, None] * M + line[None, :], mask=left_mask, other=0.0)
            else:
                a = tl.load(left + (start + k) * M + left_tile, mask=left_mask, other=0.0)
            if GATHER_RIGHT:
                b = tl.load(right + source[:, None] * OUT + column[None, :], mask=right_mask, other=0.0)
            else:
                b = tl.load(right + (start + k) * OUT + right_tile, mask=right_mask, other=0.0)
            if GATHER_LEFT or GATHER_RIGHT:
                ahead = depth < size - k - BLOCK_K
                source = tl.load(tokens + start + k + BLOCK_K + depth, mask=ahead, other=0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        to = out + group.to(tl.int64) * M * OUT + line.to(tl.int64)[:, None] * OUT + column[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=(line < M)[:, None] & (column < OUT)[None, :])


def programs(tiles: int, per_sm: int, device: torch.device) -> int:
    """How many programs share the tiles: no more than run at once, so that each walks over several."""
    if device.type != "cuda":
        return min(tiles, 3)  # the interpreter: enough to see the walk
    return min(tiles, per_sm * torch.cuda.get_device_properties(device).multi_processor_count)


def launched(blocks: Blocks, **fixed: object) -> dict[str, Any]:
    """What a launch gets. AMD GPUs have 64 KiB of shared memory per program, and pipelines of two."""
    stages = min(blocks.stages, 2) if torch.version.hip else blocks.stages
    fixed |= {"UPCAST": INTERPRETED, "GROUP_M": GROUP_M, "num_warps": blocks.warps, "num_stages": stages}
    return fixed | blocks.constants()


def addressable(*tensors: Tensor) -> bool:
    """Whether TMA can copy tiles of them: rows of whole 16 bytes, and not none."""
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[-1] * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


def box(blocks: Blocks, *, transposed: bool) -> list[int]:
    """The tile of one matrix that TMA copies."""
    return [1, blocks.n, blocks.k] if transposed else [1, blocks.k, blocks.n]


def tiles_across(size: int, block: int) -> int:
    return -(-size // block)


def product(rows: Tensor, weights: Tensor, tiles: Tiles, blocks: Blocks, *, transposed: bool) -> Tensor:
    """(N, K) and (E, O, K) where transposed, else (E, K, O) -> (N, O)."""
    inputs, outputs = rows.shape[1], weights.shape[1 if transposed else 2]
    out = rows.new_empty(rows.shape[0], outputs)
    grid = (programs(tiles.limit * tiles_across(outputs, blocks.n), blocks.per_sm, rows.device),)
    tma = blocks.tma and addressable(rows, weights)
    product_kernel[grid](
        TensorDescriptor.from_tensor(rows, [blocks.m, blocks.k]) if tma else rows,
        TensorDescriptor.from_tensor(weights, box(blocks, transposed=transposed)) if tma else weights,
        tiles.table,
        tiles.used,
        out,
        tiles.limit,
        inputs,
        outputs,
        **launched(
            blocks,
            TRANSPOSED=transposed,
            TMA=tma,
            EVEN_K=inputs % blocks.k == 0,
            EVEN_N=outputs % blocks.n == 0,
        ),
    )
    return out


def outer(
    left: Tensor,
    right: Tensor,
    tokens: Tensor | None,
    counts: Tensor,
    starts: Tensor,
    blocks: Blocks,
    *,
    gather: str = "",
) -> Tensor:
    """Per group, left rows transposed times right rows: (E, M, O). `gather`: the side that is read through `tokens`."""
    groups, height, width = counts.shape[0], left.shape[1], right.shape[1]
    out = left.new_empty(groups, height, width)
    count = groups * tiles_across(height, blocks.m) * tiles_across(width, blocks.n)
    grid = (programs(count, blocks.per_sm, left.device),)
    outer_kernel[grid](
        left,
        right,
        starts if tokens is None else tokens,
        starts,
        counts,
        out,
        groups,
        height,
        width,
        **launched(
            blocks,
            GATHER_LEFT=tokens is not None and gather == "left",
            GATHER_RIGHT=tokens is not None and gather == "right",
            EVEN_M=height % blocks.m == 0,
            EVEN_N=width % blocks.n == 0,
        ),
    )
    return out
