"""The processes of a run: who they are, what they sum, and how they agree.

One process without a process group is a case like any other: it sums with nobody and agrees with itself.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from moesaic.parallel.config import ParallelConfig

T = TypeVar("T")

ROLL_CALL = 2.0
"""Seconds in which a rank that waits in vain, like this one, will have noticed."""

AXES = ("dp_replicate", "dp_shard")
"""Mesh axes that have more than one size so far, outermost first."""


class RankGoneError(ConnectionError):
    """A rank has died, or makes no progress; the message says which, and what this one was waiting for."""


class RankError(ValueError):
    """Another rank refused the run; the message is its own."""

    told = True
    """That rank has shown the message already."""


@dataclass(frozen=True)
class Ranks:
    """This process among the others of the run. All methods that communicate are called by all ranks, in one order."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """(dp_replicate, dp_shard); None for one process."""
    control: dist.ProcessGroup | None = None
    """A CPU group for counts, flags and messages, apart from the gradients' traffic."""

    @property
    def first(self) -> bool:
        """Whether this rank writes and shows what is written and shown once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in float64 on the CPU; equal on all of them."""
        total = values.detach().to("cpu", torch.float64)
        if self.control is not None:
            total = total.clone()
            with waiting_for("a sum over ranks", self.control):
                dist.all_reduce(total, group=self.control)
        return total

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """The sum over all ranks, whose gradient is the sum of all ranks' gradients."""
        return values if self.mesh is None else _Sum.apply(values)  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank; plain Python values."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        with waiting_for("values of all ranks", self.control):
            dist.all_gather_object(values, value, group=self.control)
        return values

    def shared(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all ranks. A ValueError there is raised on all: RankError on the others."""
        if self.control is None:
            return make()
        outcome: list[Any] = [None, None]
        error: ValueError | None = None
        if self.first:
            try:
                outcome[0] = make()
            except ValueError as refused:
                error, outcome[1] = refused, str(refused)
        with waiting_for("what the first rank decides", self.control):
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise RankError(outcome[1])
        return outcome[0]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        with waiting_for("a sum over ranks"):
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grads[0].clone()
        with waiting_for("the gradient of a sum over ranks"):
            dist.all_reduce(total)
        return total


ALONE = Ranks()
"""One process."""


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(config: ParallelConfig):
    """Join the other processes that torchrun started, for the length of a run; yields this process's `Ranks`.

    What they do together raises RankGoneError where one is gone, or has been silent for `config.timeout` seconds. Where
    NCCL carries it, the host only queues it: a rank that goes amid a layer ends the others after that time through
    NCCL's watchdog, which leaves no chance to raise. Raises ValueError where there are fewer GPUs than processes.
    """
    if world_size() == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(own_gpu(torch.cuda.device_count()))
    begun = not dist.is_initialized()
    if begun:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=config.timeout)
        )
    try:
        yield ranks_of(config, "cuda" if cuda else "cpu")
    finally:
        if begun:
            with suppress(RuntimeError):  # where a peer has died, there is nothing left to end
                dist.destroy_process_group()


def own_gpu(found: int) -> int:
    """The number of this process's GPU. ValueError where it sees fewer than there are processes on its node."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= found:
        raise ValueError(
            f"process {local} of this node sees {found} GPU{'' if found == 1 else 's'}, and each process needs one of "
            "its own; start fewer processes, or let every process see all GPUs of its node"
        )
    return local


def ranks_of(config: ParallelConfig, device: str) -> Ranks:
    """This process's place in the layout, given a default process group."""
    size = dist.get_world_size()
    shape = (config.dp_replicate, config.shards(size))
    mesh = init_device_mesh(device, shape, mesh_dim_names=AXES)
    control = dist.new_group(backend="gloo")
    assert control is not None
    assert not isinstance(control, int)
    limit_waits([control, *mesh.get_all_groups()], config)
    return Ranks(dist.get_rank(), size, mesh, control)


def limit_waits(groups: Iterable[dist.ProcessGroup], config: ParallelConfig) -> None:
    """Give up after `config.timeout` in these groups, which else have the backend's own limit: half an hour."""
    for group in groups:
        _set_pg_timeout(timedelta(seconds=config.timeout), group)


@contextmanager
def waiting_for(what: str, group: dist.ProcessGroup | None = None):
    """Communication within raises RankGoneError where it fails. None: the group of all ranks."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # this rank's own
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise RankGoneError(f"waiting for {what}: {absent(group)} gone or stuck ({cause})") from error


def absent(group: dist.ProcessGroup | None) -> str:
    """Which ranks of a group do not notice, as this one did, that something is wrong; as the subject of a sentence."""
    me = dist.get_rank()
    others = [rank for rank in dist.get_process_group_ranks(group or dist.group.WORLD) if rank != me]
    silent = others
    if len(others) > 1:  # else it is clear who it is
        with suppress(RuntimeError):  # the store may have gone with its rank
            silent = roll_call(me, others)
    if len(silent) == 1:
        return f"rank {silent[0]} is"
    if silent:
        return f"ranks {', '.join(map(str, silent))} are"
    return f"one of ranks {', '.join(map(str, others))} was"  # and answered since


def roll_call(me: int, others: Sequence[int]) -> list[int]:
    """Say that this rank is alive, and return who else does not within a moment."""
    store = _get_default_store()
    store.set(f"moesaic alive {me}", "")
    ends = time.monotonic() + ROLL_CALL
    silent = list(others)
    while silent and time.monotonic() < ends:
        silent = [rank for rank in silent if not store.check([f"moesaic alive {rank}"])]
        time.sleep(0.02)
    return silent
