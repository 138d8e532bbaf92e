"""How a run is laid out over ranks, and which parts of the model are recomputed or compiled."""

from dataclasses import dataclass, field
from typing import Literal

from moesaic.parallel.costs import Costs
from moesaic.parallel.plans import ExpertParallelConfig, PlanConfig

LONGEST = 1e8
"""Seconds, three years: more than any run, and what clocks can add."""


@dataclass(frozen=True, kw_only=True)
class ShardedExperts:
    """Experts are matrices like others: every rank holds a part of each, and gathers them for every layer."""

    kind: Literal["sharded"] = "sharded"


@dataclass(frozen=True, kw_only=True)
class OwnedExperts:
    """Each expert stays on one of the `dp_shard` ranks, and tokens travel (expert parallelism)."""

    kind: Literal["owned"] = "owned"
    max_rows: int | None = None
    """Most rows that a rank takes in at once for its own experts; more come in several rounds, which cost a second
    forward pass and bound the memory of a rank whose experts are popular. None: all at once."""
    compare_plans: bool = False
    """Have ranks compare where they would send tokens, at every layer; to find bugs."""
    rebalance: int = 0
    """Steps between moves of experts to other ranks, so that ranks have equally many rows; 0: experts stay."""
    owners: Literal["balanced", "heterogeneous"] = "balanced"
    """What `rebalance` looks for. `balanced`: each bank's rows shared evenly, with equally many of its experts on each
    rank. `heterogeneous`: only rows of experts that are not copied anyway, over nodes first; a rank has equally many
    experts of all banks together (FSSDP, algorithm 2)."""
    plan: PlanConfig = field(default_factory=ExpertParallelConfig)
    """Which ranks get copies of which experts, for a step (FSSDP, arXiv:2502.02581)."""
    costs: Costs | None = None
    """What the planner reckons with, in picoseconds. None: measured when the run starts, and kept in its checkpoints.
    Given, two runs make the same plans, and on CPUs the same bits; attention on GPUs may add in another order."""
    rematerialize: bool = False
    """Free copies between a layer's forward and backward pass, and bring them once more: least memory."""
    prefetch: int = 1
    """When copies leave. 0: when a layer needs them; 1: when its block begins; 2: when the block before it begins, and
    so on. In a backward pass: as many layers ahead."""
    accumulate: Literal["each", "last"] = "each"
    """When gradients of copies travel: with `each` micro-batch, or with the `last` of a step, which keeps them, and
    without `rematerialize` the copies too, until then."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What gradients of copies are rounded to on their way; fp32: not at all."""
    levels: Literal["one", "two"] = "one"
    """How copies and their gradients travel between nodes: from rank to rank, or once per node, in slices over its
    ranks."""

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows: {self.max_rows} is not positive")
        if self.rebalance < 0:
            raise ValueError(f"rebalance: {self.rebalance} is negative; give a number of steps, or 0")
        if self.gradients == "bf16" and not self.copies:
            raise ValueError(
                "gradients: bf16 is for those of copies, and plan.kind: expert_parallel has none"
            )
        if self.prefetch < 0:
            raise ValueError(f"prefetch: {self.prefetch} is negative; give a number of blocks, or 0")

    @property
    def copies(self) -> bool:
        """Whether there ever are copies."""
        return not isinstance(self.plan, ExpertParallelConfig)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the mesh axes, outermost first, and per-block options."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the model, each over `dp_shard` ranks. They see different tokens."""
    dp_shard: int | None = None
    """Ranks that share one replica's weights, gradients and optimizer state (FSDP). None: all that there are, divided
    by `dp_replicate`."""
    experts: ShardedExperts | OwnedExperts = ShardedExperts()
    """Where experts live."""
    cp: int = 1
    """Parts of one sequence."""
    tp: int = 1
    """Parts of one matrix."""
    recompute: Literal["none", "block"] = "none"
    """`block`: keep only each sub-layer's input and its routing, and compute the rest again in the backward pass."""
    timeout: float = 600.0
    """Seconds without progress after which a rank gives up on the others: with an error that says for what it waited,
    or amid NCCL's collectives by NCCL's own abort."""
    compile: bool = False
    """Compile attention, dense feed-forwards and shared experts with torch.compile."""

    def __post_init__(self) -> None:
        for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"):
            size = getattr(self, axis)
            if size is not None and size < 1:
                raise ValueError(f"{axis}: {size} is not positive")
        if not 0 < self.timeout < LONGEST:
            raise ValueError(f"timeout: {self.timeout} is not between 0 and {LONGEST:.0e} seconds")

    @property
    def owned(self) -> OwnedExperts | None:
        """How experts are owned; None where they are sharded."""
        return self.experts if isinstance(self.experts, OwnedExperts) else None

    def shards(self, world_size: int) -> int:
        """Ranks that share one replica."""
        return self.dp_shard or world_size // self.dp_replicate

    @property
    def ranks(self) -> int:
        """Processes that the layout asks for, or the fewest."""
        return self.dp_replicate * (self.dp_shard or 1)

    def check(self, world_size: int) -> None:
        """Raise ValueError where the layout is not supported, or does not fit the number of processes."""
        for axis in ("pp", "cp", "tp"):
            size = getattr(self, axis)
            if size != 1:
                raise ValueError(f"parallel.{axis}: {size} is not supported yet; use 1")
        if self.dp_replicate * self.shards(world_size) != world_size:
            wanted = self.ranks
            multiple = "" if self.dp_shard else " or a multiple of it"
            raise ValueError(
                f"parallel.dp_replicate: {self.dp_replicate} x dp_shard {self.dp_shard or '(all)'} asks for {wanted} "
                f"processes{multiple}, but {world_size} run; start them with `torchrun --nproc-per-node {wanted} "
                "-m moesaic ...`, or change the layout"
            )
