"""Sparse collectives: experts' rows to the ranks that want copies, and gradients of copies back to the owners.

SparseAllGather and SparseReduceScatter of FSSDP (Qing et al., arXiv:2502.02581, section 3), each the other's adjoint.
What travels follows from integers that all ranks know, so nothing is announced. Sums are formed by the owner in
ascending order of ranks, so results do not depend on timing.

Dims: P ranks, E experts of a bank, L length of a row.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

from moesaic.parallel.ranks import waiting_for

Wanted = Bool[np.ndarray, "P E"]
"""Which ranks want which experts of others."""
Rows = Callable[[Sequence[int]], Tensor]
"""Rows (n, L) of these experts, in this order; (0, L) of none."""


@dataclass(frozen=True)
class Arrived:
    """Rows of experts, in the order in which they are to be used; an expert may come more than once."""

    experts: Sequence[int]
    rows: Tensor


Steps = Generator[dist.Work, None, Arrived]


class Transfer:
    """Rows under way. Other work can go on until `finish`."""

    def __init__(self, what: str, group: dist.ProcessGroup, steps: Steps) -> None:
        self.what, self.group, self.steps = what, group, steps
        with waiting_for(what, group):
            self.work = next(steps)

    def finish(self) -> Arrived:
        """What arrived. The host waits only where the backend has it wait."""
        with waiting_for(self.what, self.group):
            while True:
                self.work.wait()
                try:
                    self.work = next(self.steps)
                except StopIteration as stop:
                    return stop.value


class Collectives(Protocol):
    """How rows travel. Every method is called by all ranks, in one order, with the same integers."""

    bytes: int
    """Sent to other ranks so far."""
    groups: tuple[dist.ProcessGroup, ...]
    """In which rows travel."""

    def all_gather(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        """Bring rows of this rank's experts to who wants them; arrived are those that this rank wants, once each."""
        ...

    def reduce_scatter(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        """Bring rows for copies, `wanted` here, to the owners; arrived is what an owner has to add, in this order."""
        ...


class Flat:
    """Every row goes from its owner to each rank that wants it: one exchange."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.bytes = group, 0
        self.groups = (group,)
        self.rank = dist.get_rank(group)

    def all_gather(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        away, here = between(wanted, owners, self.rank)
        return Transfer("copies of experts", self.group, self._steps(rows, away, here))

    def reduce_scatter(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        away, here = between(wanted, owners, self.rank)
        return Transfer("gradients of copies", self.group, self._steps(rows, here, away))

    def _steps(self, rows: Rows, send: list[list[int]], receive: list[list[int]]) -> Steps:
        leaving = rows([expert for part in send for expert in part])
        out, work = exchange(self.group, leaving, [*map(len, send)], [*map(len, receive)])
        self.bytes += leaving.nbytes
        yield work
        del leaving  # kept until it has left
        return Arrived([expert for part in receive for expert in part], out)


def between(wanted: Wanted, owners: Sequence[int], rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """By other rank, ascending: which of this rank's experts it wants, and which of its experts this one wants."""
    owner = np.asarray(owners)
    away = [np.flatnonzero(wanted[other] & (owner == rank)).tolist() for other in range(len(wanted))]
    here = [np.flatnonzero(wanted[rank] & (owner == other)).tolist() for other in range(len(wanted))]
    return away, here


def exchange(
    group: dist.ProcessGroup, units: Tensor, send: Sequence[int], receive: Sequence[int]
) -> tuple[Tensor, dist.Work]:
    """Begin to send the first `send[0]` rows of `units` to the group's first rank, and so on."""
    out = units.new_empty(sum(receive), *units.shape[1:])
    work = dist.all_to_all_single(out, units, list(receive), list(send), group=group, async_op=True)
    assert work is not None
    return out, work


def uploaded(arrays: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Integers as tensors of a device, in one copy, for which the host does not wait."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if device.type == "cuda":
        flat = flat.pin_memory()
    return flat.to(device, non_blocking=True).split([len(array) for array in arrays])
