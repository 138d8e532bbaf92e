"""Non-linearities of feed-forward networks, with gradients that keep only the input.

Gated kinds take a tensor that holds the gate and the linear part side by side: gates are the first F columns.

Dims: N rows, F hidden width, G input matrices: 2 for gated kinds, else 1.
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native

ExpertKind = Literal["swiglu", "gelu", "relu2", "drelu"]
"""SwiGLU (arXiv:2002.05202), GELU, squared ReLU (arXiv:2109.08668), and dReLU, which gates with ReLU on both sides
(arXiv:2406.05955)."""
KINDS: tuple[ExpertKind, ...] = get_args(ExpertKind)
GATED = ("swiglu", "drelu")


def input_matrices(kind: ExpertKind) -> int:
    """How many matrices lead into the hidden layer: 2 for gated kinds, else 1."""
    return 2 if kind in GATED else 1


def activate(kind: ExpertKind, hidden: Float[Tensor, "... GF"]) -> Float[Tensor, "... F"]:
    """The hidden layer's non-linearity, differentiable."""
    return _Activate.apply(kind, hidden)  # type: ignore[no-any-return]


def activation(kind: ExpertKind, hidden: Float[Tensor, "... GF"]) -> Float[Tensor, "... F"]:
    """The values of `activate`, in plain torch."""
    if kind == "gelu":
        return F.gelu(hidden)
    if kind == "relu2":
        return hidden.relu().square_()
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate).mul_(up) if kind == "swiglu" else gate.relu().mul_(up.relu())


def activation_gradient(
    kind: ExpertKind, hidden: Float[Tensor, "... GF"], grad: Float[Tensor, "... F"]
) -> Float[Tensor, "... GF"]:
    """The gradient of `hidden`, given that of the activation, in plain torch."""
    if kind == "gelu":
        density = torch.exp(-0.5 * hidden * hidden).mul_(1 / math.sqrt(2 * math.pi))
        share = torch.erf(hidden * math.sqrt(0.5)).add_(1).mul_(0.5)
        return density.mul_(hidden).add_(share).mul_(grad)
    if kind == "relu2":
        return hidden.relu().mul_(2).mul_(grad)
    gate, up = hidden.chunk(2, -1)
    out = torch.empty_like(hidden)
    grad_gate, grad_up = out.chunk(2, -1)
    if kind == "drelu":
        torch.mul(up.relu() * (gate > 0), grad, out=grad_gate)
        torch.mul(gate.relu() * (up > 0), grad, out=grad_up)
        return out
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    slope = (1 - sigmoid).mul_(silu).add_(sigmoid)  # of silu; in this order exact for large gates too
    torch.mul(slope.mul_(up), grad, out=grad_gate)
    torch.mul(silu, grad, out=grad_up)
    return out


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: ExpertKind, hidden: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(hidden)
        if not native.serves(hidden):
            return activation(kind, hidden)
        hidden = hidden.contiguous()
        width = hidden.shape[-1] // input_matrices(kind)
        out = hidden.new_empty(*hidden.shape[:-1], width)
        native.run("activation_forward", hidden.dtype, hidden, out, *_sizes(kind, hidden, width))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (hidden,) = ctx.saved_tensors
        if not native.serves(hidden, grads[0]):
            return None, activation_gradient(ctx.kind, hidden, grads[0])
        hidden, grad = hidden.contiguous(), grads[0].contiguous()
        out = torch.empty_like(hidden)
        native.run(
            "activation_backward", hidden.dtype, grad, hidden, out, *_sizes(ctx.kind, hidden, grad.shape[-1])
        )
        return None, out


def _sizes(kind: ExpertKind, hidden: Tensor, width: int) -> tuple[int, int, int]:
    """Rows, width, and the number of the kind in activation.h."""
    return hidden[..., 0].numel(), width, KINDS.index(kind)
