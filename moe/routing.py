"""The values between a router and the experts: what a router sees, what it decides, and the order that follows.

No parameters, no process groups, no losses.

Dims: T tokens, D width, E experts, K experts per token, R assignments.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Mode = Literal["train", "eval", "recompute"]
"""`train`: the original forward pass of training tokens; only then is there noise to draw first and load to count.
`recompute`: the same pass again, which must decide the same. `eval`: no noise, nothing counted."""


@dataclass(frozen=True, kw_only=True)
class RouterInput:
    """Tokens, and what routers may need to know of them. Only `tokens` and `mode` are required."""

    tokens: Float[Tensor, "T D"]
    mode: Mode
    residual: Float[Tensor, "T D"] | None = None
    """The residual stream before attention."""
    ids: Int[Tensor, " T"] | None = None
    """Vocabulary ids."""
    positions: Int[Tensor, " T"] | None = None
    """Position within the sequence."""
    documents: Int[Tensor, " T"] | None = None
    """Document within the sequence."""
    sequences: Int[Tensor, " T"] | None = None
    """Sequence within the micro-batch. None: all tokens are one sequence."""
    num_sequences: int = 1
    indices: Int[Tensor, " T"] | None = None
    """Index of each token in the step's global batch: the counter of all noise. None: 0 to T - 1."""
    valid: Bool[Tensor, " T"] | None = None
    """False for padding, which is routed but never counted. None: no padding."""
    seed: int = 0
    step: int = 0
    layer: int = 0


@dataclass(frozen=True)
class Routing:
    """Assignments of tokens to experts, sorted by token; a token may have none or many."""

    tokens: Int[Tensor, " R"]
    experts: Int[Tensor, " R"]
    weights: Float[Tensor, " R"]
    num_tokens: int
    probabilities: Float[Tensor, "T E"]
    """Over all experts, each row summing to 1: what balance losses and entropy are taken of."""
    logits: Float[Tensor, "T E"]
    per_token: int | None = None
    """K where every token has K assignments."""

    @staticmethod
    def token_choice(
        experts: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        *,
        probabilities: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
    ) -> "Routing":
        """Every token goes to the K experts of its row."""
        num_tokens, k = experts.shape
        tokens = torch.arange(num_tokens, device=experts.device).repeat_interleave(
            k, output_size=num_tokens * k
        )
        flat = (tokens, experts.flatten(), weights.flatten())
        return Routing(*flat, num_tokens, probabilities, logits, per_token=k)

    @staticmethod
    def ragged(
        tokens: Int[Tensor, " R"],
        experts: Int[Tensor, " R"],
        weights: Float[Tensor, " R"],
        *,
        probabilities: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
    ) -> "Routing":
        """Any assignments in any order; those of one token keep their order."""
        order = tokens.argsort(stable=True)
        flat = (tokens[order], experts[order], weights[order])
        return Routing(*flat, probabilities.shape[0], probabilities, logits)


@dataclass(frozen=True)
class Plan:
    """Assignments sorted by expert, and the way back. Integers only: no gradients, no communication."""

    counts: Int[Tensor, " E"]
    """Rows of each expert."""
    tokens: Int[Tensor, " R"]
    """Token of each row; rows are sorted by expert, then by token."""
    where: Int[Tensor, " R"]
    """Row of each assignment."""
    offsets: Int[Tensor, " T1"]
    """Assignments of token t are `offsets[t]:offsets[t + 1]`."""
    per_token: int | None


def make_plan(routing: Routing, num_experts: int) -> Plan:
    """Sort by expert, stable, so that equal routings give equal plans. No host synchronisation."""
    order = routing.experts.argsort(stable=True)
    where = torch.empty_like(order)
    where[order] = torch.arange(order.shape[0], device=order.device)
    sizes = tally(routing.tokens, routing.num_tokens)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    counts = tally(routing.experts, num_experts)
    return Plan(counts, routing.tokens[order], where, offsets, routing.per_token)


def tally(
    values: Int[Tensor, " R"], size: int, counted: Bool[Tensor, " R"] | None = None
) -> Int[Tensor, " size"]:
    """How often each of 0 to size - 1 occurs, among the counted ones. Exact integers, no host synchronisation."""
    ones = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    return values.new_zeros(size).scatter_add_(0, values, ones)
