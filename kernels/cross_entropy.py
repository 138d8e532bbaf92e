"""Cross-entropy of a linear head, chunk by chunk: the (T, V) logits never exist as a whole.

The gradients are computed with the loss, while a chunk's logits are at hand, and scaled in the backward pass.

Dims: T tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels.combine import accumulation_dtype

CHUNK = 1024
"""Tokens whose logits exist at one time."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = accumulation_dtype(hidden.dtype)
        loss = hidden.new_zeros((), dtype=total)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = torch.zeros_like(weight, dtype=total) if needs else None
        for start in range(0, hidden.shape[0], chunk):
            rows, labels = hidden[start : start + chunk], targets[start : start + chunk, None]
            counted = labels >= 0
            labels = labels.clamp(min=0)
            logs = (rows @ weight.T).to(total).log_softmax(-1)  # (chunk, V)
            loss -= (logs.gather(1, labels) * counted).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = logs.exp_()  # in place; rows of padding are silenced where they are narrow
                grad.scatter_add_(1, labels, grad.new_full((), -1).expand_as(labels))
                grad = grad.to(hidden.dtype)
                into = grad_hidden[start : start + chunk]
                torch.mm(grad, weight, out=into).mul_(counted)
                if total == hidden.dtype:
                    grad_weight.addmm_(grad.T, rows * counted)
                else:
                    grad_weight += grad.T @ (rows * counted)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], (grad_weight * grads[0]).to(ctx.weight_dtype), None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " T"],
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, ""]:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target], in nats; negative targets are padding.

    Softmax and sums are fp32 or better. No second derivative.
    """
    if not torch.is_grad_enabled():  # a parameter says that it needs a gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)  # type: ignore[no-any-return]
