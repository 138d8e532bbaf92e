"""What a training step moves between ranks where experts are owned: rows, bytes by class, and waiting.

Rows, counts and waiting are counted where they happen (`AllToAll.traffic`). Bytes of weights and gradients are computed
from sizes: FSDP2 moves them, always the same ones.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moesaic.parallel.all_to_all import AllToAll, Traffic
from moesaic.parallel.own import layers_of
from moesaic.parallel.ranks import Ranks
from moesaic.parallel.shard import (
    owned_parameters,
    replicated_parameters,
    shard_dim,
    sharded_modules,
    slot_tables,
)


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """One step, all layers and micro-batches together."""

    rows: list[int]
    """Rows that came to each rank's experts."""
    waited: list[float]
    """Seconds that each rank waited for counts and rows."""
    sent: dict[str, int]
    """Bytes that all ranks together sent to others, by class."""

    @property
    def max_over_mean(self) -> float:
        """Rows of the busiest rank over the mean; 1 at balance. NaN without rows."""
        total = sum(self.rows)
        return max(self.rows) * len(self.rows) / total if total else math.nan

    def record(self) -> dict[str, Any]:
        """The step as entries of a metrics record. Only waiting differs between two equal runs."""
        record: dict[str, Any] = {
            "traffic/rows": self.rows,
            "traffic/rows_max_over_mean": self.max_over_mean,
        }
        record |= {f"traffic/bytes_{name}": size for name, size in self.sent.items()}
        return record | {"time/waited": self.waited}


class Meter:
    """Reads the dispatchers of a model. Between `reset` and `collect` lies one step, and nothing else."""

    def __init__(self, model: nn.Module, ranks: Ranks, *, micro_batches: int, dtype: torch.dtype) -> None:
        """`dtype`: of matrices while they compute and travel."""
        self.ranks = ranks
        found = [layer.dispatcher for _, layer in layers_of(model)]
        self.dispatchers = [dispatcher for dispatcher in found if isinstance(dispatcher, AllToAll)]
        self.dense = (
            dense_bytes(model, ranks, micro_batches=micro_batches, dtype=dtype) if self.dispatchers else {}
        )

    def reset(self) -> None:
        """Forget what was counted: another step, an evaluation, a sample."""
        for dispatcher in self.dispatchers:
            dispatcher.traffic = Traffic()

    def collect(self) -> StepTraffic | None:
        """What all ranks moved since `reset`; collective, one message. None where no experts are owned."""
        if not self.dispatchers:
            return None
        rank, size = self.ranks.rank, self.ranks.size
        each = [dispatcher.traffic for dispatcher in self.dispatchers]
        mine = torch.zeros(2 * size + 2, dtype=torch.float64)
        mine[rank] = sum(traffic.rows for traffic in each)
        mine[size + rank] = sum(traffic.seconds_waited for traffic in each)
        mine[-2] = sum(traffic.bytes_tokens for traffic in each)
        mine[-1] = sum(traffic.bytes_counts for traffic in each)
        *found, tokens, counts = self.ranks.sum(mine).tolist()
        return StepTraffic(
            rows=[int(rows) for rows in found[:size]],
            waited=found[size:],
            sent={"tokens": int(tokens), "counts": int(counts), **self.dense},
        )


def dense_bytes(model: nn.Module, ranks: Ranks, *, micro_batches: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that all ranks together send in a step for what is not experts; computed, not measured.

    `weights`: every micro-batch gathers each unit for its forward pass and again for its backward pass, and what is in
    no unit once; recomputation gathers nothing more. (The first step after an evaluation may find the latter gathered.)
    `gradients`: of sharded matrices, scattered over the shards and summed over the copies; of small parameters, summed
    over all ranks; of experts, summed over the copies. A sum of n bytes over P ranks sends 2 (P - 1) n, as a ring does.
    """
    assert ranks.mesh is not None
    shards, copies = ranks.mesh["dp_shard"].size(), ranks.mesh["dp_replicate"].size()
    small, owned = replicated_parameters(model), owned_parameters(model)
    elsewhere = {id(parameter) for parameter in (*small, *owned)}
    units = [module for module in sharded_modules(model) if module is not model]
    in_units = {id(parameter) for unit in units for parameter in unit.parameters()}  # type: ignore[attr-defined]
    wide = torch.promote_types(dtype, torch.float32).itemsize
    weights = gradients = 0
    for parameter in model.parameters():
        if id(parameter) in elsewhere:
            continue
        length = parameter.shape[shard_dim(parameter.shape, shards)]
        padded = parameter.numel() // length * -(-length // shards) * shards
        gathers = micro_batches * (2 if id(parameter) in in_units else 1)
        weights += gathers * copies * (shards - 1) * padded * dtype.itemsize
        gradients += (copies * (shards - 1) + 2 * (copies - 1)) * padded * wide
    gradients += 2 * (ranks.size - 1) * sum(parameter.nbytes for parameter in small)
    for table in slot_tables(model):
        experts = sum(part.num_experts for part in table.owned.values())
        row = table.master.shape[1] * table.master.element_size()
        gradients += 2 * (copies - 1) * experts * row
    return {"weights": weights, "gradients": gradients}
