"""The angles of rotary position embedding (arXiv:2104.09864).

Dims: S positions, P pairs of channels of a head.
"""

import torch
from jaxtyping import Complex
from torch import Tensor


def rotations(
    start: int, length: int, channels: int, theta: float, *, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "S 1 P"]:
    """Unit complex numbers for positions `start` to `start + length - 1`, computed in float64."""
    frequencies = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return turns.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
