"""Rotary position embedding (arXiv:2104.09864): neighbouring channels form the pairs that turn.

Complex multiplication is one pass over memory and has an exact transpose as its gradient.

Dims: B sequences, S positions, H heads, C channels of a head.
"""

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from moesaic.kernels.combine import accumulation_dtype


def rotations(
    start: int, length: int, channels: int, theta: float, *, dtype: torch.dtype, device: torch.device
) -> Complex[Tensor, "S 1 C2"]:
    """Unit complex numbers for positions `start` to `start + length - 1`, computed in float64."""
    frequencies = theta ** (-torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    return turns.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def rotate(x: Float[Tensor, "B S H C"], turns: Complex[Tensor, "S 1 C2"]) -> Float[Tensor, "B S H C"]:
    """Turn each channel pair by its position's angle, in fp32 or better."""
    pairs = torch.view_as_complex(x.to(accumulation_dtype(x.dtype)).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
