"""Lay a model out: recomputation, compilation, then sharding. Models never import this."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from moesaic.models.attention import Attention
from moesaic.models.block import Block
from moesaic.moe.feedforward import FeedForward
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.own import own_experts, prefetch_copies
from moesaic.parallel.ranks import Ranks
from moesaic.parallel.shard import shard

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    config: ParallelConfig,
    ranks: Ranks | None = None,
    *,
    units: Sequence[nn.Module] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Recompute and compile as `config` says, and shard over `ranks` where there are several; in place.

    `units` are the parts of the model that are gathered and recomputed one at a time, `model.blocks` by default.
    `dtype` is the compute type, in which sharded matrices travel. Matrices are DTensors afterwards: make the optimizer
    then. A model on the meta device gets its memory by `to_empty` and its values by `initialize`.

    Raises ValueError for `recompute` of units that are not moesaic's own.
    """
    units = list(model.blocks) if units is None else units  # type: ignore[arg-type]
    for unit in units:
        if isinstance(unit, Block):
            unit.recompute = config.recompute == "block"
        elif config.recompute != "none":
            raise ValueError(
                f"recompute: {type(unit).__name__} does not know it; use torch.utils.checkpoint in it"
            )
    if config.compile:
        for unit in units:
            compile_regions(unit)
    if ranks is not None and ranks.mesh is not None:
        if config.owned is not None:
            own_experts(model, config, ranks)
            if config.owned.prefetch:
                prefetch_copies(units, config.owned.prefetch, dtype)
        shard(model, units, ranks, dtype)
    return model


def compile_regions(unit: nn.Module) -> None:
    """Compile attention, dense feed-forwards and shared experts; the experts' op has kernels of its own."""
    for module in unit.modules():
        if isinstance(module, (Attention, FeedForward)):
            module.compile()
