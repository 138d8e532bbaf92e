"""Mixtures of single neurons: each token picks a few of very many experts, each of which has one hidden unit.

Two reads of tables like that of `embedding_bag`, with the activation between them: a dot product with the rows of `u`,
and a weighted sum of the rows of `v`. The backward pass keeps the tokens and one number per pick, and reads the rows
again.

Dims: T tokens, S slots per token, N neurons, D width.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.kernels.backend import Backend
from moesaic.kernels.embedding_bag import check_slots, check_table, gather_dots, gather_sums
from moesaic.kernels.reverse_index import row_sums, touched_row_sums

Activation = Literal["gelu", "relu"]


def neuron_mix(
    x: Float[Tensor, "T D"],
    u: Float[Tensor, "N D"],
    v: Float[Tensor, "N D"],
    slots: Int[Tensor, "T S"],
    weights: Float[Tensor, "T S"],
    *,
    activation: Activation = "gelu",
    sparse_grad: bool = False,
    backend: Backend = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum of weights[t, s] * gelu(x[t] . u[i]) * v[i]` over `i = slots[t, s]`, in the type of x.

    Sums and the activation (`gelu` by the error function) are in fp32 or better; the tables may have another type than
    x, both the same. A slot that occurs twice counts twice. The gradients of u and v are dense, (N, D), or with
    `sparse_grad` coalesced sparse tensors of the rows that were read, whose cost does not depend on N. That path cannot
    be compiled, and on an accelerator its backward pass waits for the number of rows. Slots are int64 in 0 to N - 1:
    others raise IndexError on CPUs and are not looked for on GPUs. Raises ValueError where shapes do not fit.
    Source: PEER, arXiv:2407.04153, section 2.2.
    """
    check_table("neuron_mix", u, slots, weights)
    if u.shape != v.shape or u.dtype != v.dtype:
        raise ValueError(f"neuron_mix: u {u.dtype} {(*u.shape,)} and v {v.dtype} {(*v.shape,)} must be alike")
    if x.shape != (slots.shape[0], u.shape[1]):
        raise ValueError(
            f"neuron_mix: x must be {(slots.shape[0], u.shape[1])} for these slots and tables, not {(*x.shape,)}"
        )
    if activation not in get_args(Activation):
        raise ValueError(
            f"neuron_mix: no activation {activation!r}; there are {', '.join(get_args(Activation))}"
        )
    if sparse_grad:
        return _SparseMix.apply(x, u, v, slots, weights, activation, backend)  # type: ignore[no-any-return]
    return _neuron_mix(x, u, v, slots, weights, activation, backend)[0]


def _activate(before: Tensor, activation: str) -> Tensor:
    return F.gelu(before) if activation == "gelu" else before.relu()


def _activate_backward(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, before) if activation == "gelu" else grad * (before > 0)


@torch.library.custom_op("moesaic::neuron_mix", mutates_args=())
def _neuron_mix(
    x: Tensor, u: Tensor, v: Tensor, slots: Tensor, weights: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The output, and what the activation got: (T, S)."""
    check_slots(slots, u.shape[0])
    before = gather_dots(u, slots, x, backend=backend)
    scales = _activate(before, activation) * weights
    return gather_sums(v, slots, scales, dtype=x.dtype, backend=backend), before


@_neuron_mix.register_fake
def _(
    x: Tensor, u: Tensor, v: Tensor, slots: Tensor, weights: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(x.dtype, u.dtype), torch.float32)
    return x.new_empty(x.shape), x.new_empty(slots.shape, dtype=wide)


@torch.library.custom_op("moesaic::neuron_mix_backward", mutates_args=())
def _neuron_mix_backward(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    slots: Tensor,
    weights: Tensor,
    before: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and weights; what the rows of u and those of v get of x and of `grad`: (T, S) each."""
    dots = gather_dots(v, slots, grad, backend=backend)
    after = _activate(before, activation)
    for_u = _activate_backward(dots * weights, before, activation).to(before.dtype)
    grad_x = gather_sums(u, slots, for_u, dtype=grad.dtype, backend=backend)
    return grad_x, (dots * after).to(weights.dtype), for_u, after * weights


@_neuron_mix_backward.register_fake
def _(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    slots: Tensor,
    weights: Tensor,
    before: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape),
        weights.new_empty(weights.shape),
        before.new_empty(before.shape),
        before.new_empty(before.shape),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, v, slots, weights, ctx.activation, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, v, slots, weights, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: None, *, sparse: bool = False) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, u, v, slots, weights, before = ctx.saved_tensors
    options = (ctx.activation, ctx.backend)
    grad_x, grad_weights, for_u, for_v = _neuron_mix_backward(grad, u, v, slots, weights, before, *options)
    wanted = [i for i in (1, 2) if ctx.needs_input_grad[i]]  # a frozen table costs nothing
    tables: dict[int, Tensor] = {}
    if wanted:
        sums = touched_row_sums if sparse else row_sums
        sources, factors = {1: x, 2: grad}, {1: for_u, 2: for_v}
        given = (slots, [sources[i] for i in wanted], [factors[i] for i in wanted], u.shape[0])
        results = sums(*given, dtype=u.dtype, backend=ctx.backend)
        tables = dict(zip(wanted, results, strict=True))
    return grad_x, tables.get(1), tables.get(2), None, grad_weights, None, None


_neuron_mix.register_autograd(_backward, setup_context=_save)


class _SparseMix(torch.autograd.Function):
    """A custom op cannot return a sparse gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, before = _neuron_mix(*inputs)
        x, u, v, slots, weights, ctx.activation, ctx.backend = inputs
        ctx.save_for_backward(x, u, v, slots, weights, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _backward(ctx, grads[0], None, sparse=True)
