"""Lay a model out: recomputation, then compilation. Models never import this."""

from torch import nn

from moesaic.models.block import Block
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.parallel.config import ParallelConfig


def parallelize(model: Transformer, config: ParallelConfig) -> Transformer:
    """Apply the options of `config` per block, in place, and return the model."""
    for block in model.blocks:
        block.recompute = config.recompute == "block"
        if config.compile:
            compile_regions(block)
    return model


def compile_regions(block: Block) -> None:
    """Compile attention and the feed-forward's matrix work; routing and dispatch stay outside."""
    block.attention.compile()
    regions: list[nn.Module] = []
    if isinstance(block.ffn, MoE):
        regions = [block.ffn.experts, *([block.ffn.shared] if block.ffn.shared else [])]
    else:
        regions = [block.ffn]
    for region in regions:
        region.compile()
