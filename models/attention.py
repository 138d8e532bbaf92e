"""Causal self-attention with grouped queries, rotary positions, and a cache for generation.

Dims: B sequences, S positions, D width, H query heads, J key-value heads, C channels of a head.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from moesaic.kernels.rotary import normed_rotary
from moesaic.models.norm import RMSNorm


def fused_with_groups(x: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer key heads than query heads. On GPUs the only one that many of them have for
    masks, and the only one for fp32, does not; without a fused kernel all (B, H, S, L) scores would be stored."""
    return not x.is_cuda or (mask is None and x.dtype != torch.float32)


ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels for keys whose number grows with every token: cuDNN would make a plan for each length."""


class KeyValues:
    """Keys and values of the positions seen so far, of one layer."""

    def __init__(
        self, batch: int, length: int, heads: int, channels: int, *, dtype: torch.dtype, device: torch.device
    ):
        self.keys = torch.empty(batch, length, heads, channels, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.used = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return everything so far."""
        end = self.used + keys.shape[1]
        self.keys[:, self.used : end] = keys
        self.values[:, self.used : end] = values
        self.used = end
        return self.keys[:, :end], self.values[:, :end]


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) by PyTorch's fused kernels."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, channels: int, *, qk_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.splits = (heads, kv_heads, kv_heads)
        self.channels = channels
        self.eps = eps
        self.qkv = nn.Parameter(torch.empty(sum(self.splits) * channels, dim))
        self.out = nn.Parameter(torch.empty(dim, heads * channels))
        nn.init.normal_(self.qkv, std=dim**-0.5)
        nn.init.normal_(self.out, std=(heads * channels) ** -0.5)
        self.q_norm = RMSNorm(channels, eps) if qk_norm else None
        self.k_norm = RMSNorm(channels, eps) if qk_norm else None

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        turns: Complex[Tensor, "S 1 P"],
        mask: Bool[Tensor, "B 1 S L"] | None,
        cache: KeyValues | None = None,
    ) -> Float[Tensor, "B S D"]:
        """Attend to earlier positions; `mask` (True: may look) replaces the plain causal rule where it is given."""
        heads = F.linear(x, self.qkv.to(x.dtype)).unflatten(-1, (-1, self.channels))  # (B, S, H + 2 J, C)
        norms = (self.q_norm, self.k_norm)
        query_weight, key_weight = (None if norm is None else norm.weight for norm in norms)
        q, k, v = normed_rotary(
            heads, turns, self.splits[1], query_weight=query_weight, key_weight=key_weight, eps=self.eps
        )
        if cache is not None:
            k, v = cache.extend(k, v)
        groups = self.splits[0] // self.splits[1]
        if groups > 1 and not fused_with_groups(x, mask):
            k, v, groups = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2), 1
        with sdpa_kernel(ANY_LENGTH) if x.is_cuda and cache is not None else nullcontext():
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=mask,
                is_causal=mask is None and x.shape[1] > 1,
                enable_gqa=groups > 1,
            )
        return F.linear(attended.transpose(1, 2).flatten(-2), self.out.to(x.dtype))
