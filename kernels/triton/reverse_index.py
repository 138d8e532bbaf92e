"""Sums over runs of equal keys: one program per read, of which only those that begin a run do anything.

How many runs there are is known to the device alone, so the grid is as large as they could be. A program adds the reads
of its run in order, a few at a time: a row that very many reads share takes as long as that.
"""

import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.variant import Variant

BLOCK_R = 8
"""Reads that are added at once. Runs are short where tables are large, and a few hot rows are what this is for."""
LARGEST_D = 256


@triton.jit
def _sum_runs(
    source,
    coefficients,
    order,
    keys,
    out,
    reads,
    per_token,
    dim,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64)
    key = tl.load(keys + begin)
    before = tl.load(keys + begin - 1, mask=begin > 0, other=-1)
    if key != before:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = d < dim
        total = tl.zeros((BLOCK_R, BLOCK_D), coefficients.dtype.element_ty)
        going = begin >= 0  # true
        while going:
            r = begin + tl.arange(0, BLOCK_R)
            mine = tl.load(keys + r, mask=r < reads, other=-1) == key
            read = tl.load(order + r, mask=mine, other=0)
            factor = tl.load(coefficients + read, mask=mine, other=0.0)
            places = source + (read // per_token)[:, None] * dim + d[None, :]
            rows = tl.load(places, mask=mine[:, None] & inside[None, :], other=0.0)
            total += factor[:, None] * rows.to(total.dtype)
            begin += BLOCK_R
            going = tl.sum(mine.to(tl.int32)) == BLOCK_R
        tl.store(out + key * dim + d, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@on_its_device
def sum_runs(source: Tensor, coefficients: Tensor, order: Tensor, keys: Tensor, out: Tensor) -> None:
    """Write into `out[k]` the sum of `coefficients[r] * source[token of r]` over the reads r with key k."""
    reads, dim = keys.shape[0], source.shape[1]
    block = block_d(dim)
    if reads and dim:
        _sum_runs[(reads, triton.cdiv(dim, block))](
            source,
            coefficients,
            order,
            keys,
            out,
            reads,
            coefficients.shape[1],
            dim,
            BLOCK_R=BLOCK_R,
            BLOCK_D=block,
            num_warps=warps(block),  # type: ignore[call-arg]  # read by the launcher
        )


def block_d(dim: int) -> int:
    """Columns of one program."""
    return min(max(1 << (dim - 1).bit_length(), 16), LARGEST_D)


def warps(block: int) -> int:
    """As many as keep the values per thread alike."""
    return max(1, block // 64)


def variants() -> list[Variant]:
    """For wide and narrow tables, in the types that training uses."""
    found = []
    for kind, (source, total, out) in TYPES.items():
        for block in (64, LARGEST_D):
            signature = {
                "source": f"*{source}",
                "coefficients": f"*{total}",
                "order": "*i64",
                "keys": "*i64",
                "out": f"*{out}",
                "reads": "i32",
                "per_token": "i32",
                "dim": "i32",
            }
            constants = {"BLOCK_R": BLOCK_R, "BLOCK_D": block}
            name = f"sum_runs_{kind}_d{block}"
            found.append(
                Variant(name, _sum_runs, signature, constants, warps=warps(block), aligned=frozenset({"dim"}))
            )
    return found


TYPES = {
    "bf16": ("bf16", "fp32", "bf16"),
    "fp32": ("fp32", "fp32", "fp32"),
}
"""What is read, what is summed in, what is written."""
