"""Gradients of the rows of a table that tokens read through slots: `grad[n]` sums over the reads of row n.

The reads are sorted by row (stable, so those of one row stay in the order of tokens), and each touched row is summed
alone, in that order, in fp32 or better: no atomics, equal inputs give equal bits. What sorts and sums knows neither
what the table is for nor what was computed from its rows.

Dims: T tokens, S slots per token, R = T * S reads, N rows of the table, D width, U touched rows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, Engine, engine
from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.pages import ask_for_large_pages


@torch.library.custom_op("moesaic::row_sums", mutates_args=())
def _row_sums(
    slots: Tensor,
    sources: list[Tensor],
    coefficients: list[Tensor],
    num_rows: int,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    ready = _prepare(sources, coefficients, dtype)
    chosen = engine(backend, *ready[0])
    order, keys = _sort(slots, num_rows, chosen)
    results = []
    for source, factors in ready:
        # rows that nothing reads are written by no one
        out = source.new_zeros(num_rows, source.shape[1], dtype=_stored(source, dtype, chosen))
        results.append(_sum_runs(source, factors, order, keys, out, chosen).to(dtype))
    return results


@_row_sums.register_fake
def _(
    slots: Tensor,
    sources: list[Tensor],
    coefficients: list[Tensor],
    num_rows: int,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return [source.new_empty(num_rows, source.shape[1], dtype=dtype) for source in sources]


def row_sums(
    slots: Int[Tensor, "T S"],
    sources: list[Tensor],
    coefficients: list[Tensor],
    num_rows: int,
    *,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> list[Tensor]:
    """Per source (T, D) and coefficients (T, S): `out[n]`, the sum of `coefficients[t, s] * source[t]` over the reads
    `slots[t, s] == n`, as (N, D); zeros where nothing reads. One sort serves all sources. No host synchronisation."""
    return _row_sums(slots, sources, coefficients, num_rows, dtype, backend)


def touched_row_sums(
    slots: Int[Tensor, "T S"],
    sources: list[Tensor],
    coefficients: list[Tensor],
    num_rows: int,
    *,
    dtype: torch.dtype,
    backend: Backend = "auto",
) -> list[Tensor]:
    """`row_sums` as coalesced sparse tensors (N, D) that hold the touched rows only: their cost does not depend on N.

    U depends on the data: on an accelerator the host waits for it, and nothing of this can be compiled.
    """
    ready = _prepare(sources, coefficients, dtype)
    chosen = engine(backend, *ready[0])
    order, keys = _sort(slots, num_rows, chosen)
    rows = torch.unique_consecutive(keys)  # the host waits here
    begins = torch.ones_like(keys)
    begins[1:] = keys[1:] != keys[:-1]
    ranks = begins.cumsum(0).sub_(1)  # of each read's row among the touched ones
    results = []
    for source, factors in ready:
        shape = (num_rows, source.shape[1])
        out = source.new_empty(rows.shape[0], shape[1], dtype=_stored(source, dtype, chosen))
        ask_for_large_pages(out)
        values = _sum_runs(source, factors, order, ranks, out, chosen).to(dtype)
        # sorted and unique, by construction
        results.append(
            torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
        )
    return results


def _prepare(
    sources: list[Tensor], coefficients: list[Tensor], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Pairs in types that every engine takes: sums are formed in the coefficients' type."""
    total = accumulation_dtype(dtype)
    return [
        (s.to(torch.promote_types(s.dtype, dtype)).contiguous(), c.to(total).contiguous())
        for s, c in zip(sources, coefficients, strict=True)
    ]


def _stored(source: Tensor, dtype: torch.dtype, chosen: Engine) -> torch.dtype:
    """What an engine writes: the C++ code knows one type at a time."""
    return source.dtype if chosen == "cpp" else dtype


def _sort(
    slots: Int[Tensor, "T S"], num_rows: int, chosen: Engine
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
    """The reads, stably sorted by row, and the row of each."""
    flat = slots.flatten()
    if chosen == "cpp":
        order, keys = torch.empty_like(flat), torch.empty_like(flat)
        native.run("sort_slots", torch.float32, flat.contiguous(), order, keys, flat.shape[0], num_rows)
        return order, keys
    if num_rows < 2**31:
        flat = flat.to(torch.int32)  # half the passes of a radix sort
    keys, order = flat.sort(stable=True)
    return order, keys.to(torch.int64)


def _sum_runs(
    source: Float[Tensor, "T D"],
    coefficients: Float[Tensor, "T S"],
    order: Int[Tensor, " R"],
    keys: Int[Tensor, " R"],
    out: Float[Tensor, "M D"],
    chosen: Engine,
) -> Tensor:
    """Write into `out[k]` the sum over the reads with key k; keys are sorted. Other rows stay as they are or get zeros.

    A read is a place in `coefficients`, and reads the row of `source` that is its token.
    """
    if not keys.shape[0]:
        return out
    per_token = coefficients.shape[1]
    if chosen == "triton":
        from moesaic.kernels.triton.reverse_index import sum_runs

        sum_runs(source, coefficients, order, keys, out)
    elif chosen == "cpp":
        tensors = (source, coefficients, order, keys, out)
        native.run("sum_runs", source.dtype, *tensors, keys.shape[0], per_token, source.shape[1])
    else:
        total = coefficients.dtype
        parts = source.index_select(0, order // per_token).to(total)  # (R, D)
        parts *= coefficients.flatten().index_select(0, order)[:, None]
        bounds = torch.arange(out.shape[0] + 1, device=keys.device)
        offsets = torch.searchsorted(keys, bounds)
        # initial=0 also fills rows that nothing reads
        out.copy_(torch.segment_reduce(parts, "sum", offsets=offsets, axis=0, initial=0))
    return out
