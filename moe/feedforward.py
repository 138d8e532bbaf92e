"""The dense feed-forward: every token through the same matrices. Also the shared experts of an MoE layer.

Dims: D width, F hidden width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.kernels.activation import ExpertKind, activate, input_matrices
from moesaic.moe.sizes import LARGEST_WIDTH, check_size


class FeedForward(nn.Module):
    """Two linear maps with a non-linearity between them, no biases."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """A dense feed-forward."""

        kind: Literal["dense"] = "dense"
        hidden: int
        """Hidden width."""
        expert: ExpertKind = "swiglu"
        """Non-linearity."""

        def __post_init__(self) -> None:
            check_size("hidden", self.hidden, LARGEST_WIDTH)

    def __init__(self, config: Config, dim: int) -> None:
        super().__init__()
        self.config = config
        self.w1 = nn.Parameter(torch.empty(input_matrices(config.expert), config.hidden, dim))
        self.w2 = nn.Parameter(torch.empty(dim, config.hidden))
        nn.init.normal_(self.w1, std=dim**-0.5)
        nn.init.normal_(self.w2, std=config.hidden**-0.5)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        hidden = F.linear(x, self.w1.flatten(0, 1).to(x.dtype))
        return F.linear(activate(self.config.expert, hidden), self.w2.to(x.dtype))
