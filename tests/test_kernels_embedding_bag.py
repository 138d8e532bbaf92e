"""Weighted bags and the gradients of rows by a reverse index, on every engine, against plain indexing in float64."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from references import largest_error
from test_kernels import poison
from torch import Tensor

from moesaic.kernels import embedding_bag, native
from moesaic.kernels.backend import Backend, triton_refusal
from moesaic.kernels.embedding_bag import weighted_bag
from moesaic.kernels.pages import ask_for_large_pages
from moesaic.kernels.reverse_index import row_sums, touched_row_sums

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
SHAPES = [
    (1, 1, 1, 1),
    (7, 3, 11, 20),
    (5, 17, 6, 300),
    (4, 6, 1, 64),
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (2, 3, 4, 0),
]
"""T, S, N, D; the third has more slots and columns than one tile, and rows that nothing reads."""


class Place(NamedTuple):
    """Where a test runs."""

    backend: Backend
    device: str
    dtypes: tuple[torch.dtype, ...]


CPP = Place("auto", "cpu", (torch.float64, torch.float32))
PLACES = {
    "cpp": CPP,
    "torch": Place("torch", "cpu", (torch.float64, torch.float32, torch.bfloat16)),
    "triton": Place("triton", "cpu", tuple(TOLERANCE)),
    "torch-gpu": Place("torch", "cuda", (torch.float64, torch.float32, torch.bfloat16)),
    "triton-gpu": Place("triton", "cuda", tuple(TOLERANCE)),
}


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu if "gpu" in name else ()) for name in PLACES]
)
def place(request: pytest.FixtureRequest) -> Place:
    """Every engine on every device that has it."""
    chosen = PLACES[request.param]
    if request.param == "cpp" and not native.serves(torch.ones(1)):
        pytest.skip(native.status())
    if chosen.backend == "triton" and triton_refusal(torch.device(chosen.device)):
        pytest.skip("triton interprets its kernels only where there is no GPU")
    return chosen


def arguments(shape: tuple[int, ...], *, same: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Table, slots, weights and the gradient of the output, in float64."""
    T, S, N, D = shape
    torch.manual_seed(0)
    slots = torch.full((T, S), N - 1) if same else torch.randint(0, N, (T, S))
    return tuple(  # type: ignore[return-value]
        t.double() if t.is_floating_point() else t
        for t in (torch.randn(N, D), slots, torch.randn(T, S), torch.randn(T, D))
    )


def plain(table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    return (weights[..., None] * table[slots]).sum(1)


def check(place: Place, dtype: torch.dtype, inputs: tuple[Tensor, ...], *, sparse: bool) -> None:
    """Output and gradients against the plain code on the same rounded numbers."""
    table, slots, weights, grad = (
        t.to(place.device, dtype if t.is_floating_point() else None) for t in inputs
    )
    exact = [t.double().requires_grad_() for t in (table, weights)]
    want = plain(exact[0], slots, exact[1])
    grads = torch.autograd.grad(want, exact, grad.double())
    poison()
    given = [t.clone().requires_grad_() for t in (table, weights)]
    y = weighted_bag(given[0], slots, given[1], sparse_grad=sparse, backend=place.backend)
    ours = torch.autograd.grad(y, given, grad)
    for got, known in zip((y, *ours), (want, *grads), strict=True):
        assert got.dtype == dtype
        assert got.shape == known.shape
        assert largest_error(got.to_dense().double(), known) < TOLERANCE[dtype]
    assert ours[0].is_sparse == sparse
    if sparse:
        assert ours[0].is_coalesced()
        assert torch.equal(ours[0].indices()[0], slots.unique())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bag_is_a_weighted_sum(place: Place, shape: tuple[int, ...], sparse: bool) -> None:
    for dtype in place.dtypes:
        check(place, dtype, arguments(shape), sparse=sparse)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_one_row_for_all(place: Place, sparse: bool) -> None:
    for dtype in place.dtypes:
        check(place, dtype, arguments((9, 8, 5, 16), same=True), sparse=sparse)


def test_many_tokens() -> None:
    for name in ("cpp", "torch"):
        check(PLACES[name], torch.float32, arguments((513, 6, 5000, 33)), sparse=True)
        check(PLACES[name], torch.float32, arguments((513, 6, 5000, 33)), sparse=False)


def test_equal_inputs_give_equal_bits(place: Place) -> None:
    table, slots, weights, grad = (
        t.to(place.device, torch.float32 if t.is_floating_point() else None)
        for t in arguments((12, 9, 7, 40))
    )
    results = []
    for sparse in (False, False, True):
        poison()
        leaves = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = weighted_bag(leaves[0], slots, leaves[1], sparse_grad=sparse, backend=place.backend)
        results.append([t.to_dense() for t in (y, *torch.autograd.grad(y, leaves, grad))])
    for other in results[1:]:  # the sparse gradient sums in the order of the dense one
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.skipif(not native.serves(torch.ones(1)), reason=native.status())
@pytest.mark.parametrize("rows", [3, 70_000], ids=["long runs", "several digits"])
def test_threads_change_no_bit(rows: int) -> None:
    table, slots, weights, grad = (
        t.float() if t.is_floating_point() else t for t in arguments((100, 7, rows, 24))
    )
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = weighted_bag(leaves[0], slots, leaves[1], sparse_grad=True)
        results.append([y, *(t.to_dense() for t in torch.autograd.grad(y, leaves, grad))])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_weights_may_have_another_type(place: Place) -> None:
    table, slots, weights, grad = (t.to(place.device) for t in arguments((7, 3, 11, 20)))
    table = table.bfloat16().requires_grad_()
    weights = weights.float().requires_grad_()
    y = weighted_bag(table, slots, weights, backend=place.backend)
    ours = torch.autograd.grad(y, (table, weights), grad.bfloat16())
    assert [t.dtype for t in (y, *ours)] == [torch.bfloat16, torch.bfloat16, torch.float32]
    want = torch.einsum("td,tsd->ts", grad.bfloat16().double(), table.double()[slots])
    assert largest_error(ours[1].double(), want) < TOLERANCE[torch.float32]


def test_layers_that_share_a_table_add_up(place: Place) -> None:
    table, slots, weights, _ = (
        t.to(place.device, torch.float32 if t.is_floating_point() else None) for t in arguments((6, 4, 9, 20))
    )
    dense, sparse = (table.clone().requires_grad_() for _ in range(2))
    for leaf, sparse_grad in ((dense, False), (sparse, True)):
        options = {"sparse_grad": sparse_grad, "backend": place.backend}
        first = weighted_bag(leaf, slots, weights, **options)
        (first + weighted_bag(leaf, slots.flip(0) // 2, weights, **options)).square().sum().backward()
    assert dense.grad is not None
    assert sparse.grad is not None
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)


def test_strides(place: Place) -> None:
    table, slots, weights, grad = (t.to(place.device) for t in arguments((7, 4, 8, 6)))
    leaves = [table.T.contiguous().T.requires_grad_(), weights.T.contiguous().T.requires_grad_()]
    strided = slots.T.contiguous().T
    y = weighted_bag(leaves[0], strided, leaves[1], backend=place.backend)
    exact = [table.clone().requires_grad_(), weights.clone().requires_grad_()]
    want = plain(exact[0], slots, exact[1])
    upstream = grad.T.contiguous().T
    ours = torch.autograd.grad(y, leaves, upstream)
    for got, known in zip((y, *ours), (want, *torch.autograd.grad(want, exact, grad)), strict=True):
        torch.testing.assert_close(got, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_frozen_table_costs_nothing(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_bag, "row_sums", None)
    monkeypatch.setattr(embedding_bag, "touched_row_sums", None)
    table, slots, weights, grad = arguments((7, 3, 11, 20))
    weighted_bag(table, slots, weights.requires_grad_(), sparse_grad=sparse).backward(grad)
    want = torch.einsum("td,tsd->ts", grad, table[slots])
    torch.testing.assert_close(weights.grad, want)


def test_slots_outside_of_the_table(place: Place) -> None:
    if place.device != "cpu":
        pytest.skip("GPUs do not look")
    table, slots, weights, _ = arguments((7, 3, 11, 20))
    for wrong in (-1, 11):
        slots[2, 1] = wrong
        with pytest.raises(IndexError, match=f"{wrong}.* the table has 11 rows"):
            weighted_bag(table, slots, weights, backend=place.backend)


def test_shapes_that_do_not_fit() -> None:
    table, slots, weights, _ = arguments((7, 3, 11, 20))
    with pytest.raises(ValueError, match=r"weights \(7, 2\) must have the shape of slots \(7, 3\)"):
        weighted_bag(table, slots, weights[:, :2])
    with pytest.raises(ValueError, match=r"slots \(T, S\), not \(11, 20\) and \(7,\)"):
        weighted_bag(table, slots[:, 0], weights)
    with pytest.raises(ValueError, match=r"slots must be int64, not torch\.int32"):
        weighted_bag(table, slots.int(), weights)


def test_row_sums_of_several_sources(place: Place) -> None:
    backend = place.backend
    torch.manual_seed(0)
    slots = torch.randint(0, 9, (6, 5)).to(place.device)
    sources = [torch.randn(6, width).to(place.device) for width in (12, 7)]
    factors = [torch.randn(6, 5).to(place.device) for _ in range(2)]
    poison()
    dense = row_sums(slots, sources, factors, 30, dtype=torch.float32, backend=backend)
    sparse = touched_row_sums(slots, sources, factors, 30, dtype=torch.float32, backend=backend)
    for source, factor, ours, row_sparse in zip(sources, factors, dense, sparse, strict=True):
        parts = (factor[..., None] * source[:, None]).double().flatten(0, 1)
        want = parts.new_zeros(30, source.shape[1]).index_add_(0, slots.flatten(), parts)
        assert largest_error(ours.double(), want) < TOLERANCE[torch.float32]
        assert torch.equal(row_sparse.to_dense(), ours)


def test_ops_are_consistent() -> None:
    table, slots, weights, grad = arguments((5, 3, 8, 6))
    ops = torch.ops.moesaic
    leaves = (table.requires_grad_(), slots, weights.requires_grad_())
    torch.library.opcheck(ops.weighted_bag.default, (*leaves, "auto"))
    fixed = (table.detach(), slots, weights.detach())
    torch.library.opcheck(ops.weighted_bag_weights.default, (grad, *fixed[:2], torch.float64, "auto"))
    given = (slots, [grad, grad], [fixed[2], fixed[2]], 8, torch.float64, "auto")
    torch.library.opcheck(ops.row_sums.default, given)


def test_the_dense_path_compiles_whole(place: Place) -> None:
    def loss(table: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        return weighted_bag(table, slots, weights.softmax(-1), backend=place.backend).square().sum()

    table, slots, weights, _ = (t.to(place.device) for t in arguments((5, 3, 8, 6)))
    leaves = (table.requires_grad_(), weights.requires_grad_())
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(leaves[0], slots, leaves[1]), leaves)
    want = torch.autograd.grad(loss(leaves[0], slots, leaves[1]), leaves)
    assert all(torch.equal(*pair) for pair in zip(ours, want, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_second_derivatives_are_refused(sparse: bool) -> None:
    table, slots, weights, grad = arguments((5, 3, 8, 6))
    leaves = (table.requires_grad_(), weights.requires_grad_())
    y = weighted_bag(leaves[0], slots, leaves[1], sparse_grad=sparse)
    first = torch.autograd.grad(y, leaves[1], grad, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), leaves[0])


@pytest.mark.parametrize("size", [1, 10_000, 3 << 20])
def test_large_pages_change_no_value(size: int) -> None:
    whole = torch.zeros(size + 3)
    part = ask_for_large_pages(whole[3:].fill_(2))
    assert part.sum() == 2 * size
    assert whole[:3].sum() == 0


def test_large_pages_are_asked_for() -> None:
    smaps = Path("/proc/self/smaps")
    if not smaps.exists() or "VmFlags" not in smaps.read_text():
        pytest.skip("no list of this process's pages")

    def flags(address: int) -> list[str]:
        found = re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", smaps.read_text(), re.M | re.S)
        return next(m[3].split() for m in found if int(m[1], 16) <= address < int(m[2], 16))

    tensor = torch.empty(16 << 20)
    middle = tensor.data_ptr() + tensor.nbytes // 2
    assert "hg" not in flags(middle)
    ask_for_large_pages(tensor)
    assert "hg" in flags(middle)
