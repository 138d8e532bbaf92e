"""The experts of a layer as one op: copy tokens to rows, two grouped products with a non-linearity between them, and
the weighted sum back to tokens.

What backward keeps is the input, and the hidden layer before its non-linearity: no (R, D) tensor. Rows are gathered
again, the activation is computed again, and the gradient of a gate is the product of the activation with *its*
gradient, which needs no expert output: exact, because experts have no bias (section 3 of arXiv:2512.14080).

Dims: T tokens, D width, F hidden width, G input matrices per expert, E experts, R assignments, N rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moesaic.kernels import expert_mlp_cpu, native
from moesaic.kernels.activation import ExpertKind, activation, activation_gradient
from moesaic.kernels.backend import Backend, BackendError, check, engine, refusal
from moesaic.kernels.choice import fastest, machine, remembered
from moesaic.kernels.combine import accumulation_dtype, sum_rows
from moesaic.kernels.grouped_linear import grouped_outer, grouped_product
from moesaic.kernels.plan import Plan, Routes

MEASURED = ("cuda",)
"""Types of device on which `auto` is a question of time: on a CPU the compiled kernels serve, or else torch."""


def expert_mlp(
    x: Float[Tensor, "T D"],
    gates: Float[Tensor, " R"],
    w1: Float[Tensor, "E G F D"],
    w2: Float[Tensor, "E D F"],
    plan: Plan,
    *,
    kind: ExpertKind,
    backend: Backend = "auto",
) -> Float[Tensor, "T D"]:
    """`y[t] = sum over the assignments a of t of gates[a] * w2[e] @ act(w1[e] @ x[t])`, differentiable.

    Tokens without assignments get zeros. x, w1 and w2 share one dtype; gates have it or a wider one. Sums over
    assignments run in a fixed order in fp32 or better. Raises BackendError where `backend` cannot run here.
    """
    if backend == "auto" and x.device.type in MEASURED and not torch.compiler.is_compiling():
        backend = _fastest(x, gates, w1, w2, plan, kind) or backend
    given = (gates, plan.tokens, plan.order, plan.where, plan.offsets, plan.per_token)
    return _expert_mlp(x, w1, w2, plan.counts, *given, kind, backend, torch.is_grad_enabled())[0]


def expert_rows(
    rows: Float[Tensor, "N D"],
    w1: Float[Tensor, "E G F D"],
    w2: Float[Tensor, "E D F"],
    counts: Int[Tensor, " E"],
    *,
    kind: ExpertKind,
    backend: Backend = "auto",
) -> Float[Tensor, "N D"]:
    """The same for rows that lie in order: the first `counts[0]` go through the first expert, and so on."""
    none = (None,) * 6
    return _expert_mlp(rows, w1, w2, counts, *none, kind, backend, torch.is_grad_enabled())[0]


def _fastest(
    x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, plan: Plan, kind: ExpertKind
) -> Backend | None:
    """The backend that runs forward and backward fastest, of those that can; measured once per shape.

    None where nothing is known and nothing can be measured: without storage or gradients, or amid a CUDA graph.
    """
    backends: tuple[Backend, ...] = ("triton", "torch", "megablocks")
    if x.dtype == torch.float64:
        return "torch"  # the only one that has it
    if isinstance(x, FakeTensor):
        return None
    able = [name for name in backends if refusal(name, x.device, x.dtype) is None]
    rows = 1 << max(gates.shape[0] - 1, 0).bit_length()
    sizes = f"D {x.shape[1]} F {w2.shape[2]} E {w1.shape[0]} R {rows} {x.dtype}"

    def candidate(name: Backend) -> Callable[[], object]:
        def run() -> object:
            # whoever keeps or packs what is saved out there, as recomputation does, must not see this
            own = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
            with torch.enable_grad(), own:
                leaves = [tensor.detach().requires_grad_() for tensor in (x, gates, w1, w2)]
                y = expert_mlp(leaves[0], leaves[1], leaves[2], leaves[3], plan, kind=kind, backend=name)
                return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return run

    key = f"{machine(x.device)}: {kind} {sizes}"
    if torch.is_inference_mode_enabled() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return remembered(key, able)  # type: ignore[return-value]  # of the same names
    with torch.cuda.device_of(x):  # whose end is waited for
        return fastest(key, {name: candidate(name) for name in able})  # type: ignore[return-value]  # of the same names


@torch.library.custom_op("moesaic::expert_mlp", mutates_args=())
def _expert_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    counts: Tensor,
    gates: Tensor | None,
    tokens: Tensor | None,
    order: Tensor | None,
    where: Tensor | None,
    offsets: Tensor | None,
    per_token: int | None,
    kind: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its non-linearity, or nothing where there will be no backward pass."""
    routes = _routes(gates, tokens, order, where, offsets, per_token)
    module = engine_of(backend, x, w1, w2)
    rows = x.shape[0] if routes is None else routes.tokens.shape[0]
    if rows == 0:
        return x.new_zeros(x.shape), x.new_empty((0, w1.shape[1] * w1.shape[2]) if keep else 0)
    return module.forward(x, w1, w2, counts, routes, kind, backend, keep)


@_expert_mlp.register_fake
def _(x, w1, w2, counts, gates, tokens, order, where, offsets, per_token, kind, backend, keep):
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    return x.new_empty(x.shape), x.new_empty((rows, w1.shape[1] * w1.shape[2]) if keep else 0)


@torch.library.custom_op("moesaic::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    counts: Tensor,
    gates: Tensor | None,
    tokens: Tensor | None,
    order: Tensor | None,
    where: Tensor | None,
    offsets: Tensor | None,
    per_token: int | None,
    kind: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w1, w2 and the gates (empty where there are none)."""
    routes = _routes(gates, tokens, order, where, offsets, per_token)
    module = engine_of(backend, x, w1, w2)
    if hidden.shape[0] == 0:
        grad_gates = x.new_empty(0) if gates is None else gates.new_zeros(gates.shape)
        return x.new_zeros(x.shape), w1.new_zeros(w1.shape), w2.new_zeros(w2.shape), grad_gates
    found = module.backward(grad.contiguous(), x, w1, w2, hidden, counts, routes, kind, backend)
    return (*found[:3], x.new_empty(0) if found[3] is None else found[3])


@_expert_mlp_backward.register_fake
def _(grad, x, w1, w2, hidden, counts, gates, tokens, order, where, offsets, per_token, kind, backend):
    grad_gates = x.new_empty(0) if gates is None else gates.new_empty(gates.shape)
    return x.new_empty(x.shape), w1.new_empty(w1.shape), w2.new_empty(w2.shape), grad_gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, w2, counts, *routes, kind, backend, _keep = inputs
    *tensors, ctx.per_token = routes
    ctx.kind, ctx.backend = kind, backend
    ctx.set_materialize_grads(False)  # the hidden layer has none: not so many zeros
    ctx.save_for_backward(x, w1, w2, output[1], counts, *tensors)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = _expert_mlp_backward(grad, *tensors, ctx.per_token, ctx.kind, ctx.backend)
    grad_x, grad_w1, grad_w2, grad_gates = found
    return grad_x, grad_w1, grad_w2, None, None if tensors[5] is None else grad_gates, *[None] * 8


_expert_mlp.register_autograd(_backward, setup_context=_save)


def _routes(
    gates: Tensor | None,
    tokens: Tensor | None,
    order: Tensor | None,
    where: Tensor | None,
    offsets: Tensor | None,
    per_token: int | None,
) -> Routes | None:
    if gates is None or tokens is None or order is None or where is None or offsets is None:
        return None
    return Routes(gates, tokens, order, where, offsets, per_token)


def engine_of(backend: str, *tensors: Tensor) -> Any:
    """The implementation: something with `forward` and `backward` as below."""
    device, dtype = tensors[0].device, tensors[0].dtype
    check(backend, device, dtype)
    if backend == "triton" and dtype == torch.float64:
        raise BackendError(f"kernels: triton has no experts of {dtype}; use 'auto' or 'torch'")
    chosen = engine(backend, *tensors)
    if chosen == "triton" and dtype != torch.float64:
        from moesaic.kernels.triton import expert_mlp as kernels  # triton is optional

        return kernels
    if chosen == "cpp" or (chosen == "torch" and backend == "auto" and native.serves_bf16(*tensors)):
        return expert_mlp_cpu if native.gemm(accumulation_dtype(tensors[0].dtype)) else _Torch
    return _Torch


class _Torch:
    """Plain torch; the reference."""

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        counts: Tensor,
        routes: Routes | None,
        kind: Any,
        backend: Any,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = x if routes is None else x.index_select(0, routes.tokens)
        hidden = grouped_product(rows, w1.flatten(1, 2), counts, backend)
        out = grouped_product(activation(kind, hidden), w2, counts, backend)
        hidden = hidden if keep else x.new_empty(0)
        if routes is None:
            return out, hidden
        return sum_rows(
            out, routes.where, routes.offsets, routes.gates, per_token=routes.per_token, backend=backend
        ), hidden

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        hidden: Tensor,
        counts: Tensor,
        routes: Routes | None,
        kind: Any,
        backend: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows = x if routes is None else x.index_select(0, routes.tokens)
        grad_rows = grad if routes is None else grad.index_select(0, routes.tokens)
        active = activation(kind, hidden)
        grad_active = grouped_product(grad_rows, w2.transpose(1, 2), counts, backend)
        grad_gates = None
        if routes is not None:
            wide = accumulation_dtype(x.dtype)
            products = torch.linalg.vecdot(grad_active.to(wide), active.to(wide))
            grad_gates = products.index_select(0, routes.where).to(routes.gates.dtype)
            gates = routes.gates.index_select(0, routes.order).to(wide)[:, None]
            active, grad_active = (active * gates).to(x.dtype), (grad_active * gates).to(x.dtype)
        grad_hidden = activation_gradient(kind, hidden, grad_active)
        grad_w2 = grouped_outer(grad_rows, active, counts, backend)
        grad_w1 = grouped_outer(grad_hidden, rows, counts, backend).view_as(w1)
        grad_x = grouped_product(grad_hidden, w1.flatten(1, 2).transpose(1, 2), counts, backend)
        if routes is not None:
            grad_x = sum_rows(
                grad_x, routes.where, routes.offsets, per_token=routes.per_token, backend=backend
            )
        return grad_x, grad_w1, grad_w2, grad_gates
