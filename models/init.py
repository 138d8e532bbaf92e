"""Initial weights, each a function of the seed and the tensor's logical name (and the expert's number) alone.

So a model starts from the same values on any layout, and adding a layer changes the others by a factor at most: their
outputs are scaled down with depth.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.models.names import Table, logical_tensors
from moesaic.models.norm import RMSNorm
from moesaic.moe.experts import Bank
from moesaic.moe.topk import TopKRouter

SUBLAYER_OUTPUTS = ("out", "w2")
"""Matrices that write to the residual stream."""


Window = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]
"""The part of a tensor that lies here, sharing its memory, and where it begins in every dim of the whole."""


def whole(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The window of a tensor that lies on one rank."""
    return tensor, (0,) * tensor.ndim


@torch.no_grad()
def initialize(
    model: nn.Module, *, layers: int, std: float | None, seed: int, window: Window = whole
) -> None:
    """Fill every tensor in place: norms 1, router biases 0, matrices normal (see `Transformer.Config.init_std`)."""
    names = {id(tensor): name for name, tensor in logical_tensors(model).items()}
    for module in model.modules():
        if isinstance(module, Table):
            for name, number, matrix in [] if module.master.is_meta else module.each():
                spread = scale(name.rpartition(".")[2], matrix.shape[-1], layers, std)
                fill_normal(matrix, spread, f"{seed}/{name}/{number}", matrix.shape, (0,) * matrix.ndim)
            continue
        for attribute, tensor in module.named_parameters(recurse=False):
            if tensor.is_meta:  # shapes only, however many experts
                continue
            if isinstance(module, RMSNorm):
                tensor.fill_(1)
                continue
            spread = scale(attribute, tensor.shape[-1], layers, std)
            name = names[id(tensor)]
            here, offsets = window(tensor)
            if isinstance(module, Bank):
                for number, expert in enumerate(here, offsets[0]):
                    fill_normal(expert, spread, f"{seed}/{name}/{number}", tensor.shape[1:], offsets[1:])
            else:
                fill_normal(here, spread, f"{seed}/{name}", tensor.shape, offsets)
        if isinstance(module, TopKRouter):
            module.bias.zero_()


def scale(attribute: str, inputs: int, layers: int, std: float | None) -> float:
    """Standard deviation of a matrix."""
    spread = inputs**-0.5 if std is None else std
    return spread / (2 * layers) ** 0.5 if attribute in SUBLAYER_OUTPUTS else spread


def fill_normal(tensor: Tensor, std: float, label: str, shape: torch.Size, offsets: tuple[int, ...]) -> None:
    """The part at `offsets` of normal values of `shape` that depend on the label only.

    Drawn on the CPU, so that every device starts alike.
    """
    if not tensor.numel():
        return
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    box = tuple(slice(start, start + size) for start, size in zip(offsets, tensor.shape, strict=True))
    tensor.copy_(values[box].mul_(std))
