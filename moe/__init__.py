"""Mixtures of experts on one rank."""

from moesaic.moe.balance import BalanceLoss, LayerStats, ZLoss, aux_loss, aux_values, weighted
from moesaic.moe.layer import MoE, use_kernels
from moesaic.moe.routing import Plan, RouterInput, Routing, make_plan
from moesaic.moe.topk import TopKRouter, balanced_bias

__all__ = [
    "BalanceLoss",
    "LayerStats",
    "MoE",
    "Plan",
    "RouterInput",
    "Routing",
    "TopKRouter",
    "ZLoss",
    "aux_loss",
    "aux_values",
    "balanced_bias",
    "make_plan",
    "use_kernels",
    "weighted",
]
