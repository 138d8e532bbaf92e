"""Everything that knows of several ranks: the mesh, sharding, checkpoints of any layout."""

from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import Ranks, joined
from moesaic.parallel.shard import sum_replicated

__all__ = ["ParallelConfig", "Ranks", "joined", "parallelize", "sum_replicated"]
