"""Balanced assignment: one expert per token, the same number of tokens per expert, the best total score.

Scores become integers, so that all engines take the same steps and return the same assignment, on any device and with
any number of threads. Then prices: every token chooses its best expert at the prices of the moment, experts chosen too
often become dearer, the others cheaper. At first the scores are dithered, by less and less: equal tokens would all
change their minds at once. What is left over moves between experts along cheapest paths (successive shortest paths on
a graph whose nodes are the experts): that ends in exact quotas and in the optimum of the integer problem, however good
the prices were. The price rounds only make it quick.

Dims: T tokens, E experts.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, engine

BITS = 28
"""The largest difference within a row is 2^BITS: sums of a few such numbers fit into 32 bits."""
LEVELS = 18
"""How often the dither is halved."""
PER_LEVEL = 2
"""Price rounds for each of them."""
ROUNDS = 24
"""Price rounds without dither."""
PRICE_LIMIT = 1 << 29
FAR = 1 << 30
"""The cost of leaving an expert without tokens."""
UNREACHED = 1 << 44
"""The distance of an expert that no path has reached; true distances are below half of it."""


def balanced_assignment(scores: Float[Tensor, "T E"], *, backend: Backend = "auto") -> Int[Tensor, " T"]:
    """The expert of each token, so that the total score is the largest that exact quotas allow. No gradient.

    Expert e gets `quotas(T, E)[e]` tokens. The total is within T * 2^-28 of the optimum, times the largest difference
    between two scores of a token. Scores that are not finite count as the smallest finite one (as 0 where none is).
    The same scores give the same assignment on all devices and engines; between equal totals the choice is fixed, but
    no rule is promised.

    On GPUs, Triton never waits for the host to look; plain torch looks once, after the price rounds, and ends on the
    CPU. Raises ValueError for scores of another shape or type, or tokens without experts.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"balanced_assignment: scores must be floating-point (T, E), not {_words(scores)}")
    if scores.shape[0] and not scores.shape[1]:
        raise ValueError("balanced_assignment: no experts for the tokens")
    return _balanced_assignment(scores.detach(), backend)


def quotas(tokens: int, num_experts: int) -> list[int]:
    """Tokens of each expert: T // E, and one more for each of the first T % E. Known without the scores."""
    each, rest = divmod(tokens, num_experts)
    return [each + (e < rest) for e in range(num_experts)]


def _words(scores: Tensor) -> str:
    return f"{tuple(scores.shape)} of {str(scores.dtype).removeprefix('torch.')}"


@torch.library.custom_op("moesaic::balanced_assignment", mutates_args=())
def _balanced_assignment(scores: Tensor, backend: str) -> Tensor:
    tokens, width = scores.shape
    experts = min(tokens, width)  # the others have a quota of 0
    if experts <= 1:
        return scores.new_zeros(tokens, dtype=torch.int64)
    if scores.dtype not in native.SERVED:
        scores = scores.float()
    chosen = engine(backend, scores)
    if chosen == "triton" and torch.version.hip:
        chosen = "torch"  # the repair needs a barrier that orders stores, which Triton's is not on AMD GPUs
    if chosen == "cpp":
        out = scores.new_empty(tokens, dtype=torch.int64)
        sizes = (tokens, experts, width, BITS, LEVELS, PER_LEVEL, ROUNDS)
        native.run("balanced_assignment", scores.dtype, scores.contiguous(), out, *sizes)
        return out
    values = _integers(scores[:, :experts])
    quota = torch.full((experts,), tokens // experts, dtype=torch.int64, device=scores.device)
    quota[: tokens % experts] += 1
    if chosen == "triton":
        from moesaic.kernels.triton import auction

        return auction.assign(values, _typical(values), _dither(values), quota)
    choice = _choose(values, _prices(values, quota))
    return _repair(values.cpu(), choice.cpu(), quota.cpu()).to(scores.device)


@_balanced_assignment.register_fake
def _(scores: Tensor, backend: str) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _integers(scores: Float[Tensor, "T E"]) -> Int[Tensor, "T E"]:
    """Differences within rows, of at most 2^BITS; then every column without its mean, which changes no optimum.

    Only exact and correctly rounded operations, which are the same everywhere.
    """
    scores = scores.double() * 0.25  # differences of the largest doubles would overflow
    finite = scores.isfinite()
    lowest = torch.where(finite, scores, torch.inf).amin()
    scores = torch.where(finite, scores, torch.where(lowest.isfinite(), lowest, 0.0))
    regret = scores - scores.amax(1, keepdim=True)
    largest = -regret.amin()
    values = (regret / torch.where(largest > 0, largest, 1.0) * 2.0**BITS).round().long()
    # a few rows of huge values must not move the mean
    clipped = torch.maximum(values, -8 * _typical(values))
    return values - clipped.sum(0).div(values.shape[0], rounding_mode="trunc")


def _typical(values: Int[Tensor, "T E"]) -> Int[Tensor, ""]:
    """A power of two near the geometric mean of the ranges of the rows; a scalar on the device."""
    ranges = values.amax(1) - values.amin(1)
    bits = torch.frexp(ranges.double()).exponent.long()  # of 0: 0
    mean = bits.sum().div((ranges > 0).sum().clamp_min(1), rounding_mode="trunc")
    return torch.ones_like(mean) << (mean - 1).clamp(0, BITS)


def _dither(values: Int[Tensor, "T E"]) -> Int[Tensor, "T E"]:
    """-128 to 127, from a hash of token and expert."""
    tokens, experts = (torch.arange(size, device=values.device) for size in values.shape)
    mixed = (tokens[:, None] * 0x9E3779B1 ^ experts * 0x85EBCA77) & 0xFFFFFFFF
    return (mixed * 0x2C1B3C6D >> 24 & 0xFF) - 128


def _choose(values: Int[Tensor, "T E"], price: Int[Tensor, " E"]) -> Int[Tensor, " T"]:
    """The best expert of every token at these prices, the first of equal ones."""
    experts = values.shape[1]
    rank = torch.arange(experts - 1, -1, -1, device=values.device)
    return experts - 1 - ((values - price) * experts + rank).amax(1) % experts


def _prices(values: Int[Tensor, "T E"], quota: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    """Prices at which experts are chosen about as often as their quotas say. No host synchronisation."""

    def count(choice: Tensor) -> Tensor:
        return torch.zeros_like(quota).scatter_add_(0, choice, torch.ones_like(choice))

    scale, dither = _typical(values), _dither(values)
    price = torch.zeros_like(quota)
    for level in range(LEVELS):
        amplitude = (scale >> level).clamp_min(1)
        dithered = values + dither * (amplitude >> 8)
        for _ in range(PER_LEVEL):
            chosen = count(_choose(dithered, price))
            change = (amplitude * (chosen - quota)).div(2 * (chosen + quota), rounding_mode="trunc")
            price = (price + change).clamp(-PRICE_LIMIT, PRICE_LIMIT)
    best, fewest = price, torch.full_like(scale, values.shape[0] + 1)
    step, last = (scale >> 10).clamp_min(1).expand_as(quota), torch.zeros_like(quota)
    for _ in range(ROUNDS):
        over = count(_choose(values, price)) - quota
        excess, sign = over.clamp_min(0).sum(), over.sign()
        best = torch.where(excess < fewest, price, best)
        fewest = torch.minimum(excess, fewest)
        step = torch.where(sign * last < 0, step >> 1, torch.where(sign * last > 0, step + (step >> 1), step))
        step = torch.minimum(step.clamp_min(1), scale)
        price = (price + sign * step).clamp(-PRICE_LIMIT, PRICE_LIMIT)
        last = sign
    return best


def _repair(
    values: Int[Tensor, "T E"], choice: Int[Tensor, " T"], quota: Int[Tensor, " E"]
) -> Int[Tensor, " T"]:
    """Move tokens from experts with too many to experts with too few, each time along the cheapest path.

    All tokens start where they like it best at some prices, so no cycle of moves gains anything, and moving along
    cheapest paths keeps it so: the end is optimal. Tokens of equal cost move together.
    """
    experts = values.shape[1]
    index = torch.arange(experts)
    count = choice.bincount(minlength=experts)
    cost = torch.full((experts, experts), FAR)  # of the cheapest move from one to another
    changed = index.tolist()
    while (over := count - quota).any():
        for e in changed:
            members = values[choice == e]
            cost[e] = (members[:, e : e + 1] - members).amin(0) if len(members) else 2 * UNREACHED
        distance = torch.where(over > 0, 0, UNREACHED)
        parent = torch.full((experts,), -1)
        while True:  # Bellman-Ford
            key = ((distance[:, None] + cost) * experts + index[:, None]).amin(0)
            reached = key.div(experts, rounding_mode="floor")
            better = reached < distance.clamp_max(UNREACHED // 2)
            if not better.any():
                break
            distance = torch.where(better, reached, distance)
            parent = torch.where(better, key % experts, parent)
        sink = int(torch.where(over < 0, distance * experts + index, UNREACHED * experts).argmin())
        parents, changed = parent.tolist(), [sink]
        while parents[changed[-1]] >= 0:
            changed.append(parents[changed[-1]])
        source = changed[-1]
        edges = list(zip(changed[1:], changed, strict=False))
        fitting = [
            ((choice == e) & (values[:, e] - values[:, f] == cost[e, f])).nonzero().flatten()
            for e, f in edges
        ]
        moved = min(int(over[source]), int(-over[sink]), *map(len, fitting))
        choice = choice.clone()
        for (_, f), tokens in zip(edges, fitting, strict=True):
            choice[tokens[:moved]] = f
        count[source] -= moved
        count[sink] += moved
    return choice
