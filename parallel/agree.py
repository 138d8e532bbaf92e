"""What every rank makes by itself, with a planner of the user's own: a mistake on one is an error on all of them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch.distributed as dist

from moesaic.parallel.plans import PlanError
from moesaic.parallel.ranks import waiting_for

T = TypeVar("T")


def made_alike(
    make: Callable[[str], T], banks: Iterable[str], digest: Callable[[T], int], group: dist.ProcessGroup
) -> dict[str, T]:
    """What `make` gives for every bank; collective. `digest`: a number of it, which must be equal everywhere.

    Raises PlanError on every rank of `group` where `make` fails on one, whatever it raises, or digests differ.
    """
    made: dict[str, T] = {}
    problem, cause = "", None
    for bank in banks:
        try:
            made[bank] = make(bank)
        except Exception as error:
            named = isinstance(error, PlanError)
            problem = str(error) if named else f"bank {bank!r}: {type(error).__name__}: {error}"
            cause = error
            break
    mine = {bank: digest(value) for bank, value in made.items()}
    found: list[Any] = [None] * dist.get_world_size(group)
    with waiting_for("plans of all ranks", group):
        dist.all_gather_object(found, (problem, mine), group=group)
    numbers = dist.get_process_group_ranks(group)
    for rank, (theirs, _) in zip(numbers, found, strict=True):
        if theirs:
            raise PlanError(f"parallel.experts.plan: the planner failed on rank {rank}: {theirs}") from cause
    for rank, (_, theirs) in zip(numbers, found, strict=True):
        for bank, first in found[0][1].items():
            if theirs[bank] != first:
                raise PlanError(
                    f"parallel.experts.plan: bank {bank!r}: ranks {numbers[0]} and {rank} made different plans; a "
                    "planner may only depend on what it is given, which is the same on every rank"
                )
    return made
