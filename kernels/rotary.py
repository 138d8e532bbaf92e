"""Rotary position embedding (arXiv:2104.09864) of a fused projection's heads, with their normalisation before it.

Neighbouring channels form the pairs that turn. In torch a complex product rotates: one pass over memory, with an exact
transpose as its gradient. The CPU kernel normalises, rotates and splits in one pass, each way.

Dims: B sequences, S positions, H query heads, J key-value heads, C channels of a head, P = C / 2 pairs.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native
from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.rms_norm import rms_norm


class _NormedRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        turns: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        kv_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, turns = heads.contiguous(), torch.view_as_real(turns).contiguous()
        batch, length, total, channels = heads.shape
        query_heads = total - 2 * kv_heads
        queries = heads.new_empty(batch, length, query_heads, channels)
        keys, values = (heads.new_empty(batch, length, kv_heads, channels) for _ in range(2))
        inverse = None if query_weight is None else heads.new_empty(batch, length, query_heads + kv_heads)
        tensors = (heads, turns, query_weight, key_weight, queries, keys, values, inverse)
        sizes = (batch * length, length, query_heads, kv_heads, channels)
        native.run("rotary_forward", heads.dtype, *tensors, *sizes, eps)
        ctx.save_for_backward(heads, turns, query_weight, key_weight, inverse)
        ctx.sizes = sizes
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        heads, turns, query_weight, key_weight, inverse = ctx.saved_tensors
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        strides = torch.tensor([grad.stride()[:3] for grad in grads])
        blocks, channels = native.blocks(ctx.sizes[0]), heads.shape[-1]
        grad_heads, grad_weights = torch.empty_like(heads), heads.new_empty(2, channels)
        work = (heads.new_empty(blocks, 2, channels), heads.new_empty(blocks, channels))
        pointers = [ctypes.c_void_p(grad.data_ptr()) for grad in grads]
        tensors = (strides, heads, turns, query_weight, key_weight, inverse, grad_heads, grad_weights, *work)
        native.run("rotary_backward", heads.dtype, *pointers, *tensors, *ctx.sizes)
        of_weights = (None, None) if query_weight is None else grad_weights.unbind()
        return grad_heads, None, *of_weights, None, None


def normed_rotary(
    heads: Float[Tensor, "B S H2J C"],
    turns: Complex[Tensor, "S 1 P"],
    kv_heads: int,
    *,
    query_weight: Float[Tensor, " C"] | None = None,
    key_weight: Float[Tensor, " C"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B S H C"], Float[Tensor, "B S J C"], Float[Tensor, "B S J C"]]:
    """Split (queries, keys, values); normalise queries and keys where weights are given; turn them by position.

    `turns` are unit complex numbers per position and channel pair. Computes in fp32 or better.
    """
    if native.serves(heads, query_weight, key_weight) and turns.dtype == heads.dtype.to_complex():
        query_weight, key_weight = (None if w is None else w.contiguous() for w in (query_weight, key_weight))
        return _NormedRotary.apply(heads, turns, query_weight, key_weight, kv_heads, eps)  # type: ignore[no-any-return]
    q, k, v = heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    if query_weight is not None and key_weight is not None:
        q, k = rms_norm(q, query_weight, eps), rms_norm(k, key_weight, eps)
    return rotate(q, turns), rotate(k, turns), v


def rotate(x: Float[Tensor, "B S H C"], turns: Complex[Tensor, "S 1 P"]) -> Float[Tensor, "B S H C"]:
    """Turn each channel pair by its position's angle, in fp32 or better."""
    pairs = torch.view_as_complex(x.to(accumulation_dtype(x.dtype)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
