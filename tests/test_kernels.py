"""Every op against plain code, in C++ and in torch: values, gradients, odd and empty sizes, memory full of NaN."""

import pytest
import torch
import torch.nn.functional as F
from references import largest_error

from moesaic.kernels import native
from moesaic.kernels.activation import KINDS, ExpertKind, activate, activation, input_matrices
from moesaic.kernels.backend import Backend, triton_refusal
from moesaic.kernels.combine import combine_rows, gather_rows, sum_rows
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.kernels.grouped_linear import grouped_outer, grouped_product
from moesaic.kernels.rms_norm import rms_norm
from moesaic.kernels.rotary import normed_rotary

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
COUNTS = [[3, 0, 5, 1], [0, 0, 0], [0, 0, 7], [7, 0, 0], [513], [1] * 9, [130, 0, 1, 382]]


@pytest.fixture(autouse=True, params=["cpp", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    elif not native.serves(torch.ones(1)):
        pytest.skip(native.status())
    return request.param


def poison() -> None:
    """Leave NaN in the memory that the next allocations get."""
    for size in (64, 1000, 20_000, 200_000):
        torch.full((size,), float("nan"))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_products_are_products_per_group(counts: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), 7, dtype=torch.float64).to(dtype)
    weights = torch.randn(len(counts), 5, 7, dtype=torch.float64).to(dtype)
    grad = torch.randn(sum(counts), 5, dtype=torch.float64).to(dtype)
    parts = [part.double() for part in rows.split(counts)]
    want = torch.cat([part @ w.double().T for part, w in zip(parts, weights, strict=True)])
    grads = grad.double().split(counts)
    want_outer = torch.stack([g.T @ part for g, part in zip(grads, parts, strict=True)])

    poison()
    got = grouped_product(rows, weights, torch.tensor(counts))
    got_outer = grouped_outer(grad, rows, torch.tensor(counts))
    for ours, theirs in [(got, want), (got_outer, want_outer)]:
        assert ours.dtype == dtype
        assert largest_error(ours.double(), theirs) < TOLERANCE[dtype]


def assignments(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int | None]:
    """tokens of rows, row of each assignment, CSR offsets, T, K."""
    generator = torch.Generator().manual_seed(1)
    if kind == "regular":
        tokens = torch.arange(7).repeat_interleave(3)
    elif kind == "ragged":
        tokens = torch.tensor([0, 0, 2, 2, 2, 5])
    else:
        tokens = torch.zeros(0, dtype=torch.int64)
    row_of = torch.randperm(tokens.shape[0], generator=generator)
    by_row = torch.empty_like(tokens)
    by_row[row_of] = tokens
    offsets = F.pad(torch.bincount(tokens, minlength=7).cumsum(0), (1, 0))
    return by_row, row_of, offsets, 7, 3 if kind == "regular" else None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", ["regular", "ragged", "none"])
def test_sum_rows(kind: str, weighted: bool, dtype: torch.dtype) -> None:
    tokens, where, offsets, count, k = assignments(kind)
    torch.manual_seed(0)
    total = tokens.shape[0]
    rows = torch.randn(total, 5, dtype=torch.float64).to(dtype)
    weights = torch.rand(total, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    want = torch.zeros(count, 5, dtype=torch.float64)
    for assignment in range(total):
        row = int(where[assignment])
        want[tokens[row]] += (float(weights[assignment]) if weighted else 1) * rows[row].double()
    poison()
    got = sum_rows(rows, where, offsets, weights if weighted else None, per_token=k)
    assert got.dtype == dtype
    assert largest_error(got.double(), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("named", ["auto", "triton"])
def test_sum_rows_of_every_other_weight(named: Backend) -> None:
    """Weights that do not lie side by side."""
    if named == "triton" and (reason := triton_refusal(torch.device("cpu"))):
        pytest.skip(reason)
    _, where, offsets, _, k = assignments("regular")
    rows, weights = torch.randn(len(where), 5), torch.rand(len(where), 2)[:, 0]
    want = sum_rows(rows, where, offsets, weights.contiguous(), per_token=k, backend="torch")
    got = sum_rows(rows, where, offsets, weights, per_token=k, backend=named)
    assert largest_error(got, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["regular", "ragged", "none"])
@pytest.mark.parametrize("named", ["auto", "triton"])
def test_gather_and_combine(named: Backend, kind: str, dtype: torch.dtype, backend: str) -> None:
    if named == "triton":
        reason = triton_refusal(torch.device("cpu"))
        if reason or backend == "torch" or dtype == torch.float64:
            pytest.skip(reason or "the same as another case")
    tokens, where, offsets, count, k = assignments(kind)
    torch.manual_seed(0)
    total = tokens.shape[0]
    x = torch.randn(count, 5, dtype=torch.float64).to(dtype)
    weights = torch.rand(total, dtype=torch.float64).to(dtype if dtype == torch.float64 else torch.float32)
    grad = torch.randn(count, 5, dtype=torch.float64).to(dtype)

    def run(x: torch.Tensor, weights: torch.Tensor, *, ours: bool) -> torch.Tensor:
        if ours:
            rows = gather_rows(x, tokens, where, offsets, per_token=k, backend=named)
            return combine_rows(rows * 2, weights, tokens, where, offsets, per_token=k, backend=named)
        y = x * 0
        for assignment in range(total):
            row = int(where[assignment])
            onto = F.one_hot(tokens[row], count).to(x.dtype)[:, None]
            y = y + onto * (weights[assignment] * 2 * x[tokens[row]])
        return y

    results = []
    for ours in (True, False):
        poison()
        leaves = [t.clone().requires_grad_() if ours else t.double().requires_grad_() for t in (x, weights)]
        y = run(leaves[0], leaves[1], ours=ours)
        (y.to(grad.dtype if ours else torch.float64) * grad).sum().backward()
        results.append(
            [y, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]
        )
    for ours, theirs in zip(*results, strict=True):
        assert largest_error(ours.double(), theirs) < TOLERANCE[dtype]


def test_sums_have_a_fixed_order() -> None:
    rows = torch.randn(512 * 3, 64)
    where = torch.randperm(512 * 3)
    offsets = torch.arange(513) * 3
    first = sum_rows(rows, where, offsets, per_token=3)
    assert all(torch.equal(first, sum_rows(rows, where, offsets, per_token=3)) for _ in range(3))


def test_rms_norm_gradients() -> None:
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), want)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, weight))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    "sizes", [(2, 70, 3, 1, 6), (1, 1, 2, 2, 48), (3, 5, 1, 1, 2), (0, 4, 2, 1, 4)], ids=str
)
def test_normed_rotary(sizes: tuple[int, int, int, int, int], normed: bool) -> None:
    batch, length, queries, keys, channels = sizes
    torch.manual_seed(0)
    heads = torch.randn(batch, length, queries + 2 * keys, channels, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, channels, dtype=torch.float64, requires_grad=True)
    turns = torch.polar(
        torch.ones(length, 1, channels // 2).double(), torch.randn(length, 1, channels // 2).double()
    )

    def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if normed:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
        cos, sin = turns.real, turns.imag
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    q, k, v = heads.split((queries, keys, keys), dim=2)
    want = plain(q, weights[0]), plain(k, weights[1]), v
    poison()
    chosen = {"query_weight": weights[0], "key_weight": weights[1]} if normed else {}
    got = normed_rotary(heads, turns, keys, eps=1e-3, **chosen)
    leaves = (heads, weights) if normed else (heads,)
    # as attention leaves them: sequences, heads, positions
    grads = [torch.randn_like(t.transpose(1, 2).contiguous()).transpose(1, 2) for t in want]
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(got, leaves, grads)
    for mine, theirs in zip(ours, torch.autograd.grad(want, leaves, grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_normed_rotary_leaves_unused_outputs_without_gradient() -> None:
    heads = torch.randn(1, 4, 4, 6, requires_grad=True)
    turns = torch.polar(torch.ones(4, 1, 3), torch.randn(4, 1, 3))
    q, _, _ = normed_rotary(heads, turns, 1)
    q.sum().backward()
    assert heads.grad is not None
    assert heads.grad[:, :, :2].any()
    assert not heads.grad[:, :, 2:].any()


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    x = torch.randn(64, 300).to(torch.bfloat16)
    weight = torch.randn(300)
    want = F.rms_norm(x.float(), (300,), weight, 1e-6).to(torch.bfloat16)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want) or largest_error(got.float(), want.float()) < 2**-8


def gated_silu(hidden: torch.Tensor) -> torch.Tensor:
    return activate("swiglu", hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_gradients(kind: ExpertKind) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 5 * input_matrices(kind), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(activate(kind, hidden), activation(kind, hidden), rtol=1e-13, atol=1e-14)
    assert torch.autograd.gradcheck(lambda hidden: activate(kind, hidden), (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_is_exact(backend: str, dtype: torch.dtype) -> None:
    """Values and slopes over the whole range, against erf in float64; tails keep their digits in C++."""
    ends = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 1e30, -1e30], dtype=torch.float64)
    x = torch.cat([torch.linspace(-12, 12, 40_001, dtype=torch.float64), ends]).to(dtype)[:, None]
    x.requires_grad_()
    y = activate("gelu", x)
    y.sum().backward()
    assert x.grad is not None
    exact = x.detach().double()
    share = 0.5 * torch.erfc(-exact * 0.5**0.5)
    density = torch.exp(-0.5 * exact * exact) / (2 * torch.pi) ** 0.5
    unit = torch.finfo(dtype).eps
    assert ((y.double() - exact * share).abs() / (1 + exact.abs())).max() < 3 * unit
    assert ((x.grad.double() - share - exact * density).abs()).max() < 4 * unit
    if backend == "cpp":
        tail = (exact > -5) & (exact < 0)
        errors = (y.double() / (exact * share) - 1).abs()[tail]
        assert errors.max() < 40 * unit
    for end in (float("inf"), float("nan")):
        assert torch.equal(activate("gelu", torch.full((1, 1), end)), torch.full((1, 1), end)) or end != end
    assert activate("gelu", torch.full((1, 3), float("nan"), dtype=dtype)).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_passes_through_activations(kind: ExpertKind) -> None:
    assert activate(kind, torch.full((2, 6), float("nan"))).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gated_silu_of_extremes(dtype: torch.dtype) -> None:
    ends = [0.0, -0.0, 1e-30, 20, -20, 90, -90, 800, -800, 1e30, -1e30]
    gate = torch.tensor(ends, dtype=dtype)
    hidden = torch.cat([gate, torch.ones_like(gate)])[None].requires_grad_()
    y = gated_silu(hidden)
    y.sum().backward()
    plain = gate.double().clone().requires_grad_()
    want = F.silu(plain)
    want.sum().backward()
    assert hidden.grad is not None
    assert plain.grad is not None
    tiny = torch.finfo(dtype).tiny * 100  # where results are denormal, or nearly
    torch.testing.assert_close(y[0].double(), want, rtol=1e-6, atol=tiny)
    torch.testing.assert_close(hidden.grad[0, : len(ends)].double(), plain.grad, rtol=1e-6, atol=1e-30)
    assert gated_silu(torch.full((1, 2), float("nan"), dtype=dtype)).isnan().all()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_linear_cross_entropy(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    targets[[2, 8]] = -1
    want = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-1, reduction="sum")
    grads = torch.autograd.grad(want * 3, (hidden, weight))
    got = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(torch.autograd.grad(got * 3, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_linear_cross_entropy_of_huge_logits_and_padding_only() -> None:
    hidden = torch.full((2, 3), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0, 1, 1], [-1, -1, -1]], requires_grad=True)
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 1])).item() == pytest.approx(6e4)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([-1, -1]))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_empty_inputs() -> None:
    none = torch.zeros(0, 6, requires_grad=True)
    assert rms_norm(none, torch.ones(6), 1e-6).shape == (0, 6)
    assert gated_silu(none).shape == (0, 3)
    weight = torch.ones(4, 6, requires_grad=True)
    loss = linear_cross_entropy(none, weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_inputs_with_strides() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 10, dtype=torch.float64).T.requires_grad_()  # (10, 6)
    weight = torch.randn(12, dtype=torch.float64)[::2].requires_grad_()
    grad = torch.randn(6, 10, dtype=torch.float64).T
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-3), (x, weight), grad)
    for mine, theirs in zip(ours, torch.autograd.grad(want, (x, weight), grad), strict=True):
        torch.testing.assert_close(mine, theirs)
    gated = torch.autograd.grad(gated_silu(x), x, grad[:, :3])[0]
    plain = torch.autograd.grad(F.silu(x[:, :3]) * x[:, 3:], x, grad[:, :3])[0]
    torch.testing.assert_close(gated, plain)


def test_nan_reaches_the_loss() -> None:
    hidden = torch.randn(3, 4)
    hidden[1, 2] = float("nan")
    assert linear_cross_entropy(hidden, torch.randn(5, 4), torch.zeros(3, dtype=torch.int64)).isnan()
    assert rms_norm(hidden, torch.ones(4), 1e-6)[1].isnan().all()
    assert not rms_norm(hidden, torch.ones(4), 1e-6)[0].isnan().any()
