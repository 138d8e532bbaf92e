"""The experts' op for experts that lie in pieces: each expert's matrices in a row of some table, w1 and then w2.

So it is where experts have owners: own ones are rows of the table that the optimizer steps through, copies are rows as
they arrived. Nothing is put together where the C++ kernels serve; gradients are written, or added, to rows of the
caller's, and autograd sees none.

Dims: N rows, D width, F hidden width, G input matrices per expert, E experts, L length of a row of matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import expert_mlp_cpu
from moesaic.kernels.activation import ExpertKind
from moesaic.kernels.backend import Backend
from moesaic.kernels.combine import accumulation_dtype
from moesaic.kernels.expert_mlp import engine_of


class Store(Protocol):
    """Experts that lie in pieces; all pieces one after the other are all experts."""

    freed: bool
    """Whether rows are gone after the forward pass and here again for the backward pass; else autograd keeps them."""

    def rows(self) -> list[Float[Tensor, "n L"]]:
        """The matrices."""
        ...

    def gradients(self) -> tuple[list[Float[Tensor, "n L"]], list[bool]]:
        """Where gradients belong, in pieces too, but cut anywhere, and of each whether to add to what is there."""
        ...


@dataclass(frozen=True)
class ExpertPieces:
    """A store, and its place in the graph."""

    store: Store
    link: Tensor
    """Output of some op. A backward pass that goes through that op has the gradients written; it gets none itself."""


def expert_rows_in_pieces(
    rows: Float[Tensor, "N D"],
    experts: ExpertPieces,
    counts: Int[Tensor, " E"],
    *,
    kind: ExpertKind,
    backend: Backend = "auto",
) -> Float[Tensor, "N D"]:
    """`expert_rows`: the first `counts[0]` rows go through the first expert, and so on. Differentiable once.

    Raises RuntimeError in a backward pass where rows that autograd keeps have been written to meanwhile.
    """
    if torch.is_grad_enabled():
        return _InPieces.apply(rows, experts.link, counts, kind, backend, experts.store)  # type: ignore[no-any-return]
    return _forward(rows, experts.store.rows(), counts, kind, backend, False)[0]


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, link: Tensor, counts: Tensor, kind: str, backend: str, store: Store
    ) -> Tensor:
        pieces = store.rows()
        out, hidden = _forward(rows, pieces, counts, kind, backend, True)
        ctx.save_for_backward(rows, hidden, counts, *([] if store.freed else pieces))
        ctx.kind, ctx.backend, ctx.store = kind, backend, store
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, counts, *pieces = ctx.saved_tensors
        if ctx.store.freed:
            pieces = ctx.store.rows()
        link = ctx.next_functions[1][0]
        if link is not None and torch._C._will_engine_execute_node(link):
            boxes, add = ctx.store.gradients()
        else:  # nobody asked for them
            boxes, add = [torch.empty_like(piece) for piece in pieces], [False] * len(pieces)
        grad_x = _backward(grads[0], x, pieces, hidden, counts, ctx.kind, ctx.backend, boxes, add)
        return grad_x, *(None,) * 5


@torch.library.custom_op("moesaic::expert_rows_in_pieces", mutates_args=())
def _forward(
    x: Tensor, pieces: Sequence[Tensor], counts: Tensor, kind: str, backend: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its non-linearity, or nothing where there will be no backward pass."""
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), x.new_empty(0)
    module = engine_of(backend, x, *pieces)
    if module is expert_mlp_cpu:
        wide = [piece.to(accumulation_dtype(x.dtype)) for piece in pieces]
        experts = expert_mlp_cpu.together(wide, kind, x.shape[1])
        return expert_mlp_cpu.forward_of(x, experts, counts, None, kind, keep)
    w1, w2 = _put_together(pieces, kind, x.shape[1])
    return module.forward(x, w1, w2, counts, None, kind, backend, keep)


@_forward.register_fake
def _(x, pieces, counts, kind, backend, keep):
    inputs, _ = expert_mlp_cpu.sizes_of_row(pieces, kind, x.shape[1])
    return x.new_empty(x.shape), x.new_empty((x.shape[0], inputs) if keep and x.shape[0] else 0)


@torch.library.custom_op("moesaic::expert_rows_in_pieces_backward", mutates_args=("boxes",))
def _backward(
    grad: Tensor,
    x: Tensor,
    pieces: Sequence[Tensor],
    hidden: Tensor,
    counts: Tensor,
    kind: str,
    backend: str,
    boxes: Sequence[Tensor],
    add: Sequence[bool],
) -> Tensor:
    """The gradient of x; those of the matrices are written to `boxes`, or added."""
    if x.shape[0] == 0:
        for box, more in zip(boxes, add, strict=True):
            if not more:
                box.zero_()
        return x.new_zeros(x.shape)
    module, dim = engine_of(backend, x, *pieces), x.shape[1]
    if module is not expert_mlp_cpu:
        w1, w2 = _put_together(pieces, kind, dim)
        grad_x, *found, _ = module.backward(grad.contiguous(), x, w1, w2, hidden, counts, None, kind, backend)
        sizes = [len(box) for box in boxes]
        for part, columns in zip(found, (slice(w1[0].numel()), slice(w1[0].numel(), None)), strict=True):
            for box, more, rows in zip(boxes, add, part.flatten(1).split(sizes), strict=True):
                _put(box[:, columns], rows, more)
        return grad_x
    wide = accumulation_dtype(x.dtype)
    experts = expert_mlp_cpu.together([piece.to(wide) for piece in pieces], kind, dim)
    # in another type, elsewhere first
    own = [box if box.dtype == wide else torch.empty_like(box, dtype=wide) for box in boxes]
    adds = [more and box is mine for box, more, mine in zip(boxes, add, own, strict=True)]
    add_each = torch.tensor(adds).repeat_interleave(torch.tensor([len(box) for box in boxes])).long()
    grads = expert_mlp_cpu.together(own, kind, dim)
    grad_x, _ = expert_mlp_cpu.backward_of(
        grad.contiguous(), x, experts, grads, add_each, hidden, counts, None, kind
    )
    for box, more, mine in zip(boxes, add, own, strict=True):
        if mine is not box:
            _put(box, mine, more)
    return grad_x


@_backward.register_fake
def _(grad, x, pieces, hidden, counts, kind, backend, boxes, add):
    return x.new_empty(x.shape)


def _put(box: Tensor, values: Tensor, add: bool) -> None:
    if add:
        box += values
    else:
        box.copy_(values)


def _put_together(pieces: Sequence[Tensor], kind: str, dim: int) -> tuple[Tensor, Tensor]:
    """w1 (E, G, F, D) and w2 (E, D, F); of one piece, as it lies."""
    rows = pieces[0] if len(pieces) == 1 else torch.cat([*pieces])
    inputs, width = expert_mlp_cpu.sizes_of_row(pieces, kind, dim)
    cut = inputs * dim
    return rows[:, :cut].unflatten(1, (inputs // width, width, dim)), rows[:, cut:].unflatten(1, (dim, width))
