"""RMSNorm as a module: one fp32 weight per channel."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moesaic.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dim (arXiv:1910.07467); statistics in fp32 or better."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps)
