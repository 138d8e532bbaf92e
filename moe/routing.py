"""The values between a router and the experts: what a router sees, what it decides, and the order that follows.

No parameters, no process groups, no losses.

Dims: T tokens, D width, E experts, K experts per token, R assignments.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.kernels.backend import Backend
from moesaic.kernels.plan import Plan, plan_choice, plan_ragged

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
    """Sequence within the micro-batch. None: `num_sequences` of equal length, one after the other."""
    num_sequences: int = 1
    indices: Int[Tensor, " T"] | None = None
    """Index of each token in the step's global batch: the counter of all noise. None: 0 to T - 1."""
    step_tokens: int | None = None
    """Tokens of the step's global batch, over all ranks and micro-batches. None: T."""
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


def make_plan(routing: Routing, num_experts: int, *, backend: Backend = "auto") -> Plan:
    """Sort the assignments by expert; see `moesaic.kernels.plan`."""
    experts, per_token = routing.experts, routing.per_token
    if per_token is not None:
        return plan_choice(experts.unflatten(0, (-1, per_token)), num_experts, backend=backend)
    return plan_ragged(routing.tokens, experts, routing.num_tokens, num_experts, backend=backend)
