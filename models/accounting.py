"""Parameters and arithmetic of a model, counted on a copy without memory.

Dims: S sequence length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moesaic.models.transformer import Transformer
from moesaic.moe.experts import input_matrices
from moesaic.moe.layer import MoE


@dataclass(frozen=True)
class Accounting:
    """What a model holds and what one token costs. A multiply-add is two FLOPs."""

    parameters: int
    """All, shared ones once."""
    embedding_parameters: int
    """Embedding and untied output head."""
    active_parameters: int
    """Those that one token uses: its experts, router, shared experts, attention, norms, embedding and head."""
    expert_parameters: int
    """Routed experts of all banks."""
    flops_per_token: int
    """Forward pass: matrix products of the active weights, output head included, and attention over the average
    number of earlier positions."""
    train_flops_per_token: int
    """Forward and backward pass: three times the forward pass; recomputation is not counted as useful work."""

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without embedding and head."""
        return self.parameters - self.embedding_parameters

    def as_dict(self) -> dict[str, int]:
        """Everything, for JSON."""
        return {**asdict(self), "non_embedding_parameters": self.non_embedding_parameters}


def meta_model(config: Transformer.Config, vocab: int) -> Transformer:
    """The model with shapes only: nothing is allocated."""
    with torch.device("meta"), _WithoutValues():
        return Transformer(config, vocab)


class _WithoutValues(TorchFunctionMode):
    """Leaves initial values out: drawing none for a tensor without memory takes longer than all else together."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is nn.init.normal_:
            return args[0] if args else None
        return func(*args, **(kwargs or {}))


def account(config: Transformer.Config, vocab: int, *, seq_len: int) -> Accounting:
    """Count. A layer that shares its bank adds arithmetic but no parameters; an expert of the bank is idle where no
    layer can have chosen it."""
    model = meta_model(config, vocab)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.embedding.numel() + (0 if model.head is None else model.head.numel())
    users: dict[object, list[MoE]] = {}
    head = vocab * config.dim
    products = head
    for block in model.blocks:
        products += block.attention.qkv.numel() + block.attention.out.numel()
        ffn = block.ffn
        if not isinstance(ffn, MoE):
            products += ffn.w1.numel() + ffn.w2.numel()
            continue
        shape = ffn.config
        per_expert = expert_size(ffn, config.dim)
        products += shape.router.k * per_expert + ffn.router.gate.numel()
        products += 0 if ffn.shared is None else ffn.shared.w1.numel() + ffn.shared.w2.numel()
        users.setdefault(ffn.experts.source, []).append(ffn)
    idle, experts = 0, 0
    for layers in users.values():
        number, per_expert = layers[0].config.num_experts, expert_size(layers[0], config.dim)
        experts += number * per_expert
        idle += max(0, number - sum(layer.config.router.k for layer in layers)) * per_expert
    attention = config.layers * 2 * config.heads * config.channels * (seq_len + 1) // 2
    forward = 2 * (products + attention)
    return Accounting(parameters, embedding, parameters - idle, experts, forward, 3 * forward)


def expert_size(ffn: MoE, dim: int) -> int:
    """Parameters of one expert."""
    return (input_matrices(ffn.config.expert) + 1) * ffn.config.hidden * dim
