"""Bring rows to their experts and back. On one rank that is a copy in expert order."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from moesaic.kernels.combine import combine_rows, gather_rows
from moesaic.moe.routing import Plan

RunExperts = Callable[[Tensor, Tensor], Tensor]
"""(rows (N, D), counts (M,)) -> rows (N, D)."""


@runtime_checkable
class Dispatcher(Protocol):
    """Runs tokens through experts wherever those are; returns the rows in the plan's order."""

    def run(self, x: Float[Tensor, "T D"], plan: Plan, experts: RunExperts) -> Float[Tensor, "R D"]: ...


class Local:
    """All experts are here."""

    def run(self, x: Float[Tensor, "T D"], plan: Plan, experts: RunExperts) -> Float[Tensor, "R D"]:
        rows = gather_rows(x, plan.tokens, plan.where, plan.offsets, per_token=plan.per_token)
        return experts(rows, plan.counts)


def combine(rows: Float[Tensor, "R D"], weights: Float[Tensor, " R"], plan: Plan) -> Float[Tensor, "T D"]:
    """`y[t] = sum over the assignments of t of weight * row`, in a fixed order and fp32 or better."""
    return combine_rows(rows, weights, plan.tokens, plan.where, plan.offsets, per_token=plan.per_token)
