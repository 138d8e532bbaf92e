"""The experts' op in C++ (`cpp/expert_mlp.cpp`), with the matrix products of torch's BLAS.

bf16 is computed in fp32; the hidden layer is kept in it. An expert's matrices are found by address, so that experts may
lie apart: in one tensor, or in rows of several.

Dims: T tokens, D width, F hidden width, G input matrices per expert, E experts, N rows, L length of a row of matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.activation import KINDS, input_matrices
from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.plan import Routes

SEGMENT_BYTES = 16 << 20
"""About what a thread works in."""


@dataclass(frozen=True)
class Matrices:
    """Where the matrices of experts lie, or their gradients."""

    first: Int[Tensor, " E"]
    """Address of each w1, (G, F, D)."""
    second: Int[Tensor, " E"]
    """Address of each w2, (D, F)."""
    inputs: int
    """G F."""
    width: int
    """F."""
    held: tuple[Tensor, ...]
    """What must outlive the addresses."""


def apart(w1: Float[Tensor, "E G F D"], w2: Float[Tensor, "E D F"]) -> Matrices:
    """Of tensors with every expert's matrices in one piece; what lies between experts does not matter."""
    inputs, width = w1.shape[1] * w1.shape[2], w1.shape[2]
    return Matrices(_addresses([w1]), _addresses([w2]), inputs, width, (w1, w2))


def together(pieces: Sequence[Float[Tensor, "n L"]], kind: str, dim: int) -> Matrices:
    """Of rows, which hold an expert each: w1, then w2. What lies between rows does not matter."""
    assert all(piece.stride(1) == 1 for piece in pieces)
    inputs, width = sizes_of_row(pieces, kind, dim)
    first = _addresses(pieces)
    size = pieces[0].element_size() if pieces else 0
    return Matrices(first, first + inputs * dim * size, inputs, width, tuple(pieces))


def sizes_of_row(pieces: Sequence[Tensor], kind: Any, dim: int) -> tuple[int, int]:
    """G F and F of rows of experts."""
    length = pieces[0].shape[1] if pieces else 0
    width = length // (dim * (input_matrices(kind) + 1))
    return input_matrices(kind) * width, width


def _addresses(pieces: Sequence[Tensor]) -> Int[Tensor, " E"]:
    """Of the first number of every entry."""
    found = [
        torch.arange(len(piece)) * (piece.stride(0) * piece.element_size()) + piece.data_ptr()
        for piece in pieces
    ]
    return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=torch.int64), *found])


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
    return forward_of(x, _widened(x, w1, w2), counts, routes, kind, keep)


def forward_of(
    x: Tensor, experts: Matrices, counts: Tensor, routes: Routes | None, kind: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """`forward` of experts that lie anywhere, in the type in which x is computed."""
    call = _Call(x, experts, counts, routes, kind)
    hidden = x.new_empty((call.rows, call.inputs) if keep else 0)
    y = call.new(*x.shape)
    rows = y if routes is None else call.new(call.rows, call.dim)
    memory = call.memory(call.dim + call.inputs + call.width)
    call.run("expert_mlp_forward", hidden if keep else None, rows, y, memory)
    return y.to(x.dtype), hidden


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    wide = accumulation_dtype(x.dtype)
    grad_w1, grad_w2 = x.new_empty(w1.shape, dtype=wide), x.new_empty(w2.shape, dtype=wide)
    grads, add = apart(grad_w1, grad_w2), torch.zeros_like(counts)
    grad_x, grad_gates = backward_of(grad, x, _widened(x, w1, w2), grads, add, hidden, counts, routes, kind)
    return grad_x, grad_w1.to(x.dtype), grad_w2.to(x.dtype), grad_gates


def backward_of(
    grad: Tensor,
    x: Tensor,
    experts: Matrices,
    grads: Matrices,
    add: Int[Tensor, " E"],
    hidden: Tensor,
    counts: Tensor,
    routes: Routes | None,
    kind: str,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and the gates; those of matrices are written to `grads`, or added where `add` is not 0."""
    call = _Call(x, experts, counts, routes, kind)
    grad_x = call.new(*x.shape)
    grad_gates = None if routes is None else call.new(call.rows)
    rows = grad_x if routes is None else call.new(call.rows, call.dim)
    memory = call.memory(2 * call.dim + call.inputs + call.width, call.inputs)
    found = (grad_x, grads.first, grads.second, add, grad_gates)
    call.run("expert_mlp_backward", grad.to(call.dtype), hidden, rows, *found, memory, call.kept())
    if routes is not None and grad_gates is not None:
        grad_gates = grad_gates.to(routes.gates.dtype)
    return grad_x.to(x.dtype), grad_gates


class _Call:
    """What both directions hand to C++: pointers, sizes, and memory to work in."""

    def __init__(
        self, x: Tensor, experts: Matrices, counts: Tensor, routes: Routes | None, kind: str
    ) -> None:
        self.dtype = accumulation_dtype(x.dtype)
        self.stored = x.dtype
        self.x = x.to(self.dtype).contiguous()
        self.experts, self.counts = experts, counts
        self.routes: tuple[Tensor | None, ...] = (None,) * 5
        if routes is not None:
            gates = routes.gates.to(self.dtype).contiguous()
            self.routes = (routes.tokens, routes.order, routes.where, routes.offsets, gates)
        self.rows = x.shape[0] if routes is None else routes.tokens.shape[0]
        self.dim, self.width, self.inputs = x.shape[1], experts.width, experts.inputs
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
        most_segments = self.rows // max(1, self.target // 2) + len(self.counts)
        return self.new((self.rows + 16 * most_segments) * (self.inputs + self.width))

    def run(self, name: str, *args: native.Argument) -> None:
        sizes = (self.x.shape[0], self.rows, len(self.counts), self.dim, self.width, self.inputs, self.target)
        given = (self.x, self.experts.first, self.experts.second, self.counts, *self.routes, *args)
        products = (native.gemm(self.dtype), native.gemm_threads())
        native.run(name, self.stored, *products, *given, torch.tensor(sizes), self.kind)


def _widened(x: Tensor, w1: Tensor, w2: Tensor) -> Matrices:
    """In the type in which x is computed, with every expert's matrices in one piece."""
    wide = [matrices.to(accumulation_dtype(x.dtype)) for matrices in (w1, w2)]
    return apart(*(matrices if matrices[0].is_contiguous() else matrices.contiguous() for matrices in wide))


def _segment(rows: int, row_bytes: int) -> int:
    """How many rows one task takes: enough to feed a matrix product, few enough for caches and for equal shares.

    By sizes only: sums over rows are cut where segments are, and must not depend on the number of threads.
    """
    cached = min(max(SEGMENT_BYTES // row_bytes, 256), 512)
    return _round_up(min(cached, max(64, rows // 16)))


def _round_up(size: int, step: int = 16) -> int:
    return -(-size // step) * step
