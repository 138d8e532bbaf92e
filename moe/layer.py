"""The mixture-of-experts layer: route, plan, dispatch, combine.

Dims: T tokens, D width, E experts.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from moesaic.kernels.backend import Backend
from moesaic.moe.balance import AuxTerm, LayerStats, layer_stats
from moesaic.moe.dispatch import Dispatcher, Local
from moesaic.moe.experts import Bank, ExpertKind, Experts
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.replay import ReplayRouter
from moesaic.moe.routing import RouterInput, Routing, make_plan
from moesaic.moe.sizes import LARGEST_WIDTH, MOST_EXPERTS, check_size
from moesaic.moe.topk import TopKRouter


class MoE(nn.Module):
    """A dropless mixture of experts.

    Routing is an entry point of its own, so that it can run early and is never recomputed::

        routing = moe.route(RouterInput(tokens=x, mode="train"))
        y = moe(x, routing)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A mixture of equal experts, of which each token uses a few."""

        kind: Literal["moe"] = "moe"
        num_experts: int
        """Experts of the layer."""
        hidden: int
        """Hidden width of one expert."""
        router: TopKRouter.Config | ReplayRouter.Config
        """How tokens choose experts."""
        expert: ExpertKind = "swiglu"
        """Non-linearity of the experts."""
        shared_experts: int = 0
        """Experts that every token uses, beside the routed ones; not counted in balance."""
        aux: tuple[AuxTerm, ...] = ()
        """Auxiliary losses."""
        bank: str | None = None
        """Name of the bank that holds the experts; layers that name the same one share its weights. None: one's own."""

        def __post_init__(self) -> None:
            check_size("num_experts", self.num_experts, MOST_EXPERTS)
            check_size("hidden", self.hidden, LARGEST_WIDTH)
            if self.shared_experts < 0:
                raise ValueError(f"shared_experts: {self.shared_experts} is negative")
            if self.shared_experts:
                check_size("shared_experts", self.shared_experts, LARGEST_WIDTH // self.hidden)
            if self.bank is not None and (not self.bank or "." in self.bank):
                raise ValueError(f"bank: {self.bank!r} must be a name without dots")
            self.router.check(self.num_experts)

    def __init__(self, config: Config, dim: int, *, bank: Bank | None = None, name: str = "experts") -> None:
        """`bank`: experts that another layer owns. Without it the layer makes its own, called `name`."""
        super().__init__()
        self.config = config
        self.router = build_router(config.router, dim, config.num_experts)
        self.bank = None if bank else Bank(name, config.num_experts, config.expert, dim, config.hidden)
        source = bank or self.bank
        assert source is not None
        self.experts = Experts(config.expert, source)
        shared = config.shared_experts * config.hidden
        self.shared = (
            FeedForward(FeedForward.Config(hidden=shared, expert=config.expert), dim) if shared else None
        )
        self.dispatcher: Dispatcher = Local()

    def route(self, inputs: RouterInput) -> Routing:
        """Choose experts for T tokens; nothing is computed with them yet."""
        return self.router.route(inputs)

    def stats(self, routing: Routing, inputs: RouterInput) -> LayerStats:
        """Sums of the auxiliary losses, and load, of this routing."""
        return layer_stats(routing, inputs, self.config.aux, self.config.num_experts)

    def forward(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Each token's experts, weighted, plus the shared ones."""
        plan = make_plan(routing, self.config.num_experts, backend=self.experts.backend)
        return self.dispatcher.run(x, routing.weights, plan, self.experts, self.shared)


def build_router(
    config: TopKRouter.Config | ReplayRouter.Config, dim: int, num_experts: int
) -> TopKRouter | ReplayRouter:
    """The router of the kind that the config is of."""
    if isinstance(config, ReplayRouter.Config):
        return ReplayRouter(config, dim, num_experts)
    return TopKRouter(config, dim, num_experts)


def use_kernels(model: nn.Module, backend: Backend) -> None:
    """Have every mixture of experts within `model` run on `backend`; see `moesaic.kernels.backend`."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.backend = module.router.backend = backend
