"""One layer of the transformer: attention, then a dense or sparse feed-forward, each on the residual stream.

What may be recomputed or compiled lies in two functions of tensors, `attend` and `feed`; routing lies between them and
runs exactly once per forward pass.

Dims: B sequences, S positions, T = B * S tokens, D width.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.models.attention import Attention, KeyValues
from moesaic.models.norm import RMSNorm
from moesaic.moe.balance import LayerStats
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.layer import MoE
from moesaic.moe.routing import RouterInput, Routing


class Block(nn.Module):
    """Pre-norm residual layer; with `peri_norm` each sub-layer's output is normalised too (arXiv:2502.02732)."""

    def __init__(
        self,
        dim: int,
        attention: Attention,
        ffn: FeedForward | MoE,
        *,
        index: int,
        peri_norm: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(dim, eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim, eps)
        self.ffn = ffn
        self.attention_out_norm = RMSNorm(dim, eps) if peri_norm else None
        self.ffn_out_norm = RMSNorm(dim, eps) if peri_norm else None
        self.recompute = False
        """Keep only inputs and routing for the backward pass."""

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        turns: Complex[Tensor, "S 1 P"],
        mask: Bool[Tensor, "B 1 S L"] | None,
        tokens: RouterInput,
        cache: KeyValues | None = None,
    ) -> tuple[Float[Tensor, "B S D"], LayerStats | None]:
        """The residual stream after this layer, and what its routing adds to losses and metrics."""
        h = self._run(self.attend, x, turns, mask, cache)
        if isinstance(self.ffn, FeedForward):
            return self._run(self.feed, h, None, None), None
        normed = self.ffn_norm(h).flatten(0, 1)  # (T, D)
        inputs = replace(tokens, tokens=normed, residual=x.flatten(0, 1), layer=self.index)
        routing = self.ffn.route(inputs)
        stats = self.ffn.stats(routing, inputs)
        return self._run(self.feed, h, normed, routing), stats

    def attend(self, x: Tensor, turns: Tensor, mask: Tensor | None, cache: KeyValues | None) -> Tensor:
        """The attention sub-layer with its residual."""
        y = self.attention(self.attention_norm(x), turns, mask, cache)
        return x + (y if self.attention_out_norm is None else self.attention_out_norm(y))

    def feed(self, h: Tensor, normed: Tensor | None, routing: Routing | None) -> Tensor:
        """The feed-forward sub-layer with its residual; a sparse one gets what routing already needed."""
        dense = normed is None or routing is None
        y = self.ffn(self.ffn_norm(h)) if dense else self.ffn(normed, routing).view_as(h)
        return h + (y if self.ffn_out_norm is None else self.ffn_out_norm(y))

    def _run(self, part: Any, *args: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # all randomness is counter-based: there is no generator state to restore
            return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
        return part(*args)
