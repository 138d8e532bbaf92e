"""Counter-based random numbers: a value depends on (seed, step, layer, token, column) and on nothing else.

So noise is the same for any number of ranks, any micro-batch size and under recomputation. The mixing function is
SplitMix64's (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix(value: int) -> int:
    value &= _MASK
    for shift, multiplier in _MULTIPLIERS:
        value = ((value ^ (value >> shift)) * multiplier) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_tensor(values: Tensor) -> Tensor:
    for shift, multiplier in _MULTIPLIERS:
        # int64 shifts are arithmetic: the mask makes them logical
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * _signed(multiplier)
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def key(*parts: int) -> int:
    """One 64-bit key from several integers, order mattering."""
    state = 0
    for part in parts:
        state = _mix(state + _GOLDEN + _mix(part))
    return state


def uniform(key: int, indices: Int[Tensor, " T"], width: int) -> Float[Tensor, "T width"]:
    """Numbers in [0, 1), one per index and column, as fp32 multiples of 2^-24."""
    columns = torch.arange(width, device=indices.device)
    counters = indices.to(torch.int64)[:, None] * width + columns
    bits = _mix_tensor(counters * _signed(_GOLDEN) + _signed(key))
    return ((bits >> 40) & ((1 << 24) - 1)).to(torch.float32) * 2.0**-24
