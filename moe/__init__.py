"""Mixtures of experts on one rank."""

from moesaic.moe.balance import BalanceLoss, LayerStats, ZLoss, aux_loss, aux_values, weighted
from moesaic.moe.layer import MoE, use_kernels
from moesaic.moe.replay import ReplayRouter
from moesaic.moe.routing import Plan, RouterInput, Routing, make_plan
from moesaic.moe.topk import TopKRouter, balanced_bias
from moesaic.moe.trace import RoutingTrace, load_trace

__all__ = [
    "BalanceLoss",
    "LayerStats",
    "MoE",
    "Plan",
    "ReplayRouter",
    "RouterInput",
    "Routing",
    "RoutingTrace",
    "TopKRouter",
    "ZLoss",
    "aux_loss",
    "aux_values",
    "balanced_bias",
    "load_trace",
    "make_plan",
    "use_kernels",
    "weighted",
]
