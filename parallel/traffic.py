"""What a training step moves between ranks where experts are owned: rows, bytes by class, and waiting.

Rows, counts, copies and waiting are counted where they happen (`AllToAll.traffic`, `Copying`). Bytes of weights and
gradients are computed from sizes: FSDP2 moves them, always the same ones.
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
from moesaic.parallel.slots import slots_of


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """One step, all layers and micro-batches together."""

    rows: list[int]
    """Rows that came to each rank's experts."""
    rows_alone: list[int]
    """Rows that would have come, had there been no copies."""
    copies: list[int]
    """Copies that each rank had, counted once for every forward pass of a layer."""
    waited: list[float]
    """Seconds that each rank waited for counts and rows."""
    waited_for_copies: list[float]
    """Seconds that each rank waited for copies and their gradients."""
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
            "traffic/rows_alone": self.rows_alone,
            "traffic/copies": self.copies,
            "traffic/rows_max_over_mean": self.max_over_mean,
        }
        record |= {f"traffic/bytes_{name}": size for name, size in self.sent.items()}
        return record | {"time/waited": self.waited, "time/waited_for_copies": self.waited_for_copies}


class Meter:
    """Reads the dispatchers of a model. Between `reset` and `collect` lies one step, and nothing else."""

    def __init__(self, model: nn.Module, ranks: Ranks, *, micro_batches: int, dtype: torch.dtype) -> None:
        """`dtype`: of matrices while they compute and travel."""
        self.ranks = ranks
        found = [layer.dispatcher for _, layer in layers_of(model)]
        self.dispatchers = [dispatcher for dispatcher in found if isinstance(dispatcher, AllToAll)]
        slots = slots_of(model)
        self.copying = None if slots is None else slots.copying
        self.dense = (
            dense_bytes(model, ranks, micro_batches=micro_batches, dtype=dtype) if self.dispatchers else {}
        )

    def reset(self) -> None:
        """Forget what was counted: another step, an evaluation, a sample."""
        for dispatcher in self.dispatchers:
            dispatcher.traffic = Traffic()
        if self.copying is not None:
            self.copying.reset()

    def collect(self) -> StepTraffic | None:
        """What all ranks moved since `reset`; collective, one message. None where no experts are owned."""
        if self.copying is None:
            return None
        rank, size = self.ranks.rank, self.ranks.size
        each = [dispatcher.traffic for dispatcher in self.dispatchers]
        of_rank = [
            sum(traffic.rows for traffic in each),
            sum(traffic.rows_alone for traffic in each),
            sum(traffic.copies for traffic in each),
            sum(traffic.seconds_waited for traffic in each),
            self.copying.seconds_waited,
        ]
        sent = {
            "tokens": sum(traffic.bytes_tokens for traffic in each),
            "counts": sum(traffic.bytes_counts for traffic in each),
            "copies": self.copying.copies.bytes,
            "copy_gradients": self.copying.gradients.bytes,
        }
        mine = torch.zeros(len(of_rank), size, dtype=torch.float64)
        mine[:, rank] = torch.tensor(of_rank, dtype=torch.float64)
        numbers = torch.tensor([*sent.values()], dtype=torch.float64)
        found = self.ranks.sum(torch.cat([mine.flatten(), numbers]))
        rows, alone, copies, waited, for_copies = found[: mine.numel()].view_as(mine).tolist()
        totals = found[mine.numel() :].long().tolist()
        return StepTraffic(
            rows=[*map(int, rows)],
            rows_alone=[*map(int, alone)],
            copies=[*map(int, copies)],
            waited=waited,
            waited_for_copies=for_copies,
            sent={**dict(zip(sent, totals, strict=True)), **self.dense},
        )


def dense_bytes(model: nn.Module, ranks: Ranks, *, micro_batches: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that all ranks together send in a step for what is not experts; computed, not measured.

    `weights`: every micro-batch gathers each unit for its forward pass and again for its backward pass, and what is in
    no unit once; recomputation gathers nothing more. (The first step after an evaluation may find the latter gathered.)
    `gradients`: of sharded matrices, scattered over the shards and summed over the replicas; of small parameters,
    summed over all ranks; of experts, summed over the replicas. A sum of n bytes over P ranks sends 2 (P - 1) n, as a
    ring does.
    """
    assert ranks.mesh is not None
    shards, replicas = ranks.mesh["dp_shard"].size(), ranks.mesh["dp_replicate"].size()
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
        weights += gathers * replicas * (shards - 1) * padded * dtype.itemsize
        gradients += (replicas * (shards - 1) + 2 * (replicas - 1)) * padded * wide
    gradients += 2 * (ranks.size - 1) * sum(parameter.nbytes for parameter in small)
    for table in slot_tables(model):
        experts = sum(part.num_experts for part in table.owned.values())
        row = table.master.shape[1] * table.master.element_size()
        gradients += 2 * (replicas - 1) * experts * row
    return {"weights": weights, "gradients": gradients}
