"""`silu(gate) * up` on a tensor that holds both, with a gradient that keeps only its input.

Dims: N rows, F hidden width; gates are the first F columns.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        if native.serves(hidden):
            hidden = hidden.contiguous()
            width = hidden.shape[-1] // 2
            out = hidden.new_empty(*hidden.shape[:-1], width)
            native.run("gated_silu_forward", hidden.dtype, hidden, out, hidden[..., 0].numel(), width)
            ctx.save_for_backward(hidden, None)
            return out
        gate, up = hidden.chunk(2, -1)
        sigmoid = gate.sigmoid()  # kept: the exponential costs more than reading it again
        ctx.save_for_backward(hidden, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, sigmoid = ctx.saved_tensors
        if sigmoid is None:
            grad, width = torch.empty_like(hidden), hidden.shape[-1] // 2
            rows = hidden[..., 0].numel()
            native.run("gated_silu_backward", hidden.dtype, grads[0].contiguous(), hidden, grad, rows, width)
            return grad
        gate, up = hidden.chunk(2, -1)
        silu = gate * sigmoid
        slope = (1 - sigmoid).mul_(silu).add_(sigmoid)  # of silu; in this order exact for large gates too
        grad = torch.empty_like(hidden)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(slope.mul_(up), grads[0], out=grad_gate)
        torch.mul(silu, grads[0], out=grad_up)
        return grad


def gated_silu(hidden: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """`silu(hidden[..., :F]) * hidden[..., F:]` (arXiv:2002.05202)."""
    return _GatedSilu.apply(hidden)  # type: ignore[no-any-return]
