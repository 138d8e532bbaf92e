"""`silu(gate) * up` on a tensor that holds both, with a gradient that keeps only its input.

Dims: N rows, F hidden width; gates are the first F columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (hidden,) = ctx.saved_tensors
        gate, up = hidden.chunk(2, -1)
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return torch.cat([grad_gate, F.silu(gate).mul_(grads[0])], -1)


def gated_silu(hidden: Float[Tensor, "... F2"]) -> Float[Tensor, "... F"]:
    """`silu(hidden[..., :F]) * hidden[..., F:]` (arXiv:2002.05202)."""
    return _GatedSilu.apply(hidden)  # type: ignore[no-any-return]
