"""Copy tokens to rows, and add weighted rows back to tokens: each is the other's gradient.

Sums run in a fixed order, without atomics, in fp32 or better, so equal inputs give equal bits on every device. Rows of
a token are found through CSR offsets; where every token has the same number of rows a reshape replaces them.

Dims: T tokens, R rows, D width, K rows per token.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, engine


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of `dtype` are summed: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def sum_rows(
    rows: Float[Tensor, "R D"],
    where: Int[Tensor, " R"],
    offsets: Int[Tensor, " T1"],
    weights: Float[Tensor, " R"] | None = None,
    *,
    per_token: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum of weights[a] * rows[where[a]]` over the assignments a in `offsets[t]:offsets[t + 1]`.

    `weights` and `where` follow the assignments, which are sorted by token. Tokens without assignments get zeros.
    """
    kernels = _triton(backend, rows)
    if kernels is not None:
        if offsets.shape[0] == 1:
            return torch.zeros_like(rows[:0])
        scales = None if weights is None else weights.contiguous()
        return kernels.combine(rows.contiguous(), where, offsets, scales, per_token)
    if backend == "auto" and native.serves(rows, weights):
        tokens, dim = offsets.shape[0] - 1, rows.shape[1]
        out = rows.new_empty(tokens, dim)
        scales = None if weights is None else weights.contiguous()
        native.run("sum_rows", rows.dtype, rows.contiguous(), where, offsets, scales, out, tokens, dim)
        return out
    total = accumulation_dtype(rows.dtype)
    if per_token is not None:
        picks = where.unflatten(0, (-1, per_token)).unbind(1)  # K of (T,)
        out = rows.index_select(0, picks[0]).to(total)
        if weights is None:
            for pick in picks[1:]:
                out.add_(rows.index_select(0, pick))
            return out.to(rows.dtype)
        scales = weights.to(total).unflatten(0, (-1, per_token)).unsqueeze(-1).unbind(1)  # K of (T, 1)
        out.mul_(scales[0])
        for pick, scale in zip(picks[1:], scales[1:], strict=True):
            out.addcmul_(rows.index_select(0, pick), scale)
        return out.to(rows.dtype)
    picked = rows.index_select(0, where).to(total)
    if weights is not None:
        picked = picked * weights.to(total)[:, None]
    # initial=0 also fills tokens without rows
    return torch.segment_reduce(picked, "sum", offsets=offsets, axis=0, initial=0).to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tokens: Tensor,
        where: Tensor,
        offsets: Tensor,
        per_token: int | None,
        backend: Backend,
    ) -> Tensor:
        ctx.save_for_backward(where, offsets)
        ctx.per_token, ctx.backend = per_token, backend
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        where, offsets = ctx.saved_tensors
        given = {"per_token": ctx.per_token, "backend": ctx.backend}
        return sum_rows(grads[0], where, offsets, **given), None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weights: Tensor,
        csr: tuple[Tensor, Tensor, Tensor],
        per_token: int | None,
        backend: Backend,
    ) -> Tensor:
        tokens, where, offsets = csr
        ctx.backend = backend
        ctx.save_for_backward(rows, weights, tokens, where, offsets)
        return sum_rows(rows, where, offsets, weights, per_token=per_token, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weights, tokens, where, offsets = ctx.saved_tensors
        kernels = _triton(ctx.backend, rows)
        if kernels is not None:
            grad, rows, weights = grads[0].contiguous(), rows.contiguous(), weights.contiguous()
            if not rows.shape[0]:
                return torch.zeros_like(rows), torch.zeros_like(weights), None, None, None
            return *kernels.combine_gradients(grad, rows, weights, tokens, where), None, None, None
        if ctx.backend == "auto" and native.serves(grads[0], rows, weights):
            grad, rows, weights = grads[0].contiguous(), rows.contiguous(), weights.contiguous()
            grad_rows, grad_weights = torch.empty_like(rows), torch.empty_like(weights)
            tensors = (grad, rows, where, offsets, weights, grad_rows, grad_weights)
            native.run("combine_backward", rows.dtype, *tensors, *grad.shape)
            return grad_rows, grad_weights, None, None, None
        total = accumulation_dtype(rows.dtype)
        grad_rows = grads[0].index_select(0, tokens).to(total)  # (R, D)
        grad_weights = (grad_rows * rows).sum(-1).index_select(0, where).to(weights.dtype)
        row_weights = torch.empty_like(weights, dtype=total).index_copy_(0, where, weights.to(total))
        return grad_rows.mul_(row_weights[:, None]).to(rows.dtype), grad_weights, None, None, None


def gather_rows(
    x: Float[Tensor, "T D"],
    tokens: Int[Tensor, " R"],
    where: Int[Tensor, " R"],
    offsets: Int[Tensor, " T1"],
    *,
    per_token: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "R D"]:
    """`rows[r] = x[tokens[r]]`, with a gradient that sums the rows of a token in a fixed order.

    `where` and `offsets` are the CSR form of `tokens`: `tokens[where[offsets[t]:offsets[t + 1]]] == t`.
    """
    return _Gather.apply(x, tokens, where, offsets, per_token, backend)  # type: ignore[no-any-return]


def combine_rows(
    rows: Float[Tensor, "R D"],
    weights: Float[Tensor, " R"],
    tokens: Int[Tensor, " R"],
    where: Int[Tensor, " R"],
    offsets: Int[Tensor, " T1"],
    *,
    per_token: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum of weights[a] * rows[where[a]]`, differentiable in rows and weights. See `sum_rows`."""
    return _Combine.apply(rows, weights, (tokens, where, offsets), per_token, backend)  # type: ignore[no-any-return]


def _triton(backend: Backend, rows: Tensor) -> Any:
    """The GPU's kernels, where they serve these rows."""
    if torch.compiler.is_compiling() or engine(backend, rows) != "triton" or rows.dtype == torch.float64:
        return None
    from moesaic.kernels.triton import combine  # triton is optional

    return combine
