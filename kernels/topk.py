"""Token choice in one pass: scores, the k best experts of each token, their weights, probabilities over all experts.

Scores are a softmax or sigmoids of the logits, in fp32 or better. A bias, and groups of which a token uses few, steer
the choice and never scale weights (arXiv:2408.15664, section 2; arXiv:2412.19437, section 2.1.2). Experts come in
descending order of score plus bias. Of equals the lower index comes first, and NaN counts as infinity, in every engine:
wrong logits then give wrong weights, but never an expert that does not exist.

Dims: T tokens, E experts, K experts per token, G groups.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, engine
from moesaic.kernels.combine import accumulation_dtype

Score = Literal["softmax", "sigmoid"]
Normalize = Literal["before", "after"]


class Choice(NamedTuple):
    """How a token chooses, in the order in which kernels take it."""

    k: int
    sigmoid: bool
    """Scores are sigmoids. Otherwise a softmax."""
    after: bool
    """Weights are scaled to sum to 1 over the chosen."""
    groups: int
    kept: int
    """Groups of which a token may choose experts."""
    scale: float


def choose(
    logits: Float[Tensor, "T E"],
    bias: Float[Tensor, " E"],
    k: int,
    *,
    score: Score = "softmax",
    normalize: Normalize = "after",
    groups: int = 1,
    groups_kept: int | None = None,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"], Float[Tensor, "T E"]]:
    """Experts of each token, their weights times `scale`, and probabilities, whose rows sum to 1.

    `before`: weights are the scores over all experts. `after`: those of the chosen, scaled to sum to 1 in log space,
    where no underflow of sigmoids can shrink them. Probabilities are the scores, scaled likewise. Weights and
    probabilities are fp32 or better, differentiable in the logits; the bias gets no gradient. A group scores the sum of
    its best two experts. Raises ValueError where k experts cannot be chosen.
    """
    num_experts = logits.shape[1]
    kept = groups if groups_kept is None else groups_kept
    if num_experts % groups or not 1 <= kept <= groups:
        raise ValueError(f"groups: {kept} of {groups} cannot be kept of {num_experts} experts")
    reachable = num_experts // groups * kept
    if not 1 <= k <= reachable:
        raise ValueError(f"k: {k} is not in 1 to {reachable}, the experts that a token may use")
    choice = Choice(k, score == "sigmoid", normalize == "after", groups, kept, scale)
    # one's own function otherwise: of few tokens, an op's way through the dispatcher takes longest
    run = _choose if torch.compiler.is_compiling() else _Choose.apply
    weights, probabilities, experts = run(logits, bias, *choice, backend)  # type: ignore[misc]
    return experts, weights, probabilities


def choose_reference(logits: Tensor, bias: Tensor, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """Plain torch: the definition, differentiable by autograd. Returns weights, probabilities, experts."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    scores = logits.sigmoid() if choice.sigmoid else logits.softmax(-1)
    log_scores = F.logsigmoid(logits) if choice.sigmoid else logits
    experts = best((scores + bias.to(scores.dtype)).detach(), choice)
    picked = log_scores.gather(-1, experts).softmax(-1) if choice.after else scores.gather(-1, experts)
    probabilities = log_scores.softmax(-1) if choice.sigmoid else scores
    return picked * choice.scale, probabilities, experts


def best(selection: Float[Tensor, "T E"], choice: Choice) -> Int[Tensor, "T K"]:
    """The experts with the largest values, in descending order; of equals the lower index comes first."""
    return ranked(within_groups(selection, choice.groups, choice.kept))[:, : choice.k].contiguous()


def within_groups(selection: Float[Tensor, "T E"], groups: int, kept: int) -> Float[Tensor, "T E"]:
    """Put -inf where an expert's group is not among the token's best; a group scores the sum of its best two."""
    if kept == groups:
        return selection
    grouped = selection.unflatten(-1, (groups, -1))  # (T, G, E / G)
    totals = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    allowed = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, ranked(totals)[:, :kept], True)
    return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)


def ranked(values: Float[Tensor, "T N"]) -> Int[Tensor, "T N"]:
    """The order of each row, descending and stable (topk promises no order of equals); NaN counts as infinity."""
    return values.masked_fill(values.isnan(), torch.inf).sort(dim=-1, descending=True, stable=True).indices


def _choose_now(
    logits: Tensor,
    bias: Tensor,
    k: int,
    sigmoid: bool,
    after: bool,
    groups: int,
    kept: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    choice = Choice(k, sigmoid, after, groups, kept, scale)
    bias = bias.to(accumulation_dtype(logits.dtype))
    runs = engine(backend, logits, bias)
    if runs == "cpp":
        experts = torch.empty(logits.shape[0], k, dtype=torch.int64)
        weights, probabilities = logits.new_empty(experts.shape), logits.new_empty(logits.shape)
        tensors = (logits.contiguous(), bias.contiguous(), weights, probabilities, experts)
        native.run("choose", logits.dtype, *tensors, *logits.shape, *choice)
        return weights, probabilities, experts
    if runs == "triton":
        from moesaic.kernels.triton import topk as kernels

        if kernels.serves(logits, k):
            return kernels.choose(logits, bias, *choice)
    return choose_reference(logits, bias, choice)


_choose = torch.library.custom_op("moesaic::choose", _choose_now, mutates_args=())


@_choose.register_fake
def _(
    logits: Tensor,
    bias: Tensor,
    k: int,
    sigmoid: bool,
    after: bool,
    groups: int,
    kept: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    experts = logits.new_empty(logits.shape[0], k, dtype=torch.int64)
    wide = accumulation_dtype(logits.dtype)
    return logits.new_empty(experts.shape, dtype=wide), logits.new_empty(logits.shape, dtype=wide), experts


def _backward_now(
    grad_weights: Tensor | None,
    grad_probabilities: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    probabilities: Tensor,
    experts: Tensor,
    sigmoid: bool,
    after: bool,
    groups: int,
    kept: int,
    scale: float,
    backend: str,
) -> Tensor:
    """The gradient of the logits, in the type of the probabilities. `logits`: only of sigmoids."""
    choice = Choice(experts.shape[1], sigmoid, after, groups, kept, scale)
    given = (grad_weights, grad_probabilities, logits)
    *grads, logits = (tensor if tensor is None else tensor.contiguous() for tensor in given)
    saved = (logits, weights, probabilities, experts)
    runs = engine(backend, weights, probabilities, logits, *grads)
    if runs == "cpp":
        grad_logits = torch.empty_like(probabilities)
        tensors = (*grads, *saved, grad_logits)
        native.run("choose_backward", weights.dtype, *tensors, *probabilities.shape, *choice)
        return grad_logits
    if runs == "triton":
        from moesaic.kernels.triton import topk as kernels

        if kernels.serves(probabilities, choice.k):
            ours = (probabilities, weights, experts, logits)
            return kernels.choose_backward(*ours, (grads[0], grads[1]), after, scale)
    return _backward_reference((grads[0], grads[1]), saved, choice)


_choose_backward = torch.library.custom_op("moesaic::choose_backward", _backward_now, mutates_args=())


@_choose_backward.register_fake
def _(
    grad_weights: Tensor | None,
    grad_probabilities: Tensor | None,
    logits: Tensor | None,
    weights: Tensor,
    probabilities: Tensor,
    experts: Tensor,
    sigmoid: bool,
    after: bool,
    groups: int,
    kept: int,
    scale: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(probabilities)


Saved = tuple[Tensor | None, Tensor, Tensor, Tensor]
"""Logits, which only sigmoids need; weights, probabilities, experts."""


def _backward_reference(grads: tuple[Tensor | None, Tensor | None], saved: Saved, choice: Choice) -> Tensor:
    """Through the softmaxes to the log scores, and from those of sigmoids, with slope sigmoid(-x), to the logits."""
    grad_weights, grad_probabilities = grads
    logits, weights, probabilities, experts = saved
    grad = torch.zeros_like(probabilities)
    if grad_probabilities is not None:
        product = grad_probabilities * probabilities
        grad = product - probabilities * product.sum(-1, keepdim=True)
    if grad_weights is not None:
        product = grad_weights * weights
        total = product.sum(-1, keepdim=True)
        if choice.after:
            product = product - weights * (total / choice.scale)
        elif not choice.sigmoid:  # the weights are probabilities
            grad = grad - probabilities * total
        grad = grad.scatter_add(-1, experts, product)
    return grad if logits is None else grad * (-logits.to(grad.dtype)).sigmoid()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, _, k, *ctx.rule = inputs
    choice = Choice(k, *ctx.rule[:-1])
    ctx.set_materialize_grads(False)  # most runs use no gradient of the probabilities
    ctx.dtype = logits.dtype
    ctx.save_for_backward(logits if choice.sigmoid else None, *output)


def _gradient(run: Callable[..., Tensor], ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    grad_weights, grad_probabilities, _ = grads
    nothing = (None,) * 8
    if grad_weights is None and grad_probabilities is None:
        return None, *nothing
    return run(grad_weights, grad_probabilities, *ctx.saved_tensors, *ctx.rule).to(ctx.dtype), *nothing


_choose.register_autograd(lambda ctx, *grads: _gradient(_choose_backward, ctx, grads), setup_context=_save)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _choose_now(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _gradient(_backward_now, ctx, grads)
