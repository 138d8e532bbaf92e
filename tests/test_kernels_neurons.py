"""Mixtures of single neurons on every engine, against plain indexing in float64."""

import pytest
import torch
import torch.nn.functional as F
from references import largest_error
from test_kernels import poison
from test_kernels_embedding_bag import PLACES, TOLERANCE, Place, place  # noqa: F401  # a fixture
from torch import Tensor

from moesaic.kernels import neurons
from moesaic.kernels.neurons import Activation, neuron_mix

SHAPES = [(1, 1, 1, 1), (7, 3, 11, 20), (2, 17, 6, 300), (4, 6, 1, 64), (0, 3, 4, 5), (3, 0, 4, 5)]
"""T, S, N, D."""


def arguments(shape: tuple[int, ...], *, same: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, u, v and weights; slots; the gradient of the output. In float64, x . u of order 1."""
    T, S, N, D = shape
    torch.manual_seed(0)
    slots = torch.full((T, S), N - 1) if same else torch.randint(0, N, (T, S))
    tensors = [torch.randn(T, D), torch.randn(N, D) * D**-0.5, torch.randn(N, D), torch.randn(T, S)]
    return [t.double() for t in tensors], slots, torch.randn(T, D).double()


def plain(x: Tensor, u: Tensor, v: Tensor, weights: Tensor, slots: Tensor, activation: str) -> Tensor:
    hidden = getattr(F, activation)(torch.einsum("td,tsd->ts", x, u[slots]))
    return torch.einsum("ts,tsd->td", weights * hidden, v[slots])


def check(
    place: Place,  # noqa: F811
    dtype: torch.dtype,
    inputs: tuple[list[Tensor], Tensor, Tensor],
    *,
    activation: Activation = "gelu",
    sparse: bool = False,
) -> None:
    """Output and gradients against the plain code on the same rounded numbers."""
    tensors, slots, grad = inputs
    tensors, slots, grad = [t.to(place.device, dtype) for t in tensors], slots.to(place.device), grad
    grad = grad.to(place.device, dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    want = plain(*exact, slots, activation)  # type: ignore[misc]
    grads = torch.autograd.grad(want, exact, grad.double())
    poison()
    given = [t.clone().requires_grad_() for t in tensors]
    x, u, v, weights = given
    options = {"activation": activation, "sparse_grad": sparse, "backend": place.backend}
    y = neuron_mix(x, u, v, slots, weights, **options)
    ours = torch.autograd.grad(y, given, grad)
    for got, known in zip((y, *ours), (want, *grads), strict=True):
        assert got.dtype == dtype
        assert got.shape == known.shape
        assert largest_error(got.to_dense().double(), known) < TOLERANCE[dtype]
    assert [t.is_sparse for t in ours] == [False, sparse, sparse, False]
    if sparse:
        for table in ours[1:3]:
            assert table.is_coalesced()
            assert torch.equal(table.indices()[0], slots.unique())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mix_of_neurons(place: Place, shape: tuple[int, ...], sparse: bool) -> None:  # noqa: F811
    for dtype in place.dtypes:
        check(place, dtype, arguments(shape), sparse=sparse)


def test_one_neuron_for_all(place: Place) -> None:  # noqa: F811
    for dtype in place.dtypes:
        check(place, dtype, arguments((9, 8, 5, 16), same=True))


def test_relu(place: Place) -> None:  # noqa: F811
    check(place, torch.float32, arguments((7, 3, 11, 20)), activation="relu")


@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_many_tokens(name: str) -> None:
    check(PLACES[name], torch.float32, arguments((513, 6, 5000, 33)), sparse=True)


def test_tables_may_have_another_type_than_tokens(place: Place) -> None:  # noqa: F811
    (x, u, v, weights), slots, grad = arguments((7, 3, 11, 20))
    slots, grad = slots.to(place.device), grad.to(place.device, torch.bfloat16)
    given = [t.to(place.device, torch.float32) for t in (x, u, v, weights)]
    given[0] = given[0].bfloat16()
    exact = [t.double().requires_grad_() for t in given]
    want = plain(*exact, slots, "gelu")  # type: ignore[misc]
    grads = torch.autograd.grad(want, exact, grad.double())
    x, u, v, weights = (t.requires_grad_() for t in given)
    y = neuron_mix(x, u, v, slots, weights, backend=place.backend)
    ours = torch.autograd.grad(y, (x, u, v, weights), grad)
    for got, known, leaf in zip((y, *ours), (want, *grads), (x, x, u, v, weights), strict=True):
        assert got.dtype == leaf.dtype
        assert largest_error(got.double(), known) < TOLERANCE[leaf.dtype]


def test_equal_inputs_give_equal_bits(place: Place) -> None:  # noqa: F811
    tensors, slots, grad = arguments((6, 5, 7, 40))
    slots, grad = slots.to(place.device), grad.to(place.device, torch.float32)
    results = []
    for sparse in (False, False, True):
        poison()
        x, u, v, weights = leaves = [t.to(place.device, torch.float32).requires_grad_() for t in tensors]
        y = neuron_mix(x, u, v, slots, weights, sparse_grad=sparse, backend=place.backend)
        results.append([t.to_dense() for t in (y, *torch.autograd.grad(y, leaves, grad))])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["cpp", "torch"])
def test_only_what_is_named_is_kept(name: str) -> None:
    tensors, slots, _ = arguments((7, 3, 11, 20))
    for sparse in (False, True):
        x, u, v, weights = leaves = [t.clone().requires_grad_() for t in tensors]
        kept: list[Tensor] = []

        def keep(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            neuron_mix(x, u, v, slots, weights, sparse_grad=sparse, backend=PLACES[name].backend)
        known = {t.data_ptr() for t in (*leaves, slots)}
        assert [t.shape for t in kept if t.data_ptr() not in known] == [slots.shape]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_frozen_tables_cost_nothing(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neurons, "row_sums", None)
    monkeypatch.setattr(neurons, "touched_row_sums", None)
    (x, u, v, weights), slots, grad = arguments((7, 3, 11, 20))
    y = neuron_mix(x.requires_grad_(), u, v, slots, weights, sparse_grad=sparse)
    want = torch.autograd.grad(plain(x, u, v, weights, slots, "gelu"), x, grad)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), want)


def test_one_frozen_table() -> None:
    for trained in (1, 2):
        tensors, slots, grad = arguments((7, 3, 11, 20))
        tensors[trained].requires_grad_()
        x, u, v, weights = tensors
        ours = torch.autograd.grad(neuron_mix(x, u, v, slots, weights), tensors[trained], grad)
        want = torch.autograd.grad(plain(x, u, v, weights, slots, "gelu"), tensors[trained], grad)
        torch.testing.assert_close(ours, want)


def test_what_does_not_fit() -> None:
    (x, u, v, weights), slots, _ = arguments((7, 3, 11, 20))
    with pytest.raises(ValueError, match=r"x must be \(7, 20\) for these slots and tables, not \(6, 20\)"):
        neuron_mix(x[:6], u, v, slots, weights)
    with pytest.raises(ValueError, match=r"\(11, 20\) and v torch\.float64 \(10, 20\) must be alike"):
        neuron_mix(x, u, v[:10], slots, weights)
    with pytest.raises(ValueError, match=r"'tanh'.*gelu, relu"):
        neuron_mix(x, u, v, slots, weights, activation="tanh")  # type: ignore[arg-type]
    slots[0, 0] = 11
    with pytest.raises(IndexError, match="the table has 11 rows"):
        neuron_mix(x, u, v, slots, weights)


def test_ops_are_consistent() -> None:
    (x, u, v, weights), slots, grad = arguments((5, 3, 8, 6))
    for table in (x, u, v, weights):
        table.requires_grad_()
    ops = torch.ops.moesaic
    torch.library.opcheck(ops.neuron_mix.default, (x, u, v, slots, weights, "gelu", "auto"))
    fixed = (grad, u.detach(), v.detach(), slots, weights.detach(), torch.randn(5, 3).double())
    torch.library.opcheck(ops.neuron_mix_backward.default, (*fixed, "gelu", "auto"))


def test_the_dense_path_compiles_whole(place: Place) -> None:  # noqa: F811
    def loss(x: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        y = neuron_mix(x, u, v, slots, weights.softmax(-1), backend=place.backend)
        return y.square().sum()

    tensors, slots, _ = arguments((5, 3, 8, 6))
    slots = slots.to(place.device)
    leaves = [t.to(place.device).requires_grad_() for t in tensors]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    want = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.equal(*pair) for pair in zip(ours, want, strict=True))
