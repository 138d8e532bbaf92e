"""Experts that lie in pieces against the same experts in one tensor: output, and every gradient in its place."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from references import largest_error
from test_kernels_expert_mlp import TOLERANCE, backend_of, device_of, engine
from torch import Tensor

from moesaic.kernels.activation import KINDS, ExpertKind, input_matrices
from moesaic.kernels.expert_mlp import expert_rows
from moesaic.kernels.expert_rows import ExpertPieces, expert_rows_in_pieces

__all__ = ["engine"]  # a fixture

F, D = 24, 16


class Lying:
    """Experts in rows of two tables, alternately, and their gradients in tables of other types, cut elsewhere."""

    freed = False

    def __init__(self, whole: Tensor, cuts: Sequence[int], wide: torch.dtype) -> None:
        self.pieces = [part.clone() for part in whole.split(cuts)]
        many, length = whole.shape
        self.first = torch.full((many // 2, length), torch.nan, dtype=wide, device=whole.device)
        self.second = torch.full(
            (many - many // 2, 2 * length), torch.nan, dtype=whole.dtype, device=whole.device
        )
        self.passes = 0

    def rows(self) -> list[Tensor]:
        return self.pieces

    def gradients(self) -> tuple[list[Tensor], list[bool]]:
        """The first table's are added to from the second pass on; the second's are written every time."""
        self.passes += 1
        return self.boxes, [self.passes > 1, False]

    @property
    def boxes(self) -> list[Tensor]:
        return [self.first, self.second[:, self.first.shape[1] :]]


def cut(rows: Tensor, kind: ExpertKind) -> tuple[Tensor, Tensor]:
    g = input_matrices(kind)
    return rows[:, : g * F * D].unflatten(1, (g, F, D)), rows[:, g * F * D :].unflatten(1, (D, F))


@pytest.mark.parametrize(
    ("counts", "cuts"),
    [
        ([5, 0, 9, 2], [4]),
        ([5, 0, 9, 2], [1, 2, 1]),
        ([0, 0, 0, 0], [2, 2]),
        ([0, 0, 0, 300], [1, 3]),
        ([7], [1]),
        ([], [0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_written_where_they_belong(
    engine: str, counts: list[int], cuts: list[int], dtype: torch.dtype
) -> None:
    compare(engine, counts, cuts, dtype, "swiglu")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(engine: str, kind: ExpertKind) -> None:
    compare(engine, [4, 3], [1, 1], torch.float32, kind)


def compare(engine: str, counts: list[int], cuts: list[int], dtype: torch.dtype, kind: ExpertKind) -> None:
    device, rows, g = device_of(engine), sum(counts), input_matrices(kind)
    torch.manual_seed(0)
    whole = (torch.randn(len(counts), g * F * D + D * F, device=device) / 4).to(dtype)
    x, grad = (torch.randn(rows, D, device=device).to(dtype) for _ in range(2))
    held = torch.tensor(counts, device=device, dtype=torch.int64)
    settings: dict[str, Any] = {"kind": kind, "backend": backend_of(engine)}
    plain = [t.contiguous().requires_grad_() for t in (x, *cut(whole, kind))]
    y = expert_rows(plain[0], plain[1], plain[2], held, **settings)
    want = torch.autograd.grad(y, plain, grad)
    want_rows = torch.cat([part.flatten(1) for part in want[1:]], 1).double()

    store, leaf = Lying(whole, cuts, torch.float32), torch.zeros(1, device=device, requires_grad=True)
    link = leaf.view_as(leaf)  # out of an operation
    x = x.requires_grad_()
    with torch.no_grad():
        unkept = expert_rows_in_pieces(x, ExpertPieces(store, link), held, **settings)
        assert torch.equal(unkept, expert_rows(plain[0], plain[1], plain[2], held, **settings))
    got = expert_rows_in_pieces(x, ExpertPieces(store, link), held, **settings)
    assert torch.equal(got, y)
    (alone,) = torch.autograd.grad(got, [x], grad, retain_graph=True)
    assert torch.equal(alone, want[0])
    assert not store.passes, "nobody asked for gradients of matrices"
    for times in (1, 2):
        back = torch.autograd.grad(got, [x, leaf], grad, retain_graph=True, allow_unused=True)
        assert torch.equal(back[0], want[0])
        assert back[1] is None
        assert store.passes == times
        first, second = store.boxes
        for ours, theirs in (
            (first, times * want_rows[: len(first)]),
            (second, want_rows[len(first) :]),
        ):
            assert not len(ours) or largest_error(ours.double(), theirs) < TOLERANCE[dtype]
    assert store.second[:, : first.shape[1]].isnan().all(), "written beside the rows"


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    store, leaf = Lying(torch.randn(2, 3 * F * D), [1, 1], torch.float32), torch.zeros(1, requires_grad=True)
    y = expert_rows_in_pieces(
        torch.randn(5, D), ExpertPieces(store, leaf.view_as(leaf)), torch.tensor([2, 3]), kind="swiglu"
    )
    store.pieces[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_rows_that_are_freed_are_asked_for_again() -> None:
    """And autograd keeps none of them."""
    store, leaf = Lying(torch.randn(2, 3 * F * D), [1, 1], torch.float32), torch.zeros(1, requires_grad=True)
    store.freed = True
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = expert_rows_in_pieces(
            torch.randn(5, D), ExpertPieces(store, leaf.view_as(leaf)), torch.tensor([2, 3]), kind="swiglu"
        )
    pieces = store.pieces
    here = {piece.data_ptr() for piece in store.pieces}
    assert saved
    assert not here & {tensor.data_ptr() for tensor in saved}
    store.pieces = [torch.full_like(piece, torch.nan) for piece in store.pieces]
    y.sum().backward(retain_graph=True)
    assert torch.cat([box.flatten() for box in store.boxes]).isnan().any()
    store.pieces, store.passes = pieces, 0
    y.sum().backward()
    assert torch.cat([box.flatten() for box in store.boxes]).isfinite().all()


def test_ops_are_consistent(engine: str) -> None:
    device = device_of(engine)
    pieces = [torch.randn(n, 3 * F * D, device=device) / 4 for n in (1, 2)]
    boxes = [torch.randn(3, 3 * F * D, device=device)]
    x, counts = torch.randn(7, D, device=device), torch.tensor([2, 0, 5], device=device)
    settings = (counts, "swiglu", backend_of(engine))
    ops = torch.ops.moesaic
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.expert_rows_in_pieces.default, (x, pieces, *settings, True), test_utils=checks)
    _, hidden = ops.expert_rows_in_pieces(x, pieces, *settings, True)
    given = (torch.randn_like(x), x, pieces, hidden, *settings, boxes, [True])
    torch.library.opcheck(ops.expert_rows_in_pieces_backward.default, given, test_utils=checks)
