"""Balanced assignment: exact quotas for any scores, the optimum of scipy, and the same tokens from every engine."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moesaic.kernels import auction, native
from moesaic.kernels.auction import balanced_assignment, quotas
from moesaic.kernels.backend import Backend

BACKENDS: dict[str, Backend] = {"cpp": "auto", "torch": "torch", "triton": "triton"}
SHAPES = [(256, 16), (250, 7), (64, 64), (33, 4), (7, 3), (5, 7), (2, 2), (1, 5), (9, 1)]

QUICK = [("clusters", (33, 4)), ("clusters", (5, 7)), ("gaussian", (2, 2)), ("gaussian", (9, 1))]
"""What the interpreter takes on in the fast tests."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every engine that runs here."""
    if request.param == "triton":
        pytest.importorskip("triton")
    if request.param == "cpp" and not native.serves(torch.ones(1)):
        pytest.skip(native.status())
    return BACKENDS[request.param]


def gaussian(T: int, E: int) -> Tensor:
    return torch.randn(T, E)


def scaled_row(T: int, E: int) -> Tensor:
    scores = gaussian(T, E)
    scores[T // 2 : T // 2 + 1] *= 1e6
    return scores


def preferred(T: int, E: int) -> Tensor:
    return gaussian(T, E) + 100 * (torch.arange(E) == E // 2)


def clusters(T: int, E: int) -> Tensor:
    """Three kinds of tokens, nearly equal within a kind."""
    return gaussian(3, E)[torch.randint(0, 3, (T,))] + 0.02 * gaussian(T, E)


def duplicates(T: int, E: int) -> Tensor:
    return gaussian(max(T // 8, 1), E)[torch.randint(0, max(T // 8, 1), (T,))]


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "equal": lambda T, E: torch.full((T, E), 0.3),
    "equal rows": lambda T, E: gaussian(1, E).expand(T, E),
    "equal columns": lambda T, E: gaussian(T, 1).expand(T, E),
    "scaled row": scaled_row,
    "preferred": preferred,
    "near ties": lambda T, E: gaussian(1, E) + 1e-5 * gaussian(T, E),
    "huge offset": lambda T, E: gaussian(T, E) + 1e6,
    "huge": lambda T, E: gaussian(T, E) * 1e37,
    "1e30": lambda T, E: torch.where(gaussian(T, E) > 1, 1e30, gaussian(T, E)),
    "tiny": lambda T, E: gaussian(T, E) * 1e-38,
    "rank 1": lambda T, E: gaussian(T, 1) * gaussian(1, E),
    "few values": lambda T, E: torch.randint(0, 3, (T, E)).float(),
    "clusters": clusters,
    "duplicates": duplicates,
}


def make(kind: str, T: int, E: int, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return KINDS[kind](T, E)


def total(scores: Tensor, chosen: Tensor) -> float:
    return scores.double().gather(1, chosen[:, None]).sum().item()


def optimum(scores: Tensor) -> float:
    """By scipy, with a column for every place."""
    places = np.repeat(scores.double().numpy(), quotas(*scores.shape), axis=1)
    rows, columns = linear_sum_assignment(places, maximize=True)
    return places[rows, columns].sum()


def check(scores: Tensor, chosen: Tensor) -> None:
    T, E = scores.shape
    assert chosen.dtype == torch.int64
    assert chosen.bincount(minlength=E).tolist() == quotas(T, E)
    best = optimum(scores)
    exact = scores.double()
    rounding = T * (exact.amax(1) - exact.amin(1)).max().item() * 2.0**-auction.BITS
    assert total(scores, chosen) >= best - rounding - 1e-12 * abs(best)


def test_quotas() -> None:
    assert quotas(7, 3) == [3, 2, 2]
    assert quotas(2, 4) == [1, 1, 0, 0]
    assert quotas(0, 2) == [0, 0]
    assert quotas(8, 4) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(kind, shape, marks=() if (kind, shape) in QUICK else pytest.mark.slow_interpreted)
        for kind in KINDS
        for shape in SHAPES
    ],
    ids=str,
)
def test_quotas_are_exact_and_the_total_is_optimal(
    kind: str, shape: tuple[int, int], backend: Backend
) -> None:
    if backend == "triton" and shape[0] > 33:
        pytest.skip("slow in the interpreter; other tests compare it with the other engines")
    scores = make(kind, *shape)
    check(scores, balanced_assignment(scores, backend=backend))


@settings(max_examples=50, deadline=None)
@given(
    T=st.integers(0, 60),
    E=st.integers(1, 12),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
def test_any_shape(T: int, E: int, kind: str, seed: int, wide: bool) -> None:
    scores = make(kind, T, E, seed)
    if wide:
        scores = scores.double()
    chosen = balanced_assignment(scores, backend="torch")
    if T:
        check(scores, chosen)
    assert chosen.shape == (T,)
    assert balanced_assignment(scores).equal(chosen)  # C++, where it is there


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_scores(data: st.DataObject) -> None:
    T, E = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    floats = st.floats(width=32, allow_subnormal=False)  # with infinities and NaN
    scores = torch.tensor(
        data.draw(st.lists(st.lists(floats, min_size=E, max_size=E), min_size=T, max_size=T))
    )
    chosen = balanced_assignment(scores, backend="torch")
    assert chosen.bincount(minlength=E).tolist() == quotas(T, E)
    assert balanced_assignment(scores).equal(chosen)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=() if kind in ("rank 1", "equal rows", "few values") else pytest.mark.slow_interpreted,
        )
        for kind in KINDS
    ],
)
def test_repair_alone_is_optimal(kind: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the price rounds, most tokens move along paths."""
    monkeypatch.setattr(auction, "LEVELS", 0)
    monkeypatch.setattr(auction, "ROUNDS", 0)
    if backend == "triton":
        from moesaic.kernels.triton import auction as gpu

        monkeypatch.setattr(gpu, "KINDS", [(gpu.NOTHING, gpu.LAST)])
    scores = make(kind, 41, 6) if backend == "triton" else make(kind, 250, 12)
    chosen = balanced_assignment(scores, backend=backend)
    check(scores, chosen)
    assert chosen.equal(balanced_assignment(scores, backend="torch"))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("gaussian", "1e30", "rank 1")]


@pytest.mark.parametrize("kind", ["scaled row", "few values", "clusters", *SLOW])
def test_engines_agree(kind: str) -> None:
    pytest.importorskip("triton")
    scores = make(kind, 75, 6)
    want = balanced_assignment(scores, backend="torch")
    assert balanced_assignment(scores, backend="auto").equal(want)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert balanced_assignment(scores.to(device), backend="triton").cpu().equal(want)


@pytest.mark.slow
def test_more_tokens_than_one_program_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds: the interpreter is slow."""
    pytest.importorskip("triton")
    from moesaic.kernels.triton import auction as gpu

    monkeypatch.setattr(auction, "LEVELS", 2)
    monkeypatch.setattr(auction, "ROUNDS", 4)
    rounds = 2 * auction.PER_LEVEL
    first, last = gpu.KINDS[:rounds], gpu.KINDS[-4:]
    monkeypatch.setattr(gpu, "KINDS", [*first, (gpu.DITHERED, gpu.PLAIN), *last])
    scores = make("gaussian", 75, 70)  # 32 tokens each, and experts that are not a power of two
    want = balanced_assignment(scores, backend="torch")
    check(scores, want)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert balanced_assignment(scores.to(device), backend="triton").cpu().equal(want)


def test_prices_leave_little_to_repair() -> None:
    """Else the repair, which goes one path at a time, would take long."""
    for kind in ("gaussian", "equal rows", "near ties", "huge offset", "scaled row", "clusters"):
        values = auction._integers(make(kind, 2048, 32))
        quota = torch.tensor(quotas(*values.shape))
        count = auction._choose(values, auction._prices(values, quota)).bincount(minlength=32)
        ties = kind == "equal rows"  # of equal tokens all go to one expert, and many move along one path
        assert ties or (count - quota).clamp_min(0).sum() < 2048 * 0.05, kind


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.slow_interpreted),
        pytest.param(torch.float32, marks=pytest.mark.slow_interpreted),
        torch.float64,
    ],
)
def test_types_and_strides(dtype: torch.dtype, backend: Backend) -> None:
    scores = make("gaussian", 6, 40).to(dtype).T[:, ::2]  # (40, 3)
    chosen = balanced_assignment(scores, backend=backend)
    check(scores, chosen)
    assert chosen.equal(balanced_assignment(scores.contiguous().double(), backend="torch"))


def test_scores_that_are_not_finite(backend: Backend) -> None:
    scores = make("gaussian", 20, 4)
    replaced = scores.clone()
    lowest = scores.min()
    for row, value in enumerate([float("nan"), float("inf"), -float("inf")]):
        scores[row, row] = value
        replaced[row, row] = lowest
    scores[7], replaced[7] = float("nan"), lowest
    chosen = balanced_assignment(scores, backend=backend)
    assert chosen.equal(balanced_assignment(replaced, backend="torch"))
    check(replaced, chosen)
    none = torch.full((10, 4), float("nan"))
    assert balanced_assignment(none, backend=backend).bincount(minlength=4).tolist() == quotas(10, 4)


def test_largest_doubles() -> None:
    scores = make("gaussian", 30, 4).double().sign() * 1.7e308
    for backend in ("auto", "torch"):
        assert balanced_assignment(scores, backend=backend).bincount().tolist() == quotas(30, 4)


def test_few_tokens_and_few_experts(backend: Backend) -> None:
    assert balanced_assignment(torch.zeros(0, 3), backend=backend).shape == (0,)
    assert balanced_assignment(torch.zeros(0, 0), backend=backend).shape == (0,)
    assert balanced_assignment(torch.randn(5, 1), backend=backend).tolist() == [0] * 5
    assert balanced_assignment(torch.randn(1, 5), backend=backend).tolist() == [0]
    scores = torch.tensor([[0.0, 1, 9, 9], [1, 0, 9, 9]])
    assert balanced_assignment(scores, backend=backend).tolist() == [1, 0]


def test_permuted_experts() -> None:
    scores, order = make("gaussian", 120, 8), torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    for backend in ("auto", "torch"):
        moved = balanced_assignment(scores[:, order], backend=backend)
        assert order[moved].equal(balanced_assignment(scores, backend=backend))


def test_offsets_of_rows_and_columns_change_nothing() -> None:
    scores = make("gaussian", 120, 8).double()
    shifted = scores + torch.randn(120, 1).double() * 10 + torch.randn(8).double() * 10
    assert balanced_assignment(shifted).equal(balanced_assignment(scores))


@pytest.mark.parametrize("kind", ["gaussian", "few values", "clusters"])
def test_same_bits_twice_and_on_two_threads(kind: str) -> None:
    scores = make(kind, 700, 24)
    first = balanced_assignment(scores)
    assert balanced_assignment(scores).equal(first)
    torch.set_num_threads(2)
    assert balanced_assignment(scores).equal(first)
    assert balanced_assignment(scores, backend="torch").equal(first)


def test_op_is_consistent_and_compiles() -> None:
    scores = make("gaussian", 24, 4)
    torch.library.opcheck(torch.ops.moesaic.balanced_assignment.default, (scores, "torch"))
    want = balanced_assignment(scores)
    leaf = scores.clone().requires_grad_()
    assert not balanced_assignment(leaf).requires_grad
    compiled = torch.compile(balanced_assignment, backend="aot_eager", fullgraph=True)
    assert compiled(scores).equal(want)
    assert compiled(leaf).equal(want)


def test_refusals() -> None:
    for scores in (torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="must be floating-point"):
            balanced_assignment(scores)
    with pytest.raises(ValueError, match="no experts"):
        balanced_assignment(torch.zeros(3, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 64), (16384, 128), (1000, 33)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_agrees_and_does_not_wait(kind: str, shape: tuple[int, int]) -> None:
    scores = make(kind, *shape)
    on_gpu = scores.cuda()
    balanced_assignment(on_gpu, backend="triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = balanced_assignment(on_gpu, backend="triton")
        again = balanced_assignment(on_gpu, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chosen.equal(again)
    assert chosen.cpu().equal(balanced_assignment(scores))
    assert balanced_assignment(on_gpu, backend="torch").equal(chosen)
