"""From a routing to the order in which experts run: a stable counting sort of the assignments, and the way back.

Integers only: no gradients, no communication, no host synchronisation.

Dims: T tokens, E experts, K experts per token, R assignments.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moesaic.kernels.backend import Backend


@dataclass(frozen=True)
class Plan:
    """Assignments sorted by expert, and the way back."""

    counts: Int[Tensor, " E"]
    """Rows of each expert."""
    tokens: Int[Tensor, " R"]
    """Token of each row; rows are sorted by expert, then by token."""
    order: Int[Tensor, " R"]
    """Assignment of each row; assignments are sorted by token."""
    where: Int[Tensor, " R"]
    """Row of each assignment."""
    offsets: Int[Tensor, " T1"]
    """Assignments of token t are `offsets[t]:offsets[t + 1]`."""
    per_token: int | None
    """K where every token has K assignments."""


def plan_choice(experts: Int[Tensor, "T K"], num_experts: int, *, backend: Backend = "auto") -> Plan:
    """The plan of a token-choice routing."""
    tokens, k = experts.shape
    order, where, counts = sort_by_expert(experts.flatten(), num_experts)
    offsets = torch.arange(0, tokens * k + 1, max(k, 1), device=experts.device)
    return Plan(counts, order // max(k, 1), order, where, offsets, k)


def plan_ragged(
    tokens: Int[Tensor, " R"],
    experts: Int[Tensor, " R"],
    num_tokens: int,
    num_experts: int,
    *,
    backend: Backend = "auto",
) -> Plan:
    """The plan of assignments sorted by token, of which a token has none or many."""
    order, where, counts = sort_by_expert(experts, num_experts)
    offsets = torch.nn.functional.pad(tally(tokens, num_tokens).cumsum(0), (1, 0))
    return Plan(counts, tokens[order], order, where, offsets, None)


def sort_by_expert(experts: Int[Tensor, " R"], num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of a stable sort, its inverse, and how often each expert occurs."""
    order = experts.argsort(stable=True)
    where = torch.empty_like(order)
    where[order] = torch.arange(order.shape[0], device=order.device)
    return order, where, tally(experts, num_experts)


def tally(
    values: Int[Tensor, " R"], size: int, counted: Bool[Tensor, " R"] | None = None
) -> Int[Tensor, " size"]:
    """How often each of 0 to size - 1 occurs, among the counted ones. Exact integers, no host synchronisation."""
    ones = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    return values.new_zeros(size).scatter_add_(0, values, ones)
