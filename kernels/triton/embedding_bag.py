"""Weighted sums of rows of a table, and dot products with them: one program per token, a few rows in flight at a time.

Memory bound: a program keeps one tile of rows in registers and adds into it, so that loads follow each other without
waiting for a reduction; the tile is reduced once at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.reverse_index import LARGEST_D, TYPES, block_d, warps
from moesaic.kernels.triton.variant import Variant

BLOCK_S = 16
"""Rows of one tile."""


@triton.jit
def _bag_sums(table, slots, weights, out, per_token, dim, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < dim
    total = tl.zeros((BLOCK_S, BLOCK_D), weights.dtype.element_ty)
    for first in range(0, per_token, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        slot = tl.load(slots + t * per_token + s, mask=s < per_token, other=0)
        weight = tl.load(weights + t * per_token + s, mask=s < per_token, other=0.0)
        mask = (s < per_token)[:, None] & inside[None, :]
        rows = tl.load(table + slot[:, None] * dim + d[None, :], mask=mask, other=0.0)
        total += weight[:, None] * rows.to(total.dtype)
    tl.store(out + t * dim + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bag_dots(table, slots, vectors, out, per_token, dim, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    slot = tl.load(slots + t * per_token + s, mask=s < per_token, other=0)
    total = tl.zeros((BLOCK_S, BLOCK_D), out.dtype.element_ty)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        vector = tl.load(vectors + t * dim + d, mask=d < dim, other=0.0).to(total.dtype)
        mask = (s < per_token)[:, None] & (d < dim)[None, :]
        rows = tl.load(table + slot[:, None] * dim + d[None, :], mask=mask, other=0.0)
        total += rows.to(total.dtype) * vector[None, :]
    tl.store(out + t * per_token + s, tl.sum(total, 1), mask=s < per_token)


@on_its_device
def bag_sums(table: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`out[t] = sum of weights[t, s] * table[slots[t, s]]`; sums are formed in the weights' type."""
    (tokens, per_token), dim = slots.shape, table.shape[1]
    out = table.new_empty(tokens, dim, dtype=dtype)
    block = block_d(dim)
    if tokens and dim:
        grid = (tokens, triton.cdiv(dim, block))
        _bag_sums[grid](
            table,
            slots,
            weights,
            out,
            per_token,
            dim,
            BLOCK_S=BLOCK_S,
            BLOCK_D=block,
            num_warps=warps(block),  # type: ignore[call-arg]  # read by the launcher
        )
    return out


@on_its_device
def bag_dots(table: Tensor, slots: Tensor, vectors: Tensor, out: Tensor) -> None:
    """Write `out[t, s] = table[slots[t, s]] . vectors[t]`, formed in the type of `out`."""
    (tokens, per_token), dim = slots.shape, table.shape[1]
    if tokens and per_token:
        grid = (tokens, triton.cdiv(per_token, BLOCK_S))
        block = block_d(dim)
        _bag_dots[grid](
            table,
            slots,
            vectors,
            out,
            per_token,
            dim,
            BLOCK_S=BLOCK_S,
            BLOCK_D=block,
            num_warps=warps(block),  # type: ignore[call-arg]  # read by the launcher
        )


def variants() -> list[Variant]:
    """For wide and narrow tables, in the types that training uses; mixed: tokens in bf16 and tables in fp32."""
    found = []
    for kind, (table, total, out) in (TYPES | {"mixed": ("fp32", "fp32", "bf16")}).items():
        for block in (64, LARGEST_D):
            constants = {"BLOCK_S": BLOCK_S, "BLOCK_D": block}
            sizes = {"per_token": "i32", "dim": "i32"}
            start = {"table": f"*{table}", "slots": "*i64"}
            sums = start | {"weights": f"*{total}", "out": f"*{out}"} | sizes
            dots = start | {"vectors": f"*{table}", "out": f"*{total}"} | sizes
            for name, kernel, signature in (("sums", _bag_sums, sums), ("dots", _bag_dots, dots)):
                if (kind, name) == ("mixed", "dots"):
                    continue  # vectors are widened first
                aligned = frozenset({"per_token", "dim"})
                name = f"bag_{name}_{kind}_d{block}"
                found.append(Variant(name, kernel, signature, constants, warps=warps(block), aligned=aligned))
    return found
