"""Weighted sums of the rows of a large table, picked by each token: the read of a memory layer.

No product is shared between tokens, so the speed is that of memory: rows are read where they lie and never copied. The
backward pass reads them once more, for the weights' gradient; see `reverse_index` for the table's.

Dims: T tokens, S slots per token, N rows of the table, D width.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, engine
from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.reverse_index import row_sums, touched_row_sums


def weighted_bag(
    table: Float[Tensor, "N D"],
    slots: Int[Tensor, "T S"],
    weights: Float[Tensor, "T S"],
    *,
    sparse_grad: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum of weights[t, s] * table[slots[t, s]]`, in the table's type, summed in fp32 or better in order of s.

    A slot that occurs twice counts twice. The table's gradient is dense, (N, D), or with `sparse_grad` a coalesced
    sparse tensor of the rows that were read, whose cost does not depend on N. That path cannot be compiled, and on an
    accelerator its backward pass waits for the number of rows. Slots are int64 in 0 to N - 1: others raise IndexError
    on CPUs and are not looked for on GPUs. Raises ValueError where shapes do not fit.
    Source: the sum over slots of arXiv:1907.05242, section 3.1; the reverse index of arXiv:2412.09764.
    """
    check_table("weighted_bag", table, slots, weights)
    if sparse_grad:
        return _SparseBag.apply(table, slots, weights, backend)  # type: ignore[no-any-return]
    return _weighted_bag(table, slots, weights, backend)


def gather_sums(
    table: Float[Tensor, "N D"],
    slots: Int[Tensor, "T S"],
    weights: Float[Tensor, "T S"],
    *,
    dtype: torch.dtype,
    backend: str,
) -> Float[Tensor, "T D"]:
    """The sums of `weighted_bag`, without autograd, in `dtype`."""
    total = accumulation_dtype(table.dtype)
    weights = weights.to(total).contiguous()
    tokens, per_token = slots.shape
    chosen = engine(backend, table, weights)
    if chosen == "triton":
        from moesaic.kernels.triton.embedding_bag import bag_sums

        return bag_sums(table.contiguous(), slots.contiguous(), weights, dtype)
    if chosen == "cpp":
        out = table.new_empty(tokens, table.shape[1])
        tensors = (table.contiguous(), slots.contiguous(), weights, out)
        native.run("bag_sums", table.dtype, *tensors, tokens, per_token, table.shape[1])
        return out.to(dtype)
    out = table.new_zeros(tokens, table.shape[1], dtype=total)
    for picks, scales in zip(slots.unbind(1), weights.unbind(1), strict=True):
        out.addcmul_(table.index_select(0, picks).to(total), scales[:, None])
    return out.to(dtype)


def gather_dots(
    table: Float[Tensor, "N D"],
    slots: Int[Tensor, "T S"],
    vectors: Float[Tensor, "T D"],
    *,
    backend: str,
) -> Float[Tensor, "T S"]:
    """`table[slots[t, s]] . vectors[t]`, without autograd, in the type in which sums are formed."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, table.dtype)).contiguous()
    total = accumulation_dtype(vectors.dtype)
    out = table.new_empty(slots.shape, dtype=total)
    chosen = engine(backend, table, vectors)
    if chosen == "triton":
        from moesaic.kernels.triton.embedding_bag import bag_dots

        bag_dots(table.contiguous(), slots.contiguous(), vectors, out)
    elif chosen == "cpp":
        tensors = (table.contiguous(), slots.contiguous(), vectors, out)
        native.run("bag_dots", table.dtype, *tensors, *slots.shape, table.shape[1])
    else:
        wide = vectors.to(total)
        for s, picks in enumerate(slots.unbind(1)):
            out[:, s] = (table.index_select(0, picks) * wide).sum(-1)
    return out


def check_table(op: str, table: Tensor, slots: Tensor, weights: Tensor) -> None:
    """What every read of a table asks of its arguments."""
    if table.ndim != 2 or slots.ndim != 2:
        raise ValueError(
            f"{op}: the table must be (N, D) and slots (T, S), not {(*table.shape,)} and {(*slots.shape,)}"
        )
    if slots.dtype != torch.int64:
        raise ValueError(f"{op}: slots must be int64, not {slots.dtype}")
    if weights.shape != slots.shape:
        raise ValueError(f"{op}: weights {(*weights.shape,)} must have the shape of slots {(*slots.shape,)}")


def check_slots(slots: Tensor, num_rows: int) -> None:
    """Raise IndexError for slots outside of a table; on CPUs only, as a GPU would have to be waited for."""
    if slots.device.type == "cpu" and slots.numel():
        low, high = slots.aminmax()
        if int(low) < 0 or int(high) >= num_rows:
            raise IndexError(f"slots are in {int(low)} to {int(high)}, and the table has {num_rows} rows")


@torch.library.custom_op("moesaic::weighted_bag", mutates_args=())
def _weighted_bag(table: Tensor, slots: Tensor, weights: Tensor, backend: str) -> Tensor:
    check_slots(slots, table.shape[0])
    return gather_sums(table, slots, weights, dtype=table.dtype, backend=backend)


@_weighted_bag.register_fake
def _(table: Tensor, slots: Tensor, weights: Tensor, backend: str) -> Tensor:
    return table.new_empty(slots.shape[0], table.shape[1])


@torch.library.custom_op("moesaic::weighted_bag_weights", mutates_args=())
def _weights_gradient(grad: Tensor, table: Tensor, slots: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return gather_dots(table, slots, grad, backend=backend).to(dtype)


@_weights_gradient.register_fake
def _(grad: Tensor, table: Tensor, slots: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return table.new_empty(slots.shape, dtype=dtype)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Backend], output: Tensor) -> None:
    table, slots, weights, ctx.backend = inputs
    ctx.save_for_backward(table, slots, weights)


def _backward(ctx: Any, grad: Tensor, *, sparse: bool = False) -> tuple[Tensor | None, ...]:
    table, slots, weights = ctx.saved_tensors
    grad_table = grad_weights = None
    if ctx.needs_input_grad[0]:
        sums = touched_row_sums if sparse else row_sums
        given = (slots, [grad], [weights], table.shape[0])
        (grad_table,) = sums(*given, dtype=table.dtype, backend=ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_weights = _weights_gradient(grad, table, slots, weights.dtype, ctx.backend)
    return grad_table, None, grad_weights, None


_weighted_bag.register_autograd(_backward, setup_context=_save)


class _SparseBag(torch.autograd.Function):
    """A custom op cannot return a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor, weights: Tensor, backend: Backend) -> Tensor:
        _save(ctx, (table, slots, weights, backend), table)
        return _weighted_bag(table, slots, weights, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, grads[0], sparse=True)
