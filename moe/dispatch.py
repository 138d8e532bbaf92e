"""Bring tokens to their experts and back. On one rank that is a copy in expert order, within the experts' kernel."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from moesaic.moe.experts import Experts
from moesaic.moe.routing import Plan


@runtime_checkable
class Dispatcher(Protocol):
    """Runs tokens through experts wherever those are, and adds up what comes back.

    `y[t] = sum over the assignments of t of gate * row`, in a fixed order and fp32 or better, plus `shared(x)` where
    there are shared experts, which may be computed while rows travel. Sending, receiving and the sum are one call, so
    that a dispatcher may leave out rows that nobody needs to see.
    """

    def run(
        self,
        x: Float[Tensor, "T D"],
        gates: Float[Tensor, " R"],
        plan: Plan,
        experts: Experts,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "T D"]: ...


class Local:
    """All experts are here."""

    def run(
        self,
        x: Float[Tensor, "T D"],
        gates: Float[Tensor, " R"],
        plan: Plan,
        experts: Experts,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "T D"]:
        y = experts.mix(x, gates, plan)
        return y if shared is None else y + shared(x)
