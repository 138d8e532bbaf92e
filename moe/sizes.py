"""The sizes a layer may have: far beyond what a machine holds, and small enough that bytes fit in 64 bits.

The largest tensors are a bank of experts, `2 * MOST_EXPERTS * LARGEST_WIDTH ** 2` numbers, and the rows of a sequence.
"""

LARGEST_WIDTH = 1 << 18
MOST_EXPERTS = 1 << 20
MOST_CHOSEN = 1 << 12
"""Experts per token."""
MOST_LAYERS = 1000


def check_size(name: str, value: int | None, largest: int) -> None:
    """Raise ValueError where a size is set and is not in 1 to `largest`."""
    if value is None:
        return
    if value < 1:
        raise ValueError(f"{name}: {value} is not positive")
    if value > largest:
        raise ValueError(f"{name}: {value} is above {largest}, the largest that is supported")
