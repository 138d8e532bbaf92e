"""The MoE layer against a loop over tokens, in float64, outputs and every gradient; and what must not change it."""

from dataclasses import replace

import pytest
import torch
from references import bias_of, largest_error, moe_by_tokens
from torch import Tensor

from moesaic.kernels.backend import Backend, triton_refusal
from moesaic.moe import (
    BalanceLoss,
    MoE,
    RouterInput,
    Routing,
    TopKRouter,
    ZLoss,
    aux_loss,
    make_plan,
    use_kernels,
)
from moesaic.moe.experts import Bank

EXACT = 1e-12
TERMS = (BalanceLoss(coef=0.1), BalanceLoss(coef=0.2, scope="micro_batch"), ZLoss(coef=0.01))


def layer(dim: int = 6, **changes: object) -> MoE:
    """A small float64 layer with a bias that matters."""
    router = TopKRouter.Config(k=2, bias_rate=0.1)
    config = replace(MoE.Config(num_experts=5, hidden=4, router=router, aux=TERMS), **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    moe = MoE(config, dim).double()
    bias_of(moe).copy_(torch.linspace(-0.2, 0.3, config.num_experts))
    return moe


def gradients(moe: MoE, x: Tensor, y: Tensor, extra: Tensor | float = 0.0) -> list[Tensor]:
    torch.manual_seed(1)
    total = (y * torch.randn_like(y)).sum() + extra
    leaves = [x, *moe.parameters()]
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return list(found)


CASES = {
    "softmax": {},
    "softmax_before": {"router": TopKRouter.Config(k=2, normalize="before")},
    "switch": {"router": TopKRouter.Config(k=1, normalize="before")},
    "sigmoid": {"router": TopKRouter.Config(k=2, score="sigmoid", scale=2.5)},
    "sigmoid_raw": {"router": TopKRouter.Config(k=3, score="sigmoid", normalize="before")},
    "every_expert": {"router": TopKRouter.Config(k=5)},
    "one_expert": {"num_experts": 1, "router": TopKRouter.Config(k=1, normalize="before", score="sigmoid")},
    "groups": {"num_experts": 6, "router": TopKRouter.Config(k=2, groups=3, groups_kept=2)},
    "gelu_shared": {"expert": "gelu", "shared_experts": 2},
    "relu2": {"expert": "relu2"},
    "swiglu_shared": {"shared_experts": 1},
}


@pytest.mark.parametrize("tokens", [1, 7, 33])
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_a_loop_over_tokens(case: str, tokens: int) -> None:
    moe = layer(**CASES[case])
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (lambda routing: moe(x, routing), lambda routing: moe_by_tokens(moe, x, routing)):
        y = run(moe.route(RouterInput(tokens=x, mode="train")))
        results.append([y, *gradients(moe, x, y)])
    for ours, theirs in zip(*results, strict=True):
        assert largest_error(ours, theirs) < EXACT


@pytest.mark.parametrize("spread", ["all_to_one", "two_of_many"])
def test_empty_experts_and_all_tokens_to_one(spread: str) -> None:
    moe = layer(
        num_experts=40, router=TopKRouter.Config(k=1 if spread == "all_to_one" else 2, normalize="before")
    )
    bias_of(moe).fill_(0)
    bias_of(moe)[[3] if spread == "all_to_one" else [0, 39]] = 100
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    routing = moe.route(RouterInput(tokens=x, mode="train"))
    counts = make_plan(routing, 40).counts
    assert int((counts > 0).sum()) == (1 if spread == "all_to_one" else 2)
    results = []
    for y in (moe(x, routing), moe_by_tokens(moe, x, routing)):
        total = (y * torch.arange(54).reshape(9, 6)).sum()
        results.append([y, *torch.autograd.grad(total, [x, *moe.parameters()], retain_graph=True)])
    for ours, theirs in zip(*results, strict=True):
        assert largest_error(ours, theirs) < EXACT


def test_no_tokens_at_all() -> None:
    moe = layer(shared_experts=1)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    inputs = RouterInput(tokens=x, mode="train", valid=torch.zeros(0, dtype=torch.bool))
    routing = moe.route(inputs)
    y = moe(x, routing)
    total = aux_loss([moe.stats(routing, inputs)])
    assert y.shape == (0, 6)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(moe, x, y, total))


def test_ragged_routing_equals_a_loop_over_tokens() -> None:
    """Tokens with no, one or many experts, in any order: what expert choice and capacities produce."""
    moe = layer()
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(6, 5, dtype=torch.float64)
    weights = torch.rand(7, dtype=torch.float64, requires_grad=True)
    tokens, experts = torch.tensor([4, 0, 4, 2, 4, 0, 5]), torch.tensor([1, 3, 0, 1, 4, 1, 1])
    routing = Routing.ragged(tokens, experts, weights, probabilities=logits.softmax(-1), logits=logits)
    results = []
    for y in (moe(x, routing), moe_by_tokens(moe, x, routing)):
        leaves = [x, weights, *moe.parameters()]
        grads = torch.autograd.grad(
            (y**2).sum(), leaves, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        results.append([y, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert largest_error(ours, theirs) < EXACT
    assert not results[0][0][1].any()  # token 1 has no expert


def test_plan_is_a_stable_sort_by_expert() -> None:
    experts = torch.tensor([[2, 0], [0, 2], [2, 1]])
    uniform = torch.full((3, 4), 0.25)
    routing = Routing.token_choice(experts, torch.ones(3, 2), probabilities=uniform, logits=uniform)
    plan = make_plan(routing, 4)
    assert plan.counts.tolist() == [2, 1, 3, 0]
    assert plan.tokens.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.where.tolist() == [3, 0, 1, 4, 5, 2]
    assert plan.offsets.tolist() == [0, 2, 4, 6]


def test_permuting_tokens_permutes_outputs() -> None:
    moe = layer()
    x = torch.randn(50, 6, dtype=torch.float64)
    order = torch.randperm(50)
    straight = moe(x, moe.route(RouterInput(tokens=x, mode="eval")))
    permuted = moe(x[order], moe.route(RouterInput(tokens=x[order], mode="eval")))
    torch.testing.assert_close(permuted, straight[order], rtol=0, atol=1e-13)


def test_forward_and_backward_are_bitwise_repeatable() -> None:
    moe = layer().float()
    x = torch.randn(300, 6, requires_grad=True)
    runs = []
    for _ in range(2):
        y = moe(x, moe.route(RouterInput(tokens=x, mode="train")))
        runs.append([y, *gradients(moe, x, y)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bf16_tokens_keep_fp32_routing_and_masters() -> None:
    moe = layer(dim=16).float()
    x = torch.randn(40, 16).to(torch.bfloat16)
    routing = moe.route(RouterInput(tokens=x, mode="train"))
    exact = moe.route(RouterInput(tokens=x.float(), mode="train"))
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.experts, exact.experts)
    y = moe(x, routing)
    assert y.dtype == torch.bfloat16
    assert largest_error(y.float(), moe(x.float(), exact)) < 2e-2
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in moe.parameters())


def test_two_layers_may_share_one_bank() -> None:
    first = layer()
    assert first.bank is not None
    second = MoE(first.config, 6, bank=first.bank).double()
    assert second.bank is None
    assert {name for name, _ in second.named_parameters()} == {"router.gate"}
    x = torch.randn(8, 6, dtype=torch.float64)
    second.router.load_state_dict(first.router.state_dict())
    inputs = RouterInput(tokens=x, mode="eval")
    y = second(x, second.route(inputs))
    assert torch.equal(y, first(x, first.route(inputs)))
    y.sum().backward()
    assert first.bank.w1.grad is not None


def test_weight_sources_may_supply_other_weights() -> None:
    moe = layer()
    other = Bank("other", 5, "swiglu", 6, 4).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    routing = moe.route(RouterInput(tokens=x, mode="eval"))
    twin = MoE(moe.config, 6, bank=other).double()
    assert not torch.equal(moe(x, routing), twin(x, routing))
    other.load_state_dict(moe.bank.state_dict() if moe.bank else {})
    assert torch.equal(moe(x, routing), twin(x, routing))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backends_compute_one_layer(backend: Backend) -> None:
    """From routing to output, and every gradient, as with the backend of this machine."""
    if backend == "triton" and triton_refusal(torch.device("cpu")):
        pytest.skip(f"{triton_refusal(torch.device('cpu'))}")
    torch.manual_seed(0)
    moe = MoE(MoE.Config(num_experts=5, hidden=16, router=TopKRouter.Config(k=2), shared_experts=1), 32)
    x, grad = torch.randn(19, 32), torch.randn(19, 32)

    def run() -> list[Tensor]:
        y = moe(x, moe.route(RouterInput(tokens=x, mode="train")))
        return [y.detach(), *torch.autograd.grad(y, [*moe.parameters()], grad)]

    want = run()
    use_kernels(moe, backend)
    for ours, theirs in zip(run(), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
