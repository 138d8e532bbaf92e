"""Token choice against plain torch in float64: the choice, weights, probabilities and gradients, in every engine."""

import pytest
import torch
from references import engines, largest_error
from test_kernels import poison

from moesaic.kernels.backend import Backend
from moesaic.kernels.topk import Choice, choose, choose_reference

ENGINES = engines()
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SIZES = {  # T, E, K, G, groups kept
    "one": (1, 1, 1, 1, 1),
    "odd": (7, 5, 3, 1, 1),
    "all": (5, 6, 6, 1, 1),
    "none": (0, 4, 2, 1, 1),
    "many": (40, 64, 8, 1, 1),
    "widest": (2, 512, 17, 1, 1),
    "wider": (3, 600, 2, 1, 1),
    "groups": (3, 256, 8, 8, 4),
    "odd_groups": (7, 60, 5, 5, 2),
    "single_groups": (7, 6, 2, 6, 3),
}
RULES = [("softmax", "after"), ("softmax", "before"), ("sigmoid", "after"), ("sigmoid", "before")]


def spread_logits(tokens: int, num_experts: int) -> torch.Tensor:
    """Logits of which no two lie so near that rounding could change their order."""
    generator = torch.Generator().manual_seed(num_experts)
    order = torch.rand(tokens, num_experts, generator=generator).argsort(-1)
    return torch.linspace(-3, 3, num_experts, dtype=torch.float64)[order]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("backend", "device"), ENGINES)
@pytest.mark.parametrize(("score", "normalize"), RULES)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size: str, score, normalize, backend, device: str, dtype: torch.dtype) -> None:
    tokens, num_experts, k, groups, kept = SIZES[size]
    # the last bits of 16-bit logits are fewer than 256 experts
    if dtype in (torch.bfloat16, torch.float16) and num_experts > 64:
        pytest.skip("so many logits cannot be told apart")
    if backend == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("kernels compute in fp32 whatever comes; the interpreter takes its time")
    torch.manual_seed(0)
    logits = spread_logits(tokens, num_experts).to(dtype)
    bias = torch.linspace(-0.01, 0.013, num_experts, dtype=torch.float64)
    grads = [torch.randn(tokens, k).double(), torch.randn(tokens, num_experts).double()]
    exact = logits.double().requires_grad_()
    choice = Choice(k, score == "sigmoid", normalize == "after", groups, kept, 1.5)
    *want, experts = choose_reference(exact, bias, choice)
    given = logits.to(device).requires_grad_()
    near = TOLERANCE[torch.promote_types(dtype, torch.float32)]
    poison()
    found, *values = choose(
        given,
        bias.to(device, torch.promote_types(dtype, torch.float32)),
        k,
        score=score,
        normalize=normalize,
        groups=groups,
        groups_kept=kept,
        scale=1.5,
        backend=backend,
    )
    assert torch.equal(found.cpu(), experts)
    for ours, theirs in zip(values, want, strict=True):
        assert ours.dtype == torch.promote_types(dtype, torch.float32)
        assert largest_error(ours.cpu().double(), theirs) < near
    for part in ([0, 1], [0], [1]):
        poison()
        of = [values[i] for i in part], given, [grads[i].to(device, values[0].dtype) for i in part]
        (ours,) = torch.autograd.grad(*of, retain_graph=True)
        (theirs,) = torch.autograd.grad(
            [want[i] for i in part], exact, [grads[i] for i in part], retain_graph=True
        )
        assert ours.dtype == dtype
        # some gradients are zero but for rounding
        scale = theirs.abs().amax().clamp(min=0.1) if tokens else 1.0
        assert largest_error(ours.cpu().double() / scale + 1, theirs / scale + 1) < TOLERANCE[dtype]
        if len(part) == 2:
            assert torch.equal(ours, torch.autograd.grad(*of, retain_graph=True)[0])  # the same bits again


@pytest.mark.parametrize(("score", "normalize"), RULES)
def test_the_gradient_is_that_of_finite_differences(score, normalize) -> None:
    logits = spread_logits(4, 6).requires_grad_()
    bias = torch.zeros(6, dtype=torch.float64)
    backends: tuple[Backend, ...] = ("auto", "torch")
    for backend in backends:

        def run(x: torch.Tensor, backend: Backend = backend) -> tuple[torch.Tensor, ...]:
            return choose(x, bias, 2, score=score, normalize=normalize, backend=backend)[1:]

        assert torch.autograd.gradcheck(run, logits)


@pytest.mark.parametrize(("backend", "device"), ENGINES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_of_equals_the_lower_index_comes_first(score, backend, device: str) -> None:
    logits = torch.zeros(3, 40, device=device)
    bias = torch.zeros(40, device=device)
    experts, weights, _ = choose(logits, bias, 5, score=score, backend=backend)
    assert experts.tolist() == [list(range(5))] * 3
    assert weights.tolist() == [[pytest.approx(0.2)] * 5] * 3
    logits[:, 30] = 1
    logits[:, [7, 9]] = 0.5
    assert choose(logits, bias, 5, score=score, backend=backend)[0].tolist() == [[30, 7, 9, 0, 1]] * 3
    grouped = choose(logits, bias, 5, score=score, groups=8, groups_kept=2, backend=backend)[0]
    assert grouped.tolist() == [[30, 7, 9, 5, 6]] * 3  # groups of five
    grouped = choose(bias[None], bias, 6, score=score, groups=8, groups_kept=2, backend=backend)[0]
    assert grouped.tolist() == [list(range(6))]
    bias[39] = float("-inf")
    assert choose(logits, bias, 40, score=score, backend=backend)[0][0, -1] == 39


@pytest.mark.parametrize(("backend", "device"), ENGINES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_wrong_logits_give_experts_that_exist_once(
    score, groups: int, wrong: float, backend, device: str
) -> None:
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = logits[1] = wrong
    logits[2, ::2] = wrong
    settings = {"score": score, "groups": groups, "groups_kept": max(1, groups // 2)}
    want = choose(logits, torch.zeros(16), 6, backend="torch", **settings)
    poison()
    got = choose(logits.to(device), torch.zeros(16, device=device), 6, backend=backend, **settings)
    assert torch.equal(got[0].cpu(), want[0])
    assert all(len({*row}) == 6 and min(row) >= 0 and max(row) < 16 for row in got[0].tolist())
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, equal_nan=True)
    if wrong != wrong:
        assert got[1][1].isnan().all()
        assert not got[1][3].isnan().any()


@pytest.mark.parametrize(("backend", "device"), ENGINES)
def test_far_apart_sigmoids_keep_weights_that_sum_to_one(backend, device: str) -> None:
    logits = torch.tensor([[-150.0, -151, -152, -300], [200, 199, -200, 0]], device=device)
    experts, weights, probabilities = choose(
        logits, torch.zeros(4, device=device), 2, score="sigmoid", backend=backend
    )
    assert experts.tolist() == [[0, 1], [0, 1]]
    want = torch.tensor([[0.73105858, 0.26894142], [0.5, 0.5]])
    torch.testing.assert_close(weights.cpu(), want)
    torch.testing.assert_close(probabilities.sum(-1).cpu(), torch.ones(2))


def test_threads_change_no_bit() -> None:
    logits, bias = torch.randn(300, 48), torch.randn(48) / 50
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = logits.clone().requires_grad_()
        experts, *values = choose(leaf, bias, 4, score="sigmoid", groups=6, groups_kept=3)
        torch.stack([value.square().sum() for value in values]).sum().backward()
        results.append([experts, *values, leaf.grad])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


def test_keeps_no_more_than_its_results() -> None:
    kept: list[torch.Tensor] = []
    for score in ("softmax", "sigmoid"):
        logits = torch.randn(10, 16, requires_grad=True) * 1
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            results = choose(logits, torch.zeros(16), 4, score=score)
        own = {t.data_ptr() for t in (*results, logits)}
        assert {t.data_ptr() for t in kept} == (own if score == "sigmoid" else own - {logits.data_ptr()})


def test_strides_and_the_bias_of_another_type() -> None:
    logits = spread_logits(12, 8).t().contiguous().t().requires_grad_()
    found = choose(logits, torch.zeros(8), 3, score="sigmoid")
    want = choose(logits, torch.zeros(8).double(), 3, score="sigmoid", backend="torch")
    assert torch.equal(found[0], want[0])
    grads = [torch.autograd.grad(r[1].square().sum(), logits)[0] for r in (found, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("backend", "device"), ENGINES)
def test_op_is_consistent_and_compiles_whole(backend, device: str, score) -> None:
    logits = spread_logits(5, 6).to(device, torch.float32).requires_grad_()
    bias = torch.zeros(6, device=device)
    torch.library.opcheck(
        torch.ops.moesaic.choose.default, (logits, bias, 2, score == "sigmoid", True, 1, 1, 1.0, backend)
    )

    def weighted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights, probabilities = choose(logits, bias, 2, score=score, backend=backend)
        return experts, (weights * experts).sum() + probabilities[:, 0].sum()

    compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, weighted):
        experts, total = run(logits)
        results.append([experts, total, torch.autograd.grad(total, logits)[0]])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_impossible_choices_are_refused() -> None:
    logits, bias = torch.zeros(2, 6), torch.zeros(6)
    for k, groups, kept, message in [
        (0, 1, 1, "k: 0 is not in 1 to 6"),
        (7, 1, 1, "k: 7 is not in 1 to 6"),
        (3, 3, 1, "k: 3 is not in 1 to 2"),
        (1, 4, 1, "groups: 1 of 4"),
        (1, 3, 4, "groups: 4 of 3"),
        (1, 3, 0, "groups: 0 of 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            choose(logits, bias, k, groups=groups, groups_kept=kept)
