"""Auxiliary losses: their published values and gradients, and that no split of the batch changes them."""

import pytest
import torch
from torch import Tensor

from moesaic.moe import BalanceLoss, RouterInput, Routing, TopKRouter, ZLoss, aux_loss, aux_values
from moesaic.moe.balance import LayerStats, layer_stats

E, K = 6, 2


def routed(logits: Tensor, k: int = K, experts: Tensor | None = None) -> Routing:
    probabilities = logits.softmax(-1)
    experts = logits.topk(k).indices if experts is None else experts
    weights = probabilities.gather(1, experts)
    return Routing.token_choice(experts, weights, probabilities=probabilities, logits=logits)


def value(term: BalanceLoss | ZLoss, routing: Routing, **facts: object) -> Tensor:
    """The loss itself: finished sums over the number of counted tokens."""
    inputs = RouterInput(tokens=torch.zeros(routing.num_tokens, 1), mode="train", **facts)  # type: ignore[arg-type]
    count = routing.num_tokens if inputs.valid is None else int(inputs.valid.sum())
    return term.finish(term.sums(routing, inputs)) / count


def logits_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, E, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_balance_is_1_when_balanced_and_num_experts_when_collapsed(scope: str, k: int) -> None:
    term = BalanceLoss(coef=1.0, scope=scope)  # type: ignore[arg-type]
    experts = (torch.arange(12)[:, None] + torch.arange(k)) % E
    even = routed(torch.zeros(12, E, dtype=torch.float64), experts=experts)
    assert value(term, even).item() == pytest.approx(1, abs=1e-12)
    if k == 1:
        collapsed = torch.zeros(12, E, dtype=torch.float64)
        collapsed[:, 4] = 1000
        assert value(term, routed(collapsed, 1)).item() == pytest.approx(E, abs=1e-12)


def test_balance_formula_and_gradient_by_hand() -> None:
    logits = logits_of(10)
    routing = routed(logits)
    got = value(BalanceLoss(coef=1.0, scope="micro_batch"), routing)
    shares = torch.bincount(routing.experts, minlength=E).double() / (10 * K)  # no gradient through counts
    want = E * (shares * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))


def test_gradient_reaches_every_expert() -> None:
    """A softmax over only the chosen k has a constant mean and so no gradient at all."""
    logits = logits_of(10)
    (grad,) = torch.autograd.grad(value(BalanceLoss(coef=1.0), routed(logits)), logits)
    assert (grad.abs() > 1e-6).all()


def test_finite_differences() -> None:
    def total(logits: Tensor) -> Tensor:
        routing = routed(logits)
        sequences = torch.tensor([0] * 4 + [1] * 6)
        facts = {"sequences": sequences, "num_sequences": 2}
        return value(BalanceLoss(coef=1.0), routing, **facts) + value(ZLoss(coef=1.0), routing)

    assert torch.autograd.gradcheck(total, (logits_of(10),), eps=1e-7, atol=1e-6)


def test_sequence_wise_formula_by_hand() -> None:
    logits = logits_of(10)
    lengths = [4, 6]
    routing = routed(logits)
    sequences = torch.tensor([0] * 4 + [1] * 6)
    got = value(BalanceLoss(coef=1.0), routing, sequences=sequences, num_sequences=2)
    want = torch.zeros((), dtype=torch.float64)
    for part, length in zip(logits.split(lengths), lengths, strict=True):
        counts = torch.bincount(part.topk(K).indices.flatten(), minlength=E).double()
        want = want + length / 10 * (counts * E / (K * length) * part.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(got, want)


def test_equal_sequences_need_no_numbers() -> None:
    """Padding included: the same value and gradient as with every token's sequence written out."""
    logits = logits_of(12)
    valid = torch.tensor([True] * 5 + [False] + [True] * 2 + [False] * 4)
    facts = {"num_sequences": 3, "valid": valid}
    short, long = (
        value(BalanceLoss(coef=1.0), routed(logits), **facts, **more)
        for more in ({}, {"sequences": torch.arange(3).repeat_interleave(4)})
    )
    torch.testing.assert_close(short, long)
    torch.testing.assert_close(torch.autograd.grad(short, logits), torch.autograd.grad(long, logits))


def test_z_loss_by_hand() -> None:
    logits = logits_of(10)
    want = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(value(ZLoss(coef=1.0), routed(logits)), want)


def test_sigmoid_scores_are_normalized_before_balance() -> None:
    router = TopKRouter(TopKRouter.Config(k=2, score="sigmoid"), 4, E).double()
    routing = router.route(RouterInput(tokens=torch.randn(9, 4, dtype=torch.float64), mode="train"))
    scores = routing.logits.sigmoid()
    torch.testing.assert_close(routing.probabilities, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize(
    "term", [BalanceLoss(coef=1.0), BalanceLoss(coef=1.0, scope="micro_batch"), ZLoss(coef=1.0)], ids=str
)
def test_padding_counts_nowhere(term: BalanceLoss | ZLoss) -> None:
    logits = logits_of(10)
    padded = torch.cat([logits, torch.full((5, E), 30.0, dtype=torch.float64)])
    valid = torch.arange(15) < 10
    sequences = torch.zeros(15, dtype=torch.int64)
    want = value(term, routed(logits))
    got = value(term, routed(padded), valid=valid, sequences=sequences)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(want, logits))
    inputs = RouterInput(tokens=torch.zeros(15, 1), mode="train", valid=valid)
    stats = layer_stats(routed(padded), inputs, (term,), E)
    assert torch.equal(stats.counts, torch.bincount(routed(logits).experts, minlength=E))
    torch.testing.assert_close(
        stats.entropy, torch.distributions.Categorical(logits=logits).entropy().sum().detach()
    )


def test_loss_counts_what_is_dispatched() -> None:
    """With a bias the choice differs from the best scores; the loss must see the choice."""
    router = TopKRouter(TopKRouter.Config(k=2, bias_rate=0.1), 4, E).double()
    router.bias[1] = 5
    inputs = RouterInput(tokens=torch.randn(9, 4, dtype=torch.float64), mode="train")
    routing = router.route(inputs)
    term = BalanceLoss(coef=1.0, scope="micro_batch")
    counts, _ = term.sums(routing, inputs)
    assert counts[0].tolist() == torch.bincount(routing.experts, minlength=E).tolist()
    assert counts[0, 1] == 9


def stats_of(logits: Tensor, lengths: list[int], terms: tuple[BalanceLoss | ZLoss, ...]) -> LayerStats:
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inputs = RouterInput(
        tokens=logits, mode="train", sequences=sequences, num_sequences=len(lengths), layer=0
    )
    return layer_stats(routed(logits), inputs, terms, E)


def test_splitting_the_batch_changes_nothing() -> None:
    """Micro-batches add up for scope `sequence` and z; ranks add up for every scope, sums first."""
    logits = logits_of(12)
    lengths = [3, 5, 4]
    exact = (BalanceLoss(coef=0.3), ZLoss(coef=0.2))
    whole = aux_loss([stats_of(logits, lengths, exact)])
    parts = sum(
        aux_loss([stats_of(part, [n], exact)]) for part, n in zip(logits.split(lengths), lengths, strict=True)
    )
    torch.testing.assert_close(parts, whole)

    terms = (*exact, BalanceLoss(coef=0.7, scope="micro_batch"))
    whole = aux_loss([stats_of(logits, lengths, terms)])
    ranks = [stats_of(part, [n], terms) for part, n in zip(logits.split(lengths), lengths, strict=True)]
    summed = [
        (term, tuple(sum(rank.aux[i][1][j] for rank in ranks) for j in range(len(sums))))
        for i, (term, sums) in enumerate(ranks[0].aux)
    ]
    reduced = LayerStats(0, ranks[0].counts, ranks[0].entropy, tuple(summed))  # type: ignore[arg-type]
    torch.testing.assert_close(aux_loss([reduced]), whole)


def test_aux_loss_adds_layers_with_their_coefficients() -> None:
    logits = logits_of(12)
    one = stats_of(logits, [12], (ZLoss(coef=0.5),))
    total = aux_loss([one, one])
    torch.testing.assert_close(total, logits.logsumexp(-1).square().sum())
    assert aux_loss([]) == 0


def test_ranks_add_up_to_the_terms_of_all_tokens() -> None:
    logits, lengths = logits_of(12), [5, 7]
    terms = (BalanceLoss(coef=1.0, scope="micro_batch"), BalanceLoss(coef=1.0), ZLoss(coef=1.0))
    parts = [stats_of(part, [n], terms) for part, n in zip(logits.split(lengths), lengths, strict=True)]
    exchanged = [tuple(sum(rank.aux[0][1][j] for rank in parts) for j in range(2))]  # of the first term

    def values(rank: int) -> list[torch.Tensor]:
        sums = iter(exchanged[0])
        return [found.value for found in aux_values([parts[rank]], lambda part: next(sums), len(parts))]  # type: ignore[arg-type, return-value]

    whole = [found.value for found in aux_values([stats_of(logits, lengths, terms)])]
    for mine, other, both in zip(values(0), values(1), whole, strict=True):
        torch.testing.assert_close(mine + other, both)
