"""Give every expert an owner: banks become slot tables, layers send their tokens."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moesaic.moe.experts import Bank
from moesaic.moe.layer import MoE
from moesaic.parallel.all_to_all import AllToAll
from moesaic.parallel.banks import Copying, OwnedBank
from moesaic.parallel.collectives import Flat
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.placement import OwnerMap, Topology, even_owners
from moesaic.parallel.plans import CustomPlanConfig
from moesaic.parallel.ranks import Ranks, limit_waits
from moesaic.parallel.slots import Slots, take_banks
from moesaic.parallel.two_level import TwoLevel


def own_experts(
    model: nn.Module, config: ParallelConfig, ranks: Ranks, owners: OwnerMap | None = None
) -> None:
    """Put the experts of all banks of `model` into slot tables, `model.slots`, and let its layers send tokens.

    In place. The owners of a replica of the model are its `dp_shard` ranks, numbered from 0 in `owners` (None: evenly).
    Values are to be initialised or loaded afterwards. Raises ValueError, on every rank, where ranks have unlike banks,
    or nodes of unequal sizes do not allow two levels.
    """
    assert ranks.mesh is not None
    owned = config.owned or OwnedExperts()
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    per_node = agreed(banks, ranks, owned.levels)
    group = replica_group(ranks.mesh)
    limit_waits([group], config)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owners = owners or even_owners({bank.name: bank.num_experts for bank in banks}, size)
    chosen = owners
    tables = take_banks(banks, lambda bank: chosen.experts(bank, rank))
    topology = Topology(size, min(size, per_node))
    copying = copying_of(owned, ranks.mesh, topology, config)
    named = {
        bank: OwnedBank(bank, table, owners.owners[bank], rank, size, copying)
        for table in tables
        for bank in table.owned
    }
    model.slots = Slots(tables, [named[bank.name] for bank in banks], owners, group, topology, copying)
    for path, layer in layers_of(model):
        source = layer.experts.source
        assert isinstance(source, Bank)
        layer.experts.source = named[source.name]
        layer.dispatcher = AllToAll(
            group,
            named[source.name],
            topology,
            max_rows=owned.max_rows,
            compare_plans=owned.compare_plans or isinstance(owned.plan, CustomPlanConfig),
            recomputed=config.recompute != "none",
            name=path or "a layer",
        )


def agreed(banks: Sequence[Bank], ranks: Ranks, levels: Literal["one", "two"]) -> int:
    """Ranks per node, the most that one has, once all ranks are known to have the same banks; collective.

    Ranks that plan for unlike banks or nodes would wait for each other in vain. Raises ValueError on all of them.
    """
    mine = {bank.name: tuple(bank.w1.shape) for bank in banks}
    every = ranks.gather((mine, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    for rank, (theirs, _) in enumerate(every):
        for name in sorted(theirs.keys() | every[0][0].keys()):
            first, here = every[0][0].get(name), theirs.get(name)
            if first != here:
                raise ValueError(
                    f"bank {name!r}: {_in_words(first)} on rank 0, but {_in_words(here)} on rank {rank}; every rank "
                    "needs the same model: give all the same config"
                )
    sizes = [size for _, size in every]
    if levels == "two" and len(set(sizes)) > 1:
        raise ValueError(
            "parallel.experts.levels: two levels need nodes with equally many ranks, but there are nodes of "
            f"{', '.join(map(str, sorted(set(sizes))))}; use `levels: one`, or start as many processes on every node"
        )
    return max(sizes)


def _in_words(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "no such bank"
    experts, inputs, hidden, width = shape
    return f"{experts} experts of {inputs} x {hidden} x {width}"


def copying_of(owned: OwnedExperts, mesh: DeviceMesh, topology: Topology, config: ParallelConfig) -> Copying:
    """How copies travel, in groups of their own; collective over all ranks."""
    make = Flat if owned.levels == "one" else lambda group: TwoLevel(group, topology)
    by_copies, by_gradients = (make(replica_group(mesh)) for _ in range(2))
    for collectives in (by_copies, by_gradients):
        limit_waits(collectives.groups, config)
    copying = Copying(
        by_copies,
        by_gradients,
        rematerialize=owned.rematerialize,
        accumulate=owned.accumulate,
        wire=torch.bfloat16 if owned.gradients == "bf16" else None,
        prefetch=owned.prefetch,
    )
    copying.count_steps()
    return copying


def replica_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """A new group of the ranks of this one's replica of the model; collective over all ranks.

    A mesh gives the same group to all who ask, and what shares a group waits for each other: rows must not queue behind
    the gathering of other weights.
    """
    made = [dist.new_group(row) for row in mesh.mesh.tolist()][mesh.get_local_rank("dp_replicate")]
    assert isinstance(made, dist.ProcessGroup)
    return made


def prefetch_copies(units: Sequence[nn.Module], depth: int, dtype: torch.dtype) -> None:
    """Send for copies when a unit's forward pass begins: for its own layers, and for those of the `depth - 1` next."""
    dispatchers = [
        [layer.dispatcher for _, layer in layers_of(unit) if isinstance(layer.dispatcher, AllToAll)]
        for unit in units
    ]

    def before(number: int) -> None:
        for of_unit in dispatchers[number : number + depth]:
            for dispatcher in of_unit:
                dispatcher.prefetch(dtype)

    for number, unit in enumerate(units):
        unit.register_forward_pre_hook(lambda *_, number=number: before(number))


def layers_of(model: nn.Module) -> Sequence[tuple[str, MoE]]:
    """The mixtures of experts of a model, with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, MoE)]
