"""The experts' op against a loop over assignments in float64: output and every gradient, every engine and kind."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from references import largest_error
from torch import Tensor

from moesaic.kernels import backend as backends
from moesaic.kernels import native
from moesaic.kernels.activation import KINDS, ExpertKind, input_matrices
from moesaic.kernels.backend import Backend, BackendError
from moesaic.kernels.expert_mlp import expert_mlp, expert_rows
from moesaic.kernels.plan import Plan, plan_choice, plan_ragged

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ENGINES = ["torch", "cpp", "triton", pytest.param("gpu", marks=pytest.mark.gpu)]
"""`triton` runs in the interpreter; `gpu` is the same on a GPU."""
SHAPES = {
    "one token": (1, 8, 16, 3, 1),
    "odd": (7, 9, 5, 4, 2),
    "K = E": (6, 16, 8, 3, 3),
    "one expert": (5, 8, 8, 1, 1),
    "many experts": (13, 8, 8, 40, 2),
    "many rows": (513, 24, 8, 4, 2),
    "several tiles, uneven": (37, 100, 36, 3, 2),
}
"""T, D, F, E, K."""
SLOW = ("many experts", "many rows", "several tiles, uneven")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Every test runs on every engine that this machine has."""
    if request.param == "cpp" and not native.serves(torch.ones(1)):
        pytest.skip(native.status())
    if request.param == "triton" and backends.triton_refusal(CPU):
        pytest.skip(f"{backends.triton_refusal(CPU)}")
    return request.param


def backend_of(engine: str) -> Backend:
    return {"torch": "torch", "cpp": "auto"}.get(engine, "triton")  # type: ignore[return-value]


def device_of(engine: str) -> torch.device:
    return torch.device("cuda") if engine == "gpu" else CPU


def moved(plan: Plan, device: torch.device) -> Plan:
    names = ("counts", "tokens", "order", "where", "offsets")
    return replace(plan, **{name: getattr(plan, name).to(device) for name in names})


@dataclass
class Case:
    """Inputs in float64, rounded to a type, and the gradient of the output."""

    x: Tensor
    gates: Tensor
    w1: Tensor
    w2: Tensor
    grad: Tensor
    tokens: Tensor
    experts: Tensor
    plan: Plan

    def leaves(self, dtype: torch.dtype, device: torch.device = CPU) -> list[Tensor]:
        """x, gates, w1, w2 to differentiate by. Gates are fp32 or wider, as routers make them."""
        wide = torch.promote_types(dtype, torch.float32)
        types = (dtype, wide, dtype, dtype)
        given = (self.x, self.gates, self.w1, self.w2)
        return [t.to(device, kind).detach().requires_grad_() for t, kind in zip(given, types, strict=True)]


def make_case(
    shape: tuple[int, ...], kind: ExpertKind, dtype: torch.dtype, experts: Tensor | None = None
) -> Case:
    t, d, f, e, k = shape
    torch.manual_seed(t + d)
    x, grad = torch.randn(t, d, dtype=torch.float64), torch.randn(t, d, dtype=torch.float64)
    w1 = torch.randn(e, input_matrices(kind), f, d, dtype=torch.float64) / d**0.5
    w2 = torch.randn(e, d, f, dtype=torch.float64) / f**0.5
    if experts is None:
        experts = torch.rand(t, e).topk(k, -1).indices
    gates = torch.rand(t * experts.shape[1], dtype=torch.float64)
    rounded = [tensor.to(dtype).double() for tensor in (x, w1, w2, grad)]
    gates = gates.float().double()
    tokens = torch.arange(t).repeat_interleave(experts.shape[1])
    plan = plan_choice(experts, e)
    return Case(rounded[0], gates, rounded[1], rounded[2], rounded[3], tokens, experts.flatten(), plan)


def act(kind: ExpertKind, hidden: list[Tensor]) -> Tensor:
    if kind == "swiglu":
        return F.silu(hidden[0]) * hidden[1]
    if kind == "drelu":
        return F.relu(hidden[0]) * F.relu(hidden[1])
    return F.gelu(hidden[0]) if kind == "gelu" else F.relu(hidden[0]) ** 2


def loop(case: Case, kind: ExpertKind) -> tuple[Tensor, list[Tensor]]:
    """Assignment by assignment, in float64."""
    x, gates, w1, w2 = leaves = case.leaves(torch.float64)
    y = [torch.zeros_like(x[0]) for _ in x]
    for a, (t, e) in enumerate(zip(case.tokens.tolist(), case.experts.tolist(), strict=True)):
        hidden = [matrix @ x[t] for matrix in w1[e]]
        y[t] = y[t] + gates[a] * (w2[e] @ act(kind, hidden))
    out = torch.stack(y) + 0 * sum(leaf.sum() for leaf in leaves)
    return out.detach(), list(torch.autograd.grad(out, leaves, case.grad))


def run(case: Case, kind: ExpertKind, dtype: torch.dtype, engine: str) -> tuple[Tensor, list[Tensor]]:
    device, backend = device_of(engine), backend_of(engine)
    leaves = case.leaves(dtype, device)
    for size in (64, 1000, 20_000, 200_000):  # the next allocations get memory full of NaN
        torch.full((size,), float("nan"), device=device)
    x, gates, w1, w2 = leaves
    y = expert_mlp(x, gates, w1, w2, moved(case.plan, device), kind=kind, backend=backend)
    return y.detach().cpu(), [g.cpu() for g in torch.autograd.grad(y, leaves, case.grad.to(device, dtype))]


def check(case: Case, kind: ExpertKind, dtype: torch.dtype, engine: str) -> None:
    if engine in ("triton", "gpu") and dtype == torch.float64:
        pytest.skip("GPUs' matrix units are not asked for float64")
    want, want_grads = loop(case, kind)
    got, grads = run(case, kind, dtype, engine)
    assert got.dtype == dtype
    for name, ours, theirs in zip(
        ["y", "x", "gates", "w1", "w2"], [got, *grads], [want, *want_grads], strict=True
    ):
        assert largest_error(ours.double(), theirs) < TOLERANCE[dtype], name
    again, again_grads = run(case, kind, dtype, engine)
    for one, other in zip([got, *grads], [again, *again_grads], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "shape",
    [pytest.param(name, marks=pytest.mark.slow_interpreted if name in SLOW else ()) for name in SHAPES],
)
def test_equals_a_loop(engine: str, shape: str, dtype: torch.dtype) -> None:
    check(make_case(SHAPES[shape], "swiglu", dtype), "swiglu", dtype, engine)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(kind, dtype, marks=pytest.mark.slow_interpreted if kind != "swiglu" and narrow else ())
        for kind in KINDS
        for dtype, narrow in zip(TOLERANCE, (False, False, True, True), strict=True)
    ],
)
def test_every_kind(engine: str, kind: ExpertKind, dtype: torch.dtype) -> None:
    check(make_case((19, 16, 8, 4, 2), kind, dtype), kind, dtype, engine)


def test_all_tokens_to_one_expert_and_empty_experts(engine: str) -> None:
    experts = torch.full((33, 1), 2)
    check(make_case((33, 16, 8, 4, 1), "swiglu", torch.float32, experts), "swiglu", torch.float32, engine)


@pytest.mark.slow_interpreted
def test_many_rows_to_one_expert(engine: str) -> None:
    """More rows than a tile has, and experts before and after it that have none."""
    experts = torch.full((513, 1), 1)
    check(make_case((513, 12, 8, 3, 1), "relu2", torch.float32, experts), "relu2", torch.float32, engine)


@pytest.mark.parametrize(
    "many",
    [11, pytest.param(70, marks=pytest.mark.slow_interpreted), pytest.param(512, marks=pytest.mark.gpu)],
)
def test_most_experts_are_empty(engine: str, many: int) -> None:
    experts = torch.tensor([[many - 1, 3], [3, 0], [many - 1, many // 2]])
    check(make_case((3, 8, 8, many, 2), "swiglu", torch.float32, experts), "swiglu", torch.float32, engine)


def test_every_number_is_written(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all new memory full of NaN, and integers out of range."""
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = empty(self, *args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 30)

    case = make_case((21, 40, 36, 5, 2), "swiglu", torch.float32)
    want, want_grads = loop(case, "swiglu")
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    got, grads = run(case, "swiglu", torch.float32, engine)
    for ours, theirs in zip([got, *grads], [want, *want_grads], strict=True):
        assert largest_error(ours.double(), theirs) < TOLERANCE[torch.float32]


def test_triton_means_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward run the grouped products of this file's engine, and no product of torch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backends.triton_refusal(device):
        pytest.skip(f"{backends.triton_refusal(device)}")
    from moesaic.kernels import expert_mlp as dispatch
    from moesaic.kernels.triton import expert_mlp as kernels

    called = []
    for name in ("hidden_layer", "product", "outer", "hidden_gradient", "combine", "gate_gradients"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, r=real, **k: (called.append(n), r(*a, **k))[1])
    monkeypatch.setattr(dispatch, "grouped_product", None)
    case = make_case((6, 8, 8, 3, 2), "swiglu", torch.float32)
    run(case, "swiglu", torch.float32, "gpu" if device.type == "cuda" else "triton")
    forward, backward = ["hidden_layer", "product", "combine"], ["hidden_gradient", "gate_gradients"]
    assert called == [*forward, *backward, "outer", "outer", "product", "combine"]
    for name, table in kernels.TABLES.items():  # one list of tiles serves them all
        heights = {blocks.m for role, blocks in table.items() if "outer" not in role}
        assert len(heights) == 1, name
    with pytest.raises(BackendError, match=r"triton has no experts of torch\.float64"):
        run(case, "swiglu", torch.float64, "gpu" if device.type == "cuda" else "triton")


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_tiles_that_hardware_copies(engine: str, kind: ExpertKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMA or addresses: the same bits, at sizes that no tile divides."""
    if engine not in ("triton", "gpu"):
        pytest.skip("only Triton's kernels know both")
    if engine == "gpu" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("TMA is of Hopper and later")
    from triton.tools.tensor_descriptor import TensorDescriptor

    from moesaic.kernels.triton import expert_mlp as kernels

    made, real = [], TensorDescriptor.from_tensor
    monkeypatch.setattr(TensorDescriptor, "from_tensor", lambda *given: (made.append(given), real(*given))[1])
    case = make_case((200, 72, 40, 2, 1), kind, torch.bfloat16)
    results = []
    for tma, descriptors in ((False, 0), (True, 6)):
        for name in ("many rows", "interpreted", "many rows, interpreted"):
            table = {role: replace(blocks, tma=tma) for role, blocks in kernels.TABLES[name].items()}
            monkeypatch.setitem(kernels.TABLES, name, table)
        y, grads = run(case, kind, torch.bfloat16, engine)
        assert len(made) == descriptors
        results.append([y, *grads])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_tiles_that_hardware_cannot_copy() -> None:
    pytest.importorskip("triton")
    from moesaic.kernels.triton.grouped import addressable

    rows = torch.empty(33, 16, dtype=torch.bfloat16)
    assert addressable(rows)
    assert not addressable(rows, rows[1:, :12].contiguous())  # 24 bytes
    assert not addressable(rows.flatten()[1:-15].view(32, 16))  # begins amid 16 bytes
    assert not addressable(rows[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_real_sizes(kind: ExpertKind, skewed: bool) -> None:
    """Against torch in fp32, expert by expert."""
    t, d, f, e, k = 4096, 2048, 768, 128, 8
    torch.manual_seed(0)
    x, grad = (torch.randn(t, d, device="cuda").bfloat16() for _ in range(2))
    w1 = (torch.randn(e, input_matrices(kind), f, d, device="cuda") / d**0.5).bfloat16()
    w2 = (torch.randn(e, d, f, device="cuda") / f**0.5).bfloat16()
    scores = torch.rand(t, e, device="cuda")
    if skewed:
        scores[:, :k] += torch.rand(t, k, device="cuda")
        scores[:, -3:] = -1
    plan = plan_choice(scores.topk(k, -1).indices, e)
    gates = torch.rand(t * k, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (x, gates, w1, w2)]
    y = expert_mlp(x, gates, w1, w2, plan, kind=kind, backend="triton")
    grads = torch.autograd.grad(y, leaves, grad)
    wide = [tensor.detach().float().requires_grad_() for tensor in leaves]
    want, start = torch.zeros(t, d, device="cuda"), 0
    for expert, count in enumerate(plan.counts.tolist()):
        rows = slice(start, start + count)
        tokens, start = plan.tokens[rows], start + count
        hidden = [wide[0][tokens] @ matrix.T for matrix in wide[2][expert]]
        out = act(kind, hidden) @ wide[3][expert].T * wide[1][plan.order[rows]][:, None]
        want = want.index_add(0, tokens, out)
    for ours, theirs in zip([y, *grads], [want, *torch.autograd.grad(want, wide, grad.float())], strict=True):
        assert largest_error(ours.detach().float(), theirs.detach()) < TOLERANCE[torch.bfloat16]


def test_ragged_assignments(engine: str) -> None:
    """Tokens with none and with many assignments."""
    case = make_case((5, 8, 8, 4, 2), "swiglu", torch.float32)
    tokens = torch.tensor([0, 0, 0, 2, 4, 4])
    experts = torch.tensor([3, 1, 0, 1, 1, 3])
    case.tokens, case.experts, case.gates = tokens, experts, case.gates[:6]
    case.plan = plan_ragged(tokens, experts, 5, 4)
    check(case, "swiglu", torch.float32, engine)


def test_no_tokens(engine: str) -> None:
    device = device_of(engine)
    shapes = ((0, 8), (0,), (4, 2, 8, 8), (4, 8, 8))
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    plan = plan_choice(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    x, gates, w1, w2 = leaves
    y = expert_mlp(x, gates, w1, w2, plan, kind="swiglu", backend=backend_of(engine))
    y.sum().backward()
    assert y.shape == (0, 8)
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_no_experts_and_no_rows(engine: str) -> None:
    """As on a rank that owns nothing of a layer."""
    device = device_of(engine)
    shapes = ((0, 8), (0, 2, 8, 8), (0, 8, 8))
    rows, w1, w2 = leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    counts = torch.empty(0, dtype=torch.int64, device=device)
    y = expert_rows(rows, w1, w2, counts, kind="swiglu", backend=backend_of(engine))
    y.sum().backward()
    assert y.shape == (0, 8)
    assert [leaf.grad.shape if leaf.grad is not None else None for leaf in leaves] == [
        leaf.shape for leaf in leaves
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_that_lie_in_order(engine: str, dtype: torch.dtype) -> None:
    if engine in ("triton", "gpu") and dtype == torch.float64:
        pytest.skip("GPUs' matrix units are not asked for float64")
    device = device_of(engine)
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 14, 1])
    exact = [
        torch.randn(shape, dtype=torch.float64).to(dtype).double().requires_grad_()
        for shape in ((18, 16), (4, 2, 8, 16), (4, 16, 8))
    ]
    grad = torch.randn(18, 16, dtype=torch.float64).to(dtype)
    parts = [
        act("swiglu", [rows @ matrix.T for matrix in w1]) @ w2.T
        for rows, w1, w2 in zip(exact[0].split(counts.tolist()), exact[1], exact[2], strict=True)
    ]
    want = torch.cat(parts)
    want_grads = torch.autograd.grad(want, exact, grad.double())
    rows, w1, w2 = leaves = [t.detach().to(device, dtype).requires_grad_() for t in exact]
    got = expert_rows(rows, w1, w2, counts.to(device), kind="swiglu", backend=backend_of(engine))
    grads = torch.autograd.grad(got, leaves, grad.to(device))
    for ours, theirs in zip([got, *grads], [want, *want_grads], strict=True):
        assert largest_error(ours.detach().double().cpu(), theirs.detach()) < TOLERANCE[dtype]


@pytest.mark.slow_interpreted
def test_op_is_consistent_and_compiles_whole(engine: str) -> None:
    case = make_case((6, 8, 8, 3, 2), "swiglu", torch.float32)
    device, backend = device_of(engine), backend_of(engine)
    plan = moved(case.plan, device)
    x, gates, w1, w2 = case.leaves(torch.float32, device)
    tensors = (plan.tokens, plan.order, plan.where, plan.offsets, plan.per_token)
    lying = x.detach().T.contiguous().T.requires_grad_()  # the same numbers, column by column
    for given in (x, lying):
        args = (given, w1, w2, plan.counts, gates, *tensors, "swiglu", backend, True)
        torch.library.opcheck(torch.ops.moesaic.expert_mlp.default, args)

    def layer(x: Tensor, gates: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return expert_mlp(x, gates, w1, w2, plan, kind="swiglu", backend=backend)

    want = layer(x, gates, w1, w2)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, gates, w1, w2)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    grads = [torch.autograd.grad(y, (x, gates, w1, w2), case.grad.float().to(device)) for y in (got, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_nothing_of_the_size_of_rows_times_width_is_kept(engine: str) -> None:
    """Activation memory does not grow with the number of experts per token at a fixed K * F."""
    kept = {}
    for k in (1, 4):
        case = make_case((32, 64, 32 // k, 4, k), "swiglu", torch.float32)
        saved: list[Tensor] = []
        x, gates, w1, w2 = leaves = case.leaves(torch.float32, device_of(engine))
        inputs = {leaf.data_ptr() for leaf in leaves}

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            plan = moved(case.plan, device_of(engine))
            expert_mlp(x, gates, w1, w2, plan, kind="swiglu", backend=backend_of(engine))
        floats = [t for t in saved if t.is_floating_point() and t.data_ptr() not in inputs]
        kept[k] = sum(t.numel() for t in floats)
    assert kept[1] == kept[4] == 32 * 2 * 32


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case((6, 8, 8, 3, 2), "swiglu", torch.float32)
    x, gates, w1, w2 = case.leaves(torch.float32)
    with pytest.raises(BackendError, match="megablocks cannot run: its package grouped_gemm"):
        expert_mlp(x, gates, w1, w2, case.plan, kind="swiglu", backend="megablocks")
    monkeypatch.setattr(backends, "_triton", lambda: (None, False))
    with pytest.raises(BackendError, match="triton cannot run: it needs a GPU, and the device is cpu"):
        expert_mlp(x, gates, w1, w2, case.plan, kind="swiglu", backend="triton")
