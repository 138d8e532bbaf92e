"""Rules: what changes the model between optimizer steps without a gradient.

A rule is called once after every optimizer step with the step's reduced counts. Whatever it remembers lies in tensors
of the model, so that it is checkpointed with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.topk import balanced_bias


@dataclass(frozen=True)
class StepState:
    """What rules may look at after a step."""

    step: int
    counts: Mapping[int, Int[Tensor, " E"]]
    """Assignments per expert over the global batch, by layer: original forward pass of training tokens only."""


Rule = Callable[[Transformer, StepState], dict[str, float]]
"""Changes the model in place; returns metrics."""


@torch.no_grad()
def balance_bias(model: Transformer, state: StepState) -> dict[str, float]:
    """Step every router's selection bias towards equal load (arXiv:2408.15664, algorithm 1)."""
    largest = 0.0
    for layer, counts in state.counts.items():
        router = sparse_layer(model, layer).router
        router.bias.copy_(balanced_bias(router.bias, counts, router.config.bias_rate))
        largest = max(largest, router.bias.abs().max().item())
    return {"router/largest_bias": largest}


def rules_of(model: Transformer) -> list[Rule]:
    """The rules that the model's configuration asks for."""
    sparse = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    return [balance_bias] if any(ffn.router.config.bias_rate > 0 for ffn in sparse) else []


def sparse_layer(model: Transformer, layer: int) -> MoE:
    """The MoE of a layer."""
    ffn = model.blocks[layer].ffn
    assert isinstance(ffn, MoE)
    return ffn
