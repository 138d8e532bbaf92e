"""The top-k router: the published formulas by hand, and every known bug of reference implementations as a test."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.moe import MoE, RouterInput, TopKRouter
from moesaic.moe.noise import key, uniform
from moesaic.moe.topk import balanced_bias, jittered


def router(dim: int = 6, experts: int = 8, **settings: object) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(TopKRouter.Config(**{"k": 2, **settings}), dim, experts).double()  # type: ignore[arg-type]


def tokens(count: int = 20, dim: int = 6) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def route(r: TopKRouter, x: Tensor, **facts: object):
    return r.route(RouterInput(tokens=x, mode=facts.pop("mode", "train"), **facts))  # type: ignore[arg-type]


def chosen(routing, k: int = 2) -> tuple[Tensor, Tensor]:
    return routing.experts.reshape(-1, k), routing.weights.reshape(-1, k)


def test_softmax_before_is_the_raw_probability() -> None:
    r, x = router(normalize="before"), tokens()
    experts, weights = chosen(route(r, x))
    probabilities = (x @ r.gate.T).softmax(-1)
    best = probabilities.topk(2).indices
    assert torch.equal(experts, best)
    torch.testing.assert_close(weights, probabilities.gather(1, best))


def test_normalizing_after_softmax_is_softmax_over_the_chosen_logits() -> None:
    """Renormalised probabilities (GShard) and a softmax over k logits (Mixtral) are the same function."""
    r, x = router(), tokens()
    experts, weights = chosen(route(r, x))
    logits = x @ r.gate.T
    picked = logits.softmax(-1).gather(1, experts)
    torch.testing.assert_close(weights, picked / picked.sum(-1, keepdim=True))
    torch.testing.assert_close(weights, logits.gather(1, experts).softmax(-1))


def test_which_logits_get_gradient() -> None:
    """Only raw softmax weights reach the logits that were not chosen, through the denominator."""
    for normalize, reaches in (("before", True), ("after", False)):
        r, x = router(normalize=normalize), tokens(1)
        routing = route(r, x)
        (grad,) = torch.autograd.grad(routing.weights[0], routing.logits)
        others = torch.ones(8, dtype=torch.bool)
        others[routing.experts] = False
        assert bool((grad[0, others].abs() > 1e-6).all()) == reaches


def test_top_1_of_raw_softmax_trains_the_router_and_normalized_is_refused() -> None:
    r, x = router(k=1, normalize="before"), tokens()
    (grad,) = torch.autograd.grad(route(r, x).weights.sum(), r.gate)
    assert grad.abs().max() > 1e-3
    for score in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match="normalize: 'after' with k = 1"):
            TopKRouter.Config(k=1, score=score)


def test_sigmoid_weights_are_unbiased_normalized_and_scaled() -> None:
    r, x = router(score="sigmoid", scale=2.5), tokens()
    r.bias.copy_(torch.linspace(-1, 1, 8))
    experts, weights = chosen(route(r, x))
    scores = (x @ r.gate.T).sigmoid()
    assert torch.equal(experts, (scores + r.bias).topk(2).indices)
    picked = scores.gather(1, experts)
    torch.testing.assert_close(weights, 2.5 * picked / picked.sum(-1, keepdim=True))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_bias_steers_selection_but_never_scales(score: str) -> None:
    r, x = router(score=score, normalize="before"), tokens()
    before, _ = chosen(route(r, x))
    r.bias[5] = 10
    experts, weights = chosen(route(r, x))
    assert (experts == 5).any(-1).all()
    assert not torch.equal(experts, before)
    logits = x @ r.gate.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    torch.testing.assert_close(weights, scores.gather(1, experts))


def test_bias_is_state_without_gradient() -> None:
    r, x = router(), tokens()
    assert "bias" in r.state_dict()
    assert "bias" not in dict(r.named_parameters())
    routing = route(r, x)
    assert not r.bias.requires_grad
    assert routing.weights.requires_grad


def test_normalized_sigmoids_cannot_vanish_by_underflow() -> None:
    """With sums of sigmoids and a small epsilon a router can shrink all weights to zero; in log space it cannot."""
    r = TopKRouter(TopKRouter.Config(k=2, score="sigmoid"), 2, 4)
    with torch.no_grad():
        r.gate.copy_(torch.tensor([[-150.0, 0], [-151, 0], [-152, 0], [-153, 0]]))
    routing = route(r, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(routing.weights.sum(), torch.tensor(1.0))
    torch.testing.assert_close(
        routing.weights, torch.tensor([1.0, 0.0]).add(torch.tensor([-1.0, 1]) * 0.26894143)
    )
    torch.testing.assert_close(routing.probabilities.sum(), torch.tensor(1.0))


def test_group_limited_choice_by_hand() -> None:
    r, x = router(experts=8, groups=4, groups_kept=2, k=3, score="sigmoid"), tokens(50)
    r.bias.copy_(
        torch.linspace(-3, -1, 8)
    )  # selection scores are negative: masking with 0 would choose wrongly
    experts, _ = chosen(route(r, x), 3)
    scores = ((x @ r.gate.T).sigmoid() + r.bias).detach()
    for token in range(50):
        groups = scores[token].reshape(4, 2)
        kept = groups.sum(-1).topk(2).indices.tolist()  # groups of two: the best two are all
        allowed = [e for e in range(8) if e // 2 in kept]
        want = sorted(allowed, key=lambda e: -float(scores[token, e]))[:3]
        assert experts[token].tolist() == want


def test_group_score_is_the_sum_of_the_best_two() -> None:
    r = TopKRouter(TopKRouter.Config(k=1, normalize="before", score="sigmoid", groups=2, groups_kept=1), 1, 6)
    with torch.no_grad():
        r.gate.copy_(
            torch.tensor([[3.0], [-9], [-9], [1], [1], [1]])
        )  # best single expert lies in the weaker group
    assert int(route(r, torch.ones(1, 1)).experts) == 3


def test_jitter_multiplies_tokens_in_training_only() -> None:
    r, x = router(jitter=0.3), tokens()
    calm = route(r, x, mode="eval").logits
    torch.testing.assert_close(calm, x @ r.gate.T)
    noise = 1 - 0.3 + 0.6 * uniform(key(7, 3, 1), torch.arange(20), 6).double()
    loud = route(r, x, seed=7, step=3, layer=1).logits
    torch.testing.assert_close(loud, (x * noise) @ r.gate.T)
    assert torch.equal(loud, route(r, x, seed=7, step=3, layer=1, mode="recompute").logits)
    for change in ({"seed": 8}, {"step": 4}, {"layer": 2}):
        assert not torch.equal(loud, route(r, x, **{"seed": 7, "step": 3, "layer": 1, **change}).logits)


def test_noise_depends_on_the_global_token_only() -> None:
    """Any split of the batch over ranks or micro-batches draws the same numbers."""
    x = tokens()

    def noisy(start: int, end: int) -> Tensor:
        inputs = RouterInput(tokens=x[start:end], mode="train", indices=torch.arange(100 + start, 100 + end))
        return jittered(inputs, 0.3)

    assert torch.equal(noisy(0, 20), torch.cat([noisy(0, 3), noisy(3, 20)]))
    assert not torch.equal(noisy(0, 20), x)


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    values = uniform(key(1, 2, 3), torch.arange(20_000), 8).double()
    assert values.min() >= 0
    assert values.max() < 1
    histogram = torch.histc(values, 16, 0, 1) / values.numel()
    assert (histogram * 16 - 1).abs().max() < 0.03
    centred = values - 0.5
    assert (centred[1:] * centred[:-1]).mean().abs() < 1e-3
    assert (centred[:, 1:] * centred[:, :-1]).mean().abs() < 1e-3
    other = uniform(key(1, 2, 4), torch.arange(20_000), 8).double() - 0.5
    assert (centred * other).mean().abs() < 1e-3
    assert key(1, 2) != key(2, 1)


def test_balanced_bias_is_the_sign_rule() -> None:
    counts = torch.tensor([10, 4, 4, 0, 2])  # mean 4
    bias = balanced_bias(torch.zeros(5), counts, 0.5)
    assert bias.tolist() == [-0.5, 0, 0, 0.5, 0.5]
    assert torch.equal(balanced_bias(bias, torch.zeros(5, dtype=torch.int64), 0.5), bias)


def test_sign_rule_balances_a_skewed_router() -> None:
    torch.manual_seed(3)
    config = MoE.Config(
        num_experts=8, hidden=2, router=TopKRouter.Config(k=2, score="sigmoid", bias_rate=0.01)
    )
    moe = MoE(config, 6).double()
    assert isinstance(moe.router, TopKRouter)
    with torch.no_grad():
        moe.router.gate[:2] += 2
    x = torch.randn(2000, 6, dtype=torch.float64) + 0.5
    inputs = RouterInput(tokens=x, mode="train")
    violations = []
    for _ in range(100):
        counts = moe.stats(moe.route(inputs), inputs).counts
        violations.append(float(counts.max() / counts.double().mean() - 1))
        moe.router.bias.copy_(balanced_bias(moe.router.bias, counts, 0.01))
    assert violations[0] > 1
    assert violations[-1] < 0.1


def test_impossible_choices_are_refused() -> None:
    for settings, message in [
        ({"k": 9}, "router.k: 9 is more than num_experts = 8"),
        ({"k": 2, "groups": 3}, "router.groups: 3 does not divide num_experts = 8"),
        ({"k": 5, "groups": 4, "groups_kept": 2}, "router.k: 5 is more than the 4 experts"),
    ]:
        with pytest.raises(ValueError, match=message):
            MoE.Config(num_experts=8, hidden=4, router=TopKRouter.Config(**settings))  # type: ignore[arg-type]
    for settings, message in [
        ({"k": 0}, "k: 0"),
        ({"k": 2, "groups": 4, "groups_kept": 5}, "groups_kept: 5"),
        ({"k": 2, "jitter": 1.0}, "jitter: 1.0"),
        ({"k": 2, "bias_rate": -1.0}, "bias_rate: -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            TopKRouter.Config(**settings)
    assert replace(TopKRouter.Config(k=2), k=3).k == 3
