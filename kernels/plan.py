"""From a routing to the order in which experts run: a stable counting sort of the assignments, and the way back.

Integers only: no gradients, no communication, no host synchronisation. Assignments of one expert keep their order, so
every engine gives the same plan.

Dims: T tokens, E experts, K experts per token, R assignments.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.backend import Backend, engine


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


@dataclass(frozen=True)
class Routes:
    """How tokens become rows and rows tokens: the tensors of a plan, and the weight of each assignment."""

    gates: Float[Tensor, " R"]
    tokens: Int[Tensor, " R"]
    order: Int[Tensor, " R"]
    where: Int[Tensor, " R"]
    offsets: Int[Tensor, " T1"]
    per_token: int | None


def plan_choice(experts: Int[Tensor, "T K"], num_experts: int, *, backend: Backend = "auto") -> Plan:
    """The plan of a token-choice routing. Experts are 0 to num_experts - 1; on CPUs others raise IndexError or
    RuntimeError."""
    tokens, k = experts.shape
    counts, by_row, order, where, offsets = _plan(experts.flatten(), None, k, tokens, num_experts, backend)
    return Plan(counts, by_row, order, where, offsets, k)


def plan_ragged(
    tokens: Int[Tensor, " R"],
    experts: Int[Tensor, " R"],
    num_tokens: int,
    num_experts: int,
    *,
    backend: Backend = "auto",
) -> Plan:
    """The plan of assignments sorted by token, of which a token has none or many. Experts as in `plan_choice`."""
    counts, by_row, order, where, offsets = _plan(experts, tokens, 1, num_tokens, num_experts, backend)
    return Plan(counts, by_row, order, where, offsets, None)


def tally(
    values: Int[Tensor, " R"], size: int, counted: Bool[Tensor, " R"] | None = None
) -> Int[Tensor, " size"]:
    """How often each of 0 to size - 1 occurs, among the counted ones. Exact integers, no host synchronisation."""
    ones = torch.ones_like(values) if counted is None else counted.to(values.dtype)
    return values.new_zeros(size).scatter_add_(0, values, ones)


def _plan(
    experts: Tensor, tokens: Tensor | None, width: int, num_tokens: int, num_experts: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tokens`: of each assignment. Without them each token has `width` assignments."""
    if (
        torch.compiler.is_compiling()
    ):  # only then: of few tokens, an op's way through the dispatcher takes longest
        return _plan_op(experts, tokens, width, num_tokens, num_experts, backend)
    return _plan_now(experts, tokens, width, num_tokens, num_experts, backend)


def _plan_now(
    experts: Tensor, tokens: Tensor | None, width: int, num_tokens: int, num_experts: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    runs = engine(backend, experts, tokens)
    if runs == "cpp":
        return _compiled(experts.contiguous(), tokens, width, num_tokens, num_experts)
    if runs == "triton":
        from moesaic.kernels.triton import plan as kernels

        if kernels.serves(experts, num_experts):
            counts, by_row, order, where = kernels.sort(experts, tokens, width, num_experts)
            return counts, by_row, order, where, _offsets(experts, tokens, width, num_tokens)
    order, where, counts = sort_by_expert(experts, num_experts)
    by_row = order // max(width, 1) if tokens is None else tokens[order]
    return counts, by_row, order, where, _offsets(experts, tokens, width, num_tokens)


_plan_op = torch.library.custom_op("moesaic::plan", _plan_now, mutates_args=())


@_plan_op.register_fake
def _(
    experts: Tensor, tokens: Tensor | None, width: int, num_tokens: int, num_experts: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    order, where = (experts.new_empty(experts.shape, dtype=torch.int64) for _ in range(2))
    by_row = torch.empty_like(order if tokens is None else tokens)
    offsets = experts.new_empty(num_tokens + 1, dtype=torch.int64)
    return experts.new_empty(num_experts), by_row, order, where, offsets


def _compiled(
    experts: Tensor, tokens: Tensor | None, width: int, num_tokens: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = experts.shape[0]
    # side by side where counting is more work than adding up the counts
    chunks = max(1, min(torch.get_num_threads(), rows // max(num_experts, 4096)))
    counts, offsets = experts.new_empty(num_experts), experts.new_empty(num_tokens + 1)
    by_row, order, where = (torch.empty_like(experts) for _ in range(3))
    starts = experts.new_empty(chunks, num_experts + 1)
    given = None if tokens is None else tokens.contiguous()
    ragged = int(tokens is not None)
    items = rows if ragged else num_tokens
    tensors = (experts, given, counts, by_row, order, where, offsets, starts)
    wrong = native.run("plan", experts.dtype, *tensors, items, width, num_tokens, num_experts, ragged, chunks)
    if wrong:
        raise IndexError(f"experts: {wrong} ids are not in 0 to {num_experts - 1}")
    return counts, by_row, order, where, offsets


def sort_by_expert(experts: Int[Tensor, " R"], num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of a stable sort, its inverse, and how often each expert occurs: the reference."""
    order = experts.argsort(stable=True)
    where = torch.empty_like(order)
    where[order] = torch.arange(order.shape[0], device=order.device)
    return order, where, tally(experts, num_experts)


def _offsets(experts: Tensor, tokens: Tensor | None, width: int, num_tokens: int) -> Tensor:
    edges = torch.arange(num_tokens + 1, device=experts.device)
    return edges * width if tokens is None else torch.searchsorted(tokens, edges)
