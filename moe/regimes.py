"""Routing traces that are made up: the regimes in which placements of experts are compared, and plain skew.

Published loads that the regimes imitate: arXiv:2504.19925 and the traces of SmartMoE (ATC 2023) early and late in
training, LAER-MoE (arXiv:2602.11686) without balancing, UltraEP (arXiv:2606.04101) with it. Of one seed, longer traces
begin like shorter ones, and layers do not depend on their number. Numpy only.

Dims: N steps, L layers, S sources, E experts, P ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float64, Int64

from moesaic.moe.apportion import apportion
from moesaic.moe.trace import RoutingTrace, TraceError

Regime = Literal["R1", "R2", "R3", "R4", "R5"]
"""R1: early training; Zipf exponents from 1.7 to 1.1 over 500 steps, a tenth to three tenths of the load moves at every
step. R2: few coarse experts, no balancing; the busiest rank has 1.5 to 2.5 times the mean, and 5 to 8 hundredths move;
every twentieth layer is redrawn at each step. R3: fine experts, balanced on average; exponents from 0.3 to 0.9, and
each step keeps only half to nine tenths of the experts' places. R4: fine-tuning on one domain; exponents from 0.7 to
0.95, hot experts side by side, next to nothing moves. R5: every expert the same."""
MOST_NUMBERS = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of a trace."""

    steps: int
    layers: int
    sources: int
    experts: int
    tokens: int
    """Of one source in one step."""
    k: int
    """Experts per token."""

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "sources", "experts", "tokens", "k"):
            if getattr(self, name) < 1:
                raise TraceError(f"{name}: {getattr(self, name)} is not positive")
        if self.k > self.experts:
            raise TraceError(f"k: {self.k} is more than experts = {self.experts}")
        if self.steps * self.layers * self.sources * self.experts > MOST_NUMBERS:
            raise TraceError(
                "steps: so many steps, layers, sources and experts are above 2^31 numbers; give less"
            )
        if self.tokens * self.k >= 1 << 31:
            raise TraceError(f"tokens: {self.tokens} of one source are too many; give fewer")


def generate(regime: Regime, shape: Shape, *, seed: int = 0) -> RoutingTrace:
    """A trace of a regime. Sources draw from the same shares, so that they differ by chance alone.

    Few experts cannot move by small steps, so R1 wants 16 or more; R2 takes sources for ranks, and wants 4 or more. An
    expert gets each token at most once, which bounds its share by 1 / k.
    """
    if regime not in get_args(Regime):
        raise TraceError(f"regime: {regime!r} is not one of {', '.join(get_args(Regime))}")
    counts = np.empty((shape.steps, shape.layers, shape.sources, shape.experts), np.int32)
    for layer in range(shape.layers):
        shares = SHARES[regime](shape, layer, np.random.default_rng([seed, layer, 0]))
        draws = np.random.default_rng([seed, layer, 1])
        for step, of_step in enumerate(shares):
            counts[step, layer] = drawn(of_step, shape, None if regime == "R5" else draws)
    return trace_of(counts, shape)


def skewed(shape: Shape, *, ranks: int, peak: float, ratio: float = 0.7) -> RoutingTrace:
    """The same counts at every step and source: the first of `ranks` has `peak` times the mean load, the others alike.

    Ranks own contiguous equal runs of experts. Within a rank the load falls by `ratio` from one expert to the next.
    Loads are exact to rounding; TraceError where a rank has too few experts for its load, as each takes a token once.
    """
    if ranks < 1 or shape.experts % ranks:
        raise TraceError(f"ranks: {ranks} does not divide experts = {shape.experts}")
    each, rows = shape.experts // ranks, shape.tokens * shape.k
    largest = min(ranks, each * ranks / shape.k)
    if not 1 <= peak <= largest:
        raise TraceError(
            f"peak: {peak} is not in 1 to {largest:g}, what {each} experts of {ranks} ranks can take"
        )
    if not 0 < ratio <= 1:
        raise TraceError(f"ratio: {ratio} is not above 0 and up to 1")
    loads = np.full((1, ranks), (ranks - peak) / max(1, ranks - 1))
    loads[0, 0] = peak
    of_ranks = apportion(loads, np.array([rows]), np.array(shape.tokens * each))[0]
    within = np.broadcast_to(ratio ** np.arange(each), (ranks, each))
    row = apportion(within, of_ranks, np.array(shape.tokens)).ravel()
    counts = np.broadcast_to(row, (shape.steps, shape.layers, shape.sources, shape.experts))
    return trace_of(counts.astype(np.int32), shape)


def trace_of(counts: np.ndarray, shape: Shape) -> RoutingTrace:
    """A trace with steps and layers numbered from 0."""
    return RoutingTrace(counts, np.arange(shape.steps), np.arange(shape.layers), shape.k)


def drawn(
    shares: Float64[np.ndarray, " E"], shape: Shape, draws: np.random.Generator | None
) -> Int64[np.ndarray, "S E"]:
    """Counts of every source, by chance; without `draws`, what is expected. None above the source's tokens."""
    rows = np.full(shape.sources, shape.tokens * shape.k)
    weights = np.tile(shares, (shape.sources, 1)) if draws is None else draws.multinomial(rows, shares)
    if draws is not None and weights.max() <= shape.tokens:
        return weights
    return apportion(weights, rows, np.array(shape.tokens))


def zipf(exponent: float, count: int) -> Float64[np.ndarray, " E"]:
    """Shares in proportion to 1 / place^exponent, in descending order."""
    weights = np.arange(1, count + 1.0) ** -exponent
    return weights / weights.sum()


def move(
    order: np.ndarray, weights: np.ndarray, low: float, high: float, random: np.random.Generator
) -> float:
    """Swap members of `order`, in place, until a share between low and high has moved (total variation); returns it.

    The member in place i has weight i, so the shares stay what they are, with other owners. Less moves where no swap is
    small enough.
    """
    wanted, moved, free = random.uniform(low, high), 0.0, np.ones(len(order), bool)
    for _ in range(4 * len(order)):
        i, j = random.integers(len(order), size=2)
        much = float(abs(weights[i] - weights[j]))
        if free[i] and free[j] and moved + much <= high:
            order[[i, j]] = order[[j, i]]
            free[[i, j]] = i == j
            moved += much
            if moved >= wanted:
                break
    return moved


def placed(order: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Shares by member, where `order` lists members by place."""
    shares = np.empty(len(order))
    shares[order] = weights
    return shares


def early(shape: Shape, layer: int, random: np.random.Generator) -> np.ndarray:
    """Shares (N, E) of R1."""
    order, shares = random.permutation(shape.experts), np.empty((shape.steps, shape.experts))
    for step in range(shape.steps):
        weights = zipf(1.7 - 0.6 * min(1.0, step / 500), shape.experts)
        if step:
            move(order, weights, 0.12, 0.28, random)  # chance adds some
        shares[step] = placed(order, weights)
    return shares


def unbalanced(shape: Shape, layer: int, random: np.random.Generator) -> np.ndarray:
    """Shares (N, E) of R2."""
    ranks = min(shape.sources, shape.experts)
    groups = np.array_split(np.arange(shape.experts), ranks)
    peak = random.uniform(1.55, max(1.55, min(2.45, 0.9 * ranks)))
    weights = peaked(min(peak, ranks), ranks)
    order = random.permutation(ranks)
    inner = [(random.permutation(len(group)), zipf(0.3, len(group))) for group in groups]
    shares = np.empty((shape.steps, shape.experts))
    for step in range(shape.steps):
        if step and layer % 20 == 19:
            order = random.permutation(ranks)
        elif step:
            move(order, weights, 0.05, 0.075, random)
        for rank, load in enumerate(placed(order, weights)):
            shares[step, groups[rank]] = load * placed(*inner[rank])
    return shares


def peaked(peak: float, count: int) -> np.ndarray:
    """Zipf shares of which the largest is `peak` times the mean."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if zipf(middle, count)[0] * count < peak else (low, middle)
    return zipf(low, count)


def balanced(shape: Shape, layer: int, random: np.random.Generator) -> np.ndarray:
    """Shares (N, E) of R3."""
    weights = zipf(random.uniform(0.3, 0.9), shape.experts)
    memory = random.uniform(0.5, 0.9)
    order, shares = random.permutation(shape.experts), np.empty((shape.steps, shape.experts))
    for step in range(shape.steps):
        if step:
            redrawn = random.random(shape.experts) >= memory
            order[redrawn] = random.permutation(order[redrawn])
        shares[step] = placed(order, weights)
    return shares


def one_domain(shape: Shape, layer: int, random: np.random.Generator) -> np.ndarray:
    """Shares (N, E) of R4."""
    weights = zipf(random.uniform(0.7, 0.95), shape.experts)
    order = (random.integers(shape.experts) + np.arange(shape.experts)) % shape.experts
    shares = np.empty((shape.steps, shape.experts))
    for step in range(shape.steps):
        if step and step % 10 == 0:
            move(order, weights, 0.002, 0.01, random)
        shares[step] = placed(order, weights)
    return shares


def uniform(shape: Shape, layer: int, random: np.random.Generator) -> np.ndarray:
    """Shares (N, E) of R5."""
    return np.full((shape.steps, shape.experts), 1 / shape.experts)


SHARES: dict[str, Callable[[Shape, int, np.random.Generator], Sequence[np.ndarray] | np.ndarray]] = {
    "R1": early,
    "R2": unbalanced,
    "R3": balanced,
    "R4": one_domain,
    "R5": uniform,
}
"""Each regime's shares (N, E) of one layer."""
