"""The plan against a sort by hand: every engine, empty experts, all to one, no assignments, ragged tokens."""

import pytest
import torch
from references import engines
from test_kernels import poison

from moesaic.kernels.plan import Plan, plan_choice, plan_ragged

ENGINES = engines()
SIZES = [(1, 1, 1), (7, 2, 3), (513, 2, 5), (40, 8, 64), (130, 3, 512), (0, 2, 4), (5, 2, 1100), (60, 1, 1)]
FIELDS = ("counts", "tokens", "order", "where", "offsets")


def by_hand(tokens: list[int], experts: list[int], num_tokens: int, num_experts: int) -> dict[str, list[int]]:
    order = [a for expert in range(num_experts) for a, e in enumerate(experts) if e == expert]
    where = [0] * len(order)
    for row, assignment in enumerate(order):
        where[assignment] = row
    return {
        "counts": [experts.count(e) for e in range(num_experts)],
        "tokens": [tokens[a] for a in order],
        "order": order,
        "where": where,
        "offsets": [sum(token < t for token in tokens) for t in range(num_tokens + 1)],
    }


def check(plan: Plan, want: dict[str, list[int]]) -> None:
    for name in FIELDS:
        values = getattr(plan, name)
        assert values.dtype == torch.int64
        assert values.tolist() == want[name], name


@pytest.mark.parametrize(("backend", "device"), ENGINES)
@pytest.mark.parametrize("spread", ["random", "one", "last"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plan_of_a_choice(sizes: tuple[int, int, int], spread: str, backend, device: str) -> None:
    tokens, k, num_experts = sizes
    experts = torch.randint(0, num_experts, (tokens, k), generator=torch.Generator().manual_seed(tokens))
    if spread != "random":
        experts.fill_(0 if spread == "one" else num_experts - 1)
    of = [t for t in range(tokens) for _ in range(k)]
    want = by_hand(of, experts.flatten().tolist(), tokens, num_experts)
    for _ in range(2):
        poison()
        plan = plan_choice(experts.to(device), num_experts, backend=backend)
        assert plan.per_token == k
        check(plan, want)


@pytest.mark.parametrize(("backend", "device"), ENGINES)
@pytest.mark.parametrize("count", [0, 1, 7, 700])
def test_plan_of_ragged_assignments(count: int, backend, device: str) -> None:
    generator = torch.Generator().manual_seed(count)
    tokens = torch.randint(1, 90, (count,), generator=generator).sort().values  # 0, 90 and others have none
    experts = torch.randint(0, 9, (count,), generator=generator)
    want = by_hand(tokens.tolist(), experts.tolist(), 91, 9)
    poison()
    plan = plan_ragged(tokens.to(device), experts.to(device), 91, 9, backend=backend)
    assert plan.per_token is None
    check(plan, want)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("num_experts", [3, 100_000])
def test_threads_change_nothing(num_experts: int, ragged: bool) -> None:
    """More assignments than the threshold from which chunks are counted side by side."""
    count = 3 * max(num_experts, 4096) + 5
    experts = torch.randint(0, num_experts, (count,), generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(count) // 2
    plans = []
    for threads, backend in [(1, "torch"), (1, "auto"), (2, "auto"), (3, "auto")]:
        torch.set_num_threads(threads)
        if ragged:
            plans.append(plan_ragged(tokens, experts, count, num_experts, backend=backend))  # type: ignore[arg-type]
        else:
            plans.append(plan_choice(experts[:, None], num_experts, backend=backend))  # type: ignore[arg-type]
    for plan in plans[1:]:
        assert all(torch.equal(getattr(plan, name), getattr(plans[0], name)) for name in FIELDS)


@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_ids_that_are_no_expert_are_refused(backend, wrong: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        plan_choice(torch.tensor([[0, 1], [wrong, 3]]), 4, backend=backend)


def test_other_integers_and_strides() -> None:
    experts = torch.tensor([[2, 0, 2], [1, 1, 0]])
    want = by_hand([0, 0, 1, 1, 2, 2], [2, 1, 0, 1, 2, 0], 3, 3)
    check(plan_choice(experts.T, 3), want)
    assert plan_choice(experts.T.int(), 3).order.tolist() == want["order"]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_op_is_consistent(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("on the CPU only in the interpreter")
    experts = torch.tensor([1, 0, 2, 1])
    for arguments in [(experts, None, 2, 2), (experts, torch.tensor([0, 0, 2, 4]), 1, 5)]:
        torch.library.opcheck(torch.ops.moesaic.plan.default, (*arguments, 3, backend))


@pytest.mark.parametrize(("backend", "device"), ENGINES)
def test_compiles_whole(backend, device: str) -> None:
    experts = torch.tensor([[1, 0], [2, 1]], device=device)

    def rows(experts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plan = plan_choice(experts, 3, backend=backend)
        ragged = plan_ragged(plan.offsets[1:] // 2, experts[0], 3, 3, backend=backend)
        return (*(getattr(plan, n) for n in FIELDS), *(getattr(ragged, n) for n in FIELDS))

    compiled = torch.compile(rows, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(compiled(experts), rows(experts), strict=True):
        assert torch.equal(ours, plain)
