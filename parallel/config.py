"""How a run is laid out over ranks, and which parts of the model are recomputed or compiled."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes, outermost first, and per-block options."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the model."""
    dp_shard: int = 1
    """Shards of one copy."""
    cp: int = 1
    """Parts of one sequence."""
    tp: int = 1
    """Parts of one matrix."""
    recompute: Literal["none", "block"] = "none"
    """`block`: keep only each sub-layer's input and its routing, and compute the rest again in the backward pass."""
    compile: bool = False
    """Compile attention and the expert function with torch.compile."""

    def check(self, world_size: int) -> None:
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
            size = getattr(self, axis)
            if size != 1:
                raise ValueError(f"parallel.{axis}: {size} is not supported yet; use 1")
        if world_size != 1:
            raise ValueError(
                f"{world_size} processes were started, but this run uses one; start it without torchrun"
            )
