"""Matrix products of consecutive groups of rows, each group with a matrix of its own.

Knows nothing of tokens, routing or devices' number: rows come sorted by group, `counts` says how many each has.
The reference runs in every dtype, float64 included, allocates exact rows (the library's `grouped_mm` leaves rows beyond
the last offset uninitialised) and asks for no alignment. The CPU kernel runs the groups' products side by side, each on
one thread.

Dims: N rows, M groups, I inputs, O outputs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.backend import Backend
from moesaic.kernels.library import library_outer, library_product, library_serves


def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor, backend: Backend = "auto") -> Tensor:
    """The values of `grouped_linear`, without autograd."""
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    gemm = native.gemm(rows.dtype) if backend == "auto" and native.serves(rows, weights) else None
    if gemm is not None:
        groups, outputs, inputs = weights.shape
        transposed = not weights.is_contiguous()
        stored = weights.transpose(1, 2).contiguous() if transposed else weights
        tensors = (rows.contiguous(), stored, counts, out)
        native.run("grouped_linear", rows.dtype, gemm, *tensors, groups, inputs, outputs, int(transposed))
        return out
    if library_serves(rows, weights):
        return library_product(rows.contiguous(), weights.transpose(1, 2), counts, backend)
    sizes = counts.tolist()  # on an accelerator the host waits here
    for size, part, matrix, into in zip(
        sizes, rows.split(sizes), weights.transpose(1, 2).unbind(), out.split(sizes), strict=True
    ):
        if size:
            torch.mm(part, matrix, out=into)
    return out


def grouped_outer(left: Tensor, right: Tensor, counts: Tensor, backend: Backend = "auto") -> Tensor:
    """Per group, the transposed left rows times the right rows: (N, O), (N, I) -> (M, O, I)."""
    out = left.new_empty(counts.shape[0], left.shape[1], right.shape[1])
    gemm = native.gemm(left.dtype) if backend == "auto" and native.serves(left, right) else None
    if gemm is not None:
        tensors = (left.contiguous(), right.contiguous(), counts, out)
        native.run("grouped_outer", left.dtype, gemm, *tensors, *out.shape)
        return out
    if library_serves(left, right):
        return library_outer(left.contiguous(), right.contiguous(), counts, backend)
    sizes = counts.tolist()  # on an accelerator the host waits here
    for size, one, other, into in zip(
        sizes, left.split(sizes), right.split(sizes), out.unbind(), strict=True
    ):
        if size:
            torch.mm(one.T, other, out=into)
        else:
            into.zero_()
    return out


@torch.library.custom_op("moesaic::grouped_linear", mutates_args=())
def _grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor, backend: str) -> Tensor:
    return grouped_product(rows, weights, counts, backend)  # type: ignore[arg-type]  # plain strings in custom ops


@_grouped_linear.register_fake
def _(rows: Tensor, weights: Tensor, counts: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


@torch.library.custom_op("moesaic::grouped_outer", mutates_args=())
def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor, backend: str) -> Tensor:
    return grouped_outer(left, right, counts, backend)  # type: ignore[arg-type]


@_grouped_outer.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor, backend: str) -> Tensor:
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    rows, weights, counts = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_rows = _grouped_linear(grad, weights.transpose(-2, -1), counts, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_weights = _grouped_outer(grad, rows, counts, ctx.backend)
    return grad_rows, grad_weights, None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)


def grouped_linear(
    rows: Float[Tensor, "N I"],
    weights: Float[Tensor, "M O I"],
    counts: Int[Tensor, " M"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "N O"]:
    """Multiply the first `counts[0]` rows by `weights[0].T`, the next `counts[1]` by `weights[1].T`, and so on.

    `counts` must sum to N; a group may be empty and then gets a zero gradient. Rows and weights share one dtype.
    """
    return _grouped_linear(rows, weights, counts, backend)
