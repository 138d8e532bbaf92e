"""Auxiliary losses and load statistics as values.

A term yields sums that add up over tokens, micro-batches of one scope and ranks; `finish` turns the reduced sums into
its loss times the number of tokens, so that dividing by the step's token count gives the same value however the batch
was cut. Nothing is kept between calls, so a recomputed forward pass counts nothing twice.

Dims: T tokens, E experts, B sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels.plan import tally
from moesaic.moe.routing import RouterInput, Routing

Sums = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class BalanceLoss:
    """`E * sum over experts of (share of assignments) * (mean probability)`: 1 at balance, E when one expert has all.

    Sources: arXiv:2101.03961 eq. 4 (Switch), in the normalisation that is 1 for every K; arXiv:2412.19437 eq. 17
    (sequence-wise). The probability is over all experts, before the choice.
    """

    kind: Literal["balance"] = "balance"
    coef: float
    """Factor of the loss, per layer; layers add up."""
    scope: Literal["sequence", "micro_batch"] = "sequence"
    """Tokens over which load is balanced. `sequence` is exact under every split of the batch; `micro_batch` is exact
    across ranks for fixed micro-batches, but changes with the number of accumulation steps."""

    def __post_init__(self) -> None:
        check_coef(self.coef)

    @property
    def additive(self) -> bool:
        """Whether `finish` of a sum is the sum of `finish`: then ranks need not exchange sums."""
        return self.scope == "sequence"

    @property
    def name(self) -> str:
        """In metrics."""
        return "balance" if self.scope == "sequence" else "micro_batch_balance"

    def sums(self, routing: Routing, inputs: RouterInput) -> Sums:
        """Counts (B, E) without gradient and summed probabilities (B, E); B is 1 for `micro_batch`."""
        probabilities = routing.probabilities
        chosen = torch.zeros_like(probabilities)
        chosen = chosen.index_put_((routing.tokens, routing.experts), chosen.new_ones(()), accumulate=True)
        sums = [sequence_sums(values, inputs, self.scope) for values in (chosen.detach(), probabilities)]
        return (balance_sum(*sums),) if self.scope == "sequence" else tuple(sums)

    def finish(self, sums: Sums) -> Float[Tensor, ""]:
        """The loss times the number of counted tokens."""
        return sums[0] if self.scope == "sequence" else balance_sum(*sums)


def balance_sum(counts: Float[Tensor, "B E"], probabilities: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """Sum over sequences of (tokens of the sequence) * (its balance loss); empty sequences add nothing."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (shares * probabilities).sum()


def sequence_sums(
    values: Float[Tensor, "T E"], inputs: RouterInput, scope: Literal["sequence", "micro_batch"]
) -> Float[Tensor, "B E"]:
    """Sums over the counted tokens of each sequence, or over all of them, without atomics."""
    if scope == "micro_batch":
        count = 1
    elif inputs.sequences is None:
        count = inputs.num_sequences
    else:  # of any lengths and in any order: a product with who belongs where
        numbers = torch.arange(inputs.num_sequences, device=values.device)
        members = (inputs.sequences == numbers[:, None]).to(values.dtype)
        return (members if inputs.valid is None else members * inputs.valid) @ values
    counted = values if inputs.valid is None else values * inputs.valid[:, None]
    length = values.shape[0] // count
    return counted.view(count, length, values.shape[1]).sum(1)


@dataclass(frozen=True, kw_only=True)
class ZLoss:
    """Mean over tokens of `logsumexp(logits)^2`: keeps router logits small (arXiv:2202.08906, eq. 5)."""

    kind: Literal["z"] = "z"
    coef: float
    """Factor of the loss, per layer; layers add up."""

    name = "z"
    additive = True

    def __post_init__(self) -> None:
        check_coef(self.coef)

    def sums(self, routing: Routing, inputs: RouterInput) -> Sums:
        """Summed squares, a scalar."""
        squares = routing.logits.logsumexp(-1).square()
        return ((squares if inputs.valid is None else squares * inputs.valid).sum(),)

    def finish(self, sums: Sums) -> Float[Tensor, ""]:
        """The loss times the number of counted tokens."""
        return sums[0]


AuxTerm = BalanceLoss | ZLoss


def check_coef(coef: float) -> None:
    if coef < 0:
        raise ValueError(f"coef: {coef} is negative")


@dataclass(frozen=True)
class LayerStats:
    """What one layer's routing of one micro-batch adds to losses, rules and metrics. Everything sums over tokens."""

    layer: int
    counts: Int[Tensor, " E"]
    """Assignments per expert, of counted tokens."""
    entropy: Float[Tensor, ""]
    """Sum over counted tokens of the entropy of their probabilities, in nats."""
    aux: tuple[tuple[AuxTerm, Sums], ...]


def layer_stats(
    routing: Routing, inputs: RouterInput, terms: tuple[AuxTerm, ...], num_experts: int
) -> LayerStats:
    """Collect the sums of one layer. Counts and entropy carry no gradient."""
    with torch.no_grad():
        counted = None if inputs.valid is None else inputs.valid[routing.tokens]
        counts = tally(routing.experts, num_experts, counted)
        entropies = torch.special.entr(routing.probabilities).sum(-1)
        entropy = (entropies if inputs.valid is None else entropies * inputs.valid).sum()
    aux = tuple((term, term.sums(routing, inputs)) for term in terms)
    return LayerStats(inputs.layer, counts, entropy, aux)


@dataclass(frozen=True)
class AuxValue:
    """One term of one layer."""

    layer: int
    term: AuxTerm
    value: Tensor
    """Its loss times the number of counted tokens; of several ranks, this rank's share of that."""


def aux_values(
    layers: list[LayerStats], exchange: Callable[[Tensor], Tensor] | None = None, ranks: int = 1
) -> list[AuxValue]:
    """Finish every term. Over ranks, `exchange` sums a tensor over all of them, with a gradient.

    Only terms that need the sums of the whole micro-batch are exchanged. All ranks then finish the same sums, and each
    counts its part of the result, so that adding up gradients over ranks adds up to the term's own.
    """
    values = []
    for layer in layers:
        for term, sums in layer.aux:
            if exchange is None or term.additive:
                value = term.finish(sums)
            else:
                value = term.finish(tuple(exchange(part) for part in sums)) / ranks
            values.append(AuxValue(layer.layer, term, value))
    return values


def aux_loss(layers: list[LayerStats]) -> Tensor | float:
    """Sum over layers and terms of coefficient * loss * tokens, on one rank."""
    return weighted(aux_values(layers))


def weighted(values: list[AuxValue]) -> Tensor | float:
    """Sum of coefficient * value."""
    return sum((found.term.coef * found.value for found in values), start=0.0)
