"""The experts of a layer as one op: copy tokens to rows, two grouped products with a non-linearity between them, and
the weighted sum back to tokens.

What backward keeps is the input, and the hidden layer before its non-linearity: no (R, D) tensor. Rows are gathered
again, the activation is computed again, and the gradient of a gate is the product of the activation with *its*
gradient, which needs no expert output: exact, because experts have no bias (section 3 of arXiv:2512.14080).

Dims: T tokens, D width, F hidden width, G input matrices per expert, E experts, R assignments, N rows.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.activation import KINDS, ExpertKind, activation, activation_gradient
from moesaic.kernels.backend import Backend, BackendError, check, engine, refusal
from moesaic.kernels.choice import fastest, machine
from moesaic.kernels.combine import accumulation_dtype, sum_rows
from moesaic.kernels.grouped_linear import grouped_outer, grouped_product
from moesaic.kernels.plan import Plan

MEASURED = ("cuda",)
"""Types of device on which `auto` is a question of time: on a CPU the compiled kernels serve, or else torch."""
SEGMENT_BYTES = 16 << 20
"""About what a thread of the CPU's kernel works in."""

Into = Callable[[], tuple[Tensor, Tensor, bool]]
"""Asked in a backward pass: where the gradients of w1 and w2 belong, and whether to add them to what is there."""


@dataclass(frozen=True)
class Routes:
    """How tokens become rows and rows tokens: the tensors of a plan, and the weight of each assignment."""

    gates: Float[Tensor, " R"]
    tokens: Int[Tensor, " R"]
    order: Int[Tensor, " R"]
    where: Int[Tensor, " R"]
    offsets: Int[Tensor, " T1"]
    per_token: int | None


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
        backend = _fastest(x, gates, w1, w2, plan, kind)
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
    into: Into | None = None,
) -> Float[Tensor, "N D"]:
    """The same for rows that lie in order: the first `counts[0]` go through the first expert, and so on.

    With `into`, gradients of w1 and w2 are written there, and autograd gets none. The two must come out of some op, and
    only a backward pass that goes through it writes.
    """
    none = (None,) * 6
    if into is not None and torch.is_grad_enabled():
        return _RowsInto.apply(rows, w1, w2, counts, kind, backend, into)  # type: ignore[no-any-return]
    return _expert_mlp(rows, w1, w2, counts, *none, kind, backend, torch.is_grad_enabled())[0]


def _fastest(x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, plan: Plan, kind: ExpertKind) -> Backend:
    """The backend that runs forward and backward fastest, of those that can; measured once per shape."""
    backends: tuple[Backend, ...] = ("triton", "torch", "megablocks")
    if x.dtype == torch.float64:
        return "torch"  # the only one that has it
    able = [name for name in backends if refusal(name, x.device, x.dtype) is None]
    rows = 1 << max(gates.shape[0] - 1, 0).bit_length()
    sizes = f"D {x.shape[1]} F {w2.shape[2]} E {w1.shape[0]} R {rows} {x.dtype}"

    def candidate(name: Backend) -> Callable[[], object]:
        def run() -> object:
            with torch.enable_grad():
                leaves = [tensor.detach().requires_grad_() for tensor in (x, gates, w1, w2)]
                y = expert_mlp(leaves[0], leaves[1], leaves[2], leaves[3], plan, kind=kind, backend=name)
                return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return run

    key = f"{machine(x.device)}: {kind} {sizes}"
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
    module = _engine(backend, x, w1, w2)
    rows = x.shape[0] if routes is None else routes.tokens.shape[0]
    if rows == 0:
        return torch.zeros_like(x), x.new_empty((0, w1.shape[1] * w1.shape[2]) if keep else 0)
    return module.forward(x, w1, w2, counts, routes, kind, backend, keep)


@_expert_mlp.register_fake
def _(x, w1, w2, counts, gates, tokens, order, where, offsets, per_token, kind, backend, keep):
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    return torch.empty_like(x), x.new_empty((rows, w1.shape[1] * w1.shape[2]) if keep else 0)


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
    module = _engine(backend, x, w1, w2)
    if hidden.shape[0] == 0:
        grad_gates = x.new_empty(0) if gates is None else torch.zeros_like(gates)
        return torch.zeros_like(x), torch.zeros_like(w1), torch.zeros_like(w2), grad_gates
    found = module.backward(grad.contiguous(), x, w1, w2, hidden, counts, routes, kind, backend)
    return (*found[:3], x.new_empty(0) if found[3] is None else found[3])


@_expert_mlp_backward.register_fake
def _(grad, x, w1, w2, hidden, counts, gates, tokens, order, where, offsets, per_token, kind, backend):
    grad_gates = x.new_empty(0) if gates is None else torch.empty_like(gates)
    return torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2), grad_gates


@torch.library.custom_op("moesaic::expert_rows_backward_into", mutates_args=("grad_w1", "grad_w2"))
def _expert_rows_backward_into(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    counts: Tensor,
    kind: str,
    backend: str,
    grad_w1: Tensor,
    grad_w2: Tensor,
    add: bool,
) -> Tensor:
    """The gradient of x; those of w1 and w2 are written, or added."""
    given = (x, w1, w2, hidden, counts)
    writes = grad_w1.dtype == accumulation_dtype(x.dtype) and _engine(backend, x, w1, w2) is _Cpp
    if writes and hidden.shape[0]:
        into = (grad_w1, grad_w2, add)
        return _Cpp.backward(grad.contiguous(), *given, None, kind, backend, into=into)[0]
    grad_x, *found, _ = _expert_mlp_backward(grad, *given, *(None,) * 6, kind, backend)
    for box, part in zip((grad_w1, grad_w2), found, strict=True):
        if add:
            box += part
        else:
            box.copy_(part)
    return grad_x


@_expert_rows_backward_into.register_fake
def _(grad, x, w1, w2, hidden, counts, kind, backend, grad_w1, grad_w2, add):
    return torch.empty_like(x)


class _RowsInto(torch.autograd.Function):
    """`expert_rows` whose gradients of matrices go where they belong, without a tensor of their own."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, kind: str, backend: str, into: Into
    ) -> Tensor:
        out, hidden = _expert_mlp(rows, w1, w2, counts, *(None,) * 6, kind, backend, True)
        ctx.save_for_backward(rows, w1, w2, hidden, counts)
        ctx.kind, ctx.backend, ctx.into = kind, backend, into
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        given = (grads[0], *ctx.saved_tensors)
        matrices = ctx.next_functions[1][0]
        if torch._C._will_engine_execute_node(matrices):
            grad_x = _expert_rows_backward_into(*given, ctx.kind, ctx.backend, *ctx.into())
        else:  # of `torch.autograd.grad`, which was asked for others only
            grad_x = _expert_mlp_backward(*given, *(None,) * 6, ctx.kind, ctx.backend)[0]
        return grad_x, *(None,) * 6


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


def _engine(backend: str, *tensors: Tensor) -> Any:
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
        return _Cpp if native.gemm(accumulation_dtype(tensors[0].dtype)) else _Torch
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


class _Cpp:
    """C++, with the matrix products of torch's BLAS. bf16 is computed in fp32; the hidden layer is kept in it."""

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        counts: Tensor,
        routes: Routes | None,
        kind: str,
        backend: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        call = _Call(x, w1, w2, counts, routes, kind)
        hidden = x.new_empty((call.rows, call.inputs) if keep else 0)
        y = call.new(*x.shape)
        rows = y if routes is None else call.new(call.rows, call.dim)
        memory = call.memory(call.dim + call.inputs + call.width)
        call.run("expert_mlp_forward", hidden if keep else None, rows, y, memory)
        return y.to(x.dtype), hidden

    @staticmethod
    def backward(
        grad: Tensor,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        hidden: Tensor,
        counts: Tensor,
        routes: Routes | None,
        kind: str,
        backend: str,
        into: tuple[Tensor, Tensor, bool] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        call = _Call(x, w1, w2, counts, routes, kind)
        grad_x = call.new(*x.shape)
        grad_w1, grad_w2, add = into or (call.new(*w1.shape), call.new(*w2.shape), False)
        grad_gates = None if routes is None else call.new(call.rows)
        rows = grad_x if routes is None else call.new(call.rows, call.dim)
        memory = call.memory(2 * call.dim + call.inputs + call.width, call.inputs)
        found = (grad_x, _pointer(grad_w1), _pointer(grad_w2), grad_gates)
        strides = (grad_w1.stride(0), grad_w2.stride(0), int(add))
        given = (grad.to(call.dtype), hidden, rows, *found, memory, call.kept())
        call.run("expert_mlp_backward", *given, strides=strides)
        if routes is not None and grad_gates is not None:
            grad_gates = grad_gates.to(routes.gates.dtype)
        return grad_x.to(x.dtype), grad_w1.to(x.dtype), grad_w2.to(x.dtype), grad_gates


class _Call:
    """What both directions hand to C++: pointers, sizes, and memory to work in."""

    def __init__(
        self, x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, routes: Routes | None, kind: str
    ) -> None:
        self.dtype = accumulation_dtype(x.dtype)
        self.stored = x.dtype
        self.x = x.to(self.dtype).contiguous()
        self.w1, self.w2 = (_by_expert(matrices.to(self.dtype)) for matrices in (w1, w2))
        self.counts = counts
        self.routes: tuple[Tensor | None, ...] = (None,) * 5
        if routes is not None:
            gates = routes.gates.to(self.dtype).contiguous()
            self.routes = (routes.tokens, routes.order, routes.where, routes.offsets, gates)
        self.rows = x.shape[0] if routes is None else routes.tokens.shape[0]
        self.experts, self.dim, self.width = w2.shape
        self.inputs = w1.shape[1] * self.width
        self.target = _segment(self.rows, (2 * self.dim + self.inputs + self.width) * self.dtype.itemsize)
        self.kind = KINDS.index(kind)  # type: ignore[arg-type]

    def new(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape)

    def memory(self, columns: int, more: int = 0) -> Tensor:
        """Buffers of every thread; `most()` in C++ has the same formula."""
        most = _round_up(self.target + self.target // 2 + 8)
        return self.new(torch.get_num_threads(), most * columns + _round_up(more))

    def kept(self) -> Tensor | None:
        """Memory for gradients of all rows, where an expert has more than two threads' share: too long for a chain."""
        if torch.get_num_threads() * int(self.counts.max()) <= 2 * self.rows:
            return None
        most_segments = self.rows // max(1, self.target // 2) + self.experts
        return self.new((self.rows + 16 * most_segments) * (self.inputs + self.width))

    def run(self, name: str, *args: native.Argument, strides: tuple[int, int, int] = (0, 0, 0)) -> None:
        """`strides`: of the gradients of matrices, and whether to add to them."""
        sizes = (self.x.shape[0], self.rows, self.experts, self.dim, self.width, self.inputs, self.target)
        sizes = (*sizes, self.w1.stride(0), self.w2.stride(0), *strides)
        given = (self.x, _pointer(self.w1), _pointer(self.w2), self.counts, *self.routes, *args)
        products = (native.gemm(self.dtype), native.gemm_threads())
        native.run(name, self.stored, *products, *given, torch.tensor(sizes), self.kind)


def _by_expert(matrices: Tensor) -> Tensor:
    """With every expert's matrices in one piece; what lies between experts does not matter."""
    return matrices if matrices[0].is_contiguous() else matrices.contiguous()


def _pointer(matrices: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(matrices.data_ptr())


def _segment(rows: int, row_bytes: int) -> int:
    """How many rows one task takes: enough to feed a matrix product, few enough for caches and for equal shares.

    By sizes only: sums over rows are cut where segments are, and must not depend on the number of threads.
    """
    cached = min(max(SEGMENT_BYTES // row_bytes, 256), 512)
    return _round_up(min(cached, max(64, rows // 16)))


def _round_up(size: int, step: int = 16) -> int:
    return -(-size // step) * step
