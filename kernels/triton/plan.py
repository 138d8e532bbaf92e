"""A stable counting sort of assignments by expert, in three steps without host synchronisation.

A program ranks the assignments of one block: how many of the same expert stand before. The last one of an expert knows
how many there are in the block. A prefix sum over (expert, block) makes rows of them, and a second pass places.

Dims: R assignments, E experts, B blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.variant import Variant

BLOCK, CHUNK, WARPS = 256, 16, 8
"""Assignments of a program, and with how many of them each is compared at a time."""
MOST_EXPERTS = 1024
"""The table of blocks has E / 256 numbers per assignment: beyond this torch's stable sort is the better one."""


@triton.jit
def _rank(
    experts,  # (R,)
    ranks,  # (R,): how many of the same expert stand before, within the block
    table,  # (E, B), zero: how often each expert occurs in each block
    R,
    B,
    E,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    own = block * BLOCK + place
    expert = tl.load(experts + own, mask=own < R, other=-1)
    known = (own < R) & (expert >= 0) & (expert < E)
    narrow = tl.where(known, expert, -1).to(tl.int32)
    near = tl.zeros(
        (BLOCK, CHUNK), tl.int32
    )  # how many of the same expert: 1 for each before, 2^16 for each after
    for start in range(0, BLOCK, CHUNK):
        there = start + tl.arange(0, CHUNK)
        other = tl.load(experts + block * BLOCK + there, mask=block * BLOCK + there < R, other=-1).to(
            tl.int32
        )
        side = tl.where(
            there[None, :] < place[:, None], 1, tl.where(there[None, :] > place[:, None], 65536, 0)
        )
        near += tl.where(narrow[:, None] == other[None, :], side, 0)
    total = tl.sum(near, axis=1)
    before = total & 65535
    tl.store(ranks + own, before, mask=own < R)
    tl.store(table + expert * B + block, before + 1, mask=known & (total < 65536))


@triton.jit
def _place(
    experts,  # (R,)
    tokens,  # (R,), or anything where assignments are regular
    ranks,  # (R,)
    ends,  # (E, B): running sum of the table
    counts,  # (E,)
    by_row,  # (R,)
    order,  # (R,)
    where,  # (R,)
    R,
    B,
    E,
    width,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    own = block * BLOCK + tl.arange(0, BLOCK)
    inside = own < R
    expert = tl.load(experts + own, mask=inside, other=0)
    cell = expert * B + block
    # ids that are no expert go somewhere within the rows
    known = inside & (cell > 0) & (expert < E)
    row = tl.load(ends + cell - 1, mask=known, other=0) + tl.load(ranks + own, mask=inside, other=0)
    row = row.to(tl.int64)
    token = tl.load(tokens + own, mask=inside, other=0) if RAGGED else own.to(tl.int32) // width
    tl.store(where + own, row, mask=inside)
    tl.store(order + row, own, mask=inside)
    tl.store(by_row + row, token.to(tl.int64), mask=inside)
    for start in range(block * BLOCK, E, B * BLOCK):  # the programs share the experts
        e = start + tl.arange(0, BLOCK)
        end = tl.load(ends + (e + 1).to(tl.int64) * B - 1, mask=e < E, other=0)
        begin = tl.load(ends + e.to(tl.int64) * B - 1, mask=(e < E) & (e > 0), other=0)
        tl.store(counts + e, (end - begin).to(tl.int64), mask=e < E)


def serves(experts: Tensor, num_experts: int) -> bool:
    """Whether the sort is made for these sizes; ranks and ends are 32-bit."""
    return num_experts <= MOST_EXPERTS and experts.shape[0] < 2**31 - BLOCK


@on_its_device
def sort(
    experts: Tensor, tokens: Tensor | None, width: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts, and of each row token and assignment, and the row of each assignment."""
    rows = experts.shape[0]
    if rows == 0:
        nothing = [experts.new_empty(0, dtype=torch.int64) for _ in range(3)]
        return experts.new_zeros(num_experts), nothing[0], nothing[1], nothing[2]
    blocks = -(-rows // BLOCK)
    experts = experts.contiguous()
    ranks = torch.empty_like(experts, dtype=torch.int32)
    table = experts.new_zeros(num_experts * blocks, dtype=torch.int32)
    _rank[(blocks,)](
        experts,
        ranks,
        table,
        rows,
        blocks,
        num_experts,
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        num_warps=WARPS,  # type: ignore[call-arg]  # of the launcher
    )
    ends = table.cumsum(0, dtype=torch.int32)
    counts = experts.new_empty(num_experts)
    by_row, order, where = (torch.empty_like(experts, dtype=torch.int64) for _ in range(3))
    given = experts if tokens is None else tokens.contiguous()
    _place[(blocks,)](
        experts,
        given,
        ranks,
        ends,
        counts,
        by_row,
        order,
        where,
        rows,
        blocks,
        num_experts,
        width,
        RAGGED=tokens is not None,
        BLOCK=BLOCK,
        num_warps=WARPS,  # type: ignore[call-arg]  # of the launcher
    )
    return counts, by_row, order, where


def variants() -> list[Variant]:
    """Every size runs the same constants."""
    sizes = {"R": "i32", "B": "i32", "E": "i32"}
    rank = Variant(
        name="plan_rank",
        kernel=_rank,
        signature={"experts": "*i64", "ranks": "*i32", "table": "*i32", **sizes},
        constants={"BLOCK": BLOCK, "CHUNK": CHUNK},
        warps=WARPS,
    )
    pointers = dict.fromkeys(("experts", "tokens", "counts", "by_row", "order", "where"), "*i64")
    place = [
        Variant(
            name=f"plan_place_{'ragged' if ragged else 'regular'}",
            kernel=_place,
            signature={**pointers, "ranks": "*i32", "ends": "*i32", **sizes, "width": "i32"},
            constants={"RAGGED": ragged, "BLOCK": BLOCK},
            warps=WARPS,
        )
        for ragged in (False, True)
    ]
    return [rank, *place]
