"""Cross-entropy of a linear head, chunk by chunk: the (T, V) logits never exist as a whole.

The gradients are computed with the loss, while a chunk's logits are at hand, and scaled in the backward pass.

Dims: T tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native
from moesaic.kernels.combine import accumulation_dtype

CHUNK = 1024
"""Tokens whose logits exist at one time."""


def cross_entropy(
    logits: Float[Tensor, "T V"], labels: Int[Tensor, " T"], *, with_gradient: bool
) -> tuple[Float[Tensor, " T"], Float[Tensor, "T V"]]:
    """Each row's loss in nats, and the gradient of their sum, for which the logits' memory is used.

    Rows with a negative label are padding: no loss, no gradient.
    """
    if native.serves(logits):
        losses = logits.new_empty(logits.shape[0])
        sizes = (*logits.shape, int(with_gradient))
        native.run("cross_entropy", logits.dtype, logits, labels.contiguous(), losses, *sizes)
        return losses, logits
    counted, labels = (labels >= 0)[:, None], labels.clamp(min=0)[:, None]
    logs = logits.log_softmax(-1)
    losses = -(logs.gather(1, labels) * counted).squeeze(1)
    if with_gradient:
        logs = logs.exp_()
        logs.scatter_add_(1, labels, logs.new_full((), -1).expand_as(labels)).mul_(counted)
    return losses, logs


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = accumulation_dtype(hidden.dtype)
        loss = hidden.new_zeros((), dtype=total)
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs else None
        grad_weight = torch.zeros_like(weight, dtype=total) if needs else None
        for start in range(0, hidden.shape[0], chunk):
            rows, labels = hidden[start : start + chunk], targets[start : start + chunk]
            losses, grad = cross_entropy((rows @ weight.T).to(total), labels, with_gradient=needs)
            loss += losses.sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[start : start + chunk])
                if total == hidden.dtype:
                    grad_weight.addmm_(grad.T, rows)
                else:
                    grad_weight += grad.T @ rows
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
