"""Initial weights, each a function of the seed and the tensor's logical name (and the expert's number) alone.

So a model starts from the same values on any layout, and adding a layer changes the others by a factor at most: their
outputs are scaled down with depth.
"""

import hashlib

import torch
from torch import Tensor, nn

from moesaic.models.names import logical_tensors
from moesaic.models.norm import RMSNorm
from moesaic.moe.experts import Bank
from moesaic.moe.topk import TopKRouter

SUBLAYER_OUTPUTS = ("out", "w2")
"""Matrices that write to the residual stream."""


@torch.no_grad()
def initialize(model: nn.Module, *, layers: int, std: float | None, seed: int) -> None:
    """Fill every tensor in place: norms 1, router biases 0, matrices normal (see `Transformer.Config.init_std`)."""
    names = {id(tensor): name for name, tensor in logical_tensors(model).items()}
    for module in model.modules():
        for attribute, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta:  # shapes only, however many experts
                continue
            if isinstance(module, RMSNorm):
                tensor.fill_(1)
                continue
            spread = tensor.shape[-1] ** -0.5 if std is None else std
            if attribute in SUBLAYER_OUTPUTS:
                spread /= (2 * layers) ** 0.5
            name = names[id(tensor)]
            if isinstance(module, Bank):
                for number, expert in enumerate(tensor):
                    fill_normal(expert, spread, f"{seed}/{name}/{number}")
            else:
                fill_normal(tensor, spread, f"{seed}/{name}")
        if isinstance(module, TopKRouter):
            module.bias.zero_()


def fill_normal(tensor: Tensor, std: float, label: str) -> None:
    """Normal values that depend on the label only. Drawn on the CPU, so that every device starts alike."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    values = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    tensor.copy_(values.mul_(std))
