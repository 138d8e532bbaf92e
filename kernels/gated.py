"""`silu(gate) * up` on a tensor that holds both, with a gradient that keeps only its input.

Dims: N rows, F hidden width; gates are the first F columns.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, -1)
        sigmoid = gate.sigmoid()  # kept: the exponential costs more than reading it again
        ctx.save_for_backward(hidden, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, sigmoid = ctx.saved_tensors
        gate, up = hidden.chunk(2, -1)
        silu = gate * sigmoid
        slope = silu.sub(1).neg_().mul_(sigmoid).add_(silu)  # of silu: sigmoid * (1 - silu) + silu
        grad = torch.empty_like(hidden)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(slope.mul_(up), grads[0], out=grad_gate)
        torch.mul(silu, grads[0], out=grad_up)
        return grad


def gated_silu(hidden: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """`silu(hidden[..., :F]) * hidden[..., F:]` (arXiv:2002.05202)."""
    return _GatedSilu.apply(hidden)  # type: ignore[no-any-return]
