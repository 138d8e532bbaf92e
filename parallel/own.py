"""Give every expert an owner: banks become slot tables, layers send their tokens."""

import os
from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moesaic.moe.experts import Bank
from moesaic.moe.layer import MoE
from moesaic.parallel.all_to_all import AllToAll
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.placement import OwnerMap, Topology, even_owners
from moesaic.parallel.ranks import Ranks, limit_waits
from moesaic.parallel.slots import Slots, TableSource, take_banks


def own_experts(
    model: nn.Module, config: ParallelConfig, ranks: Ranks, owners: OwnerMap | None = None
) -> None:
    """Put the experts of all banks of `model` into slot tables, `model.slots`, and let its layers send tokens.

    In place. The owners of one copy of the model are its `dp_shard` ranks; `owners` numbers them from 0 (None: evenly).
    Values are to be initialised or loaded afterwards.
    """
    assert ranks.mesh is not None
    owned = config.owned or OwnedExperts()
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    # groups of their own: rows must not queue behind the gathering of other weights
    mesh = init_device_mesh(
        ranks.mesh.device_type, tuple(ranks.mesh.shape), mesh_dim_names=("copies", "owners")
    )
    group = mesh.get_group("owners")
    limit_waits(mesh.get_all_groups(), config)
    size, rank = mesh["owners"].size(), mesh.get_local_rank("owners")
    owners = owners or even_owners({bank.name: bank.num_experts for bank in banks}, size)
    chosen = owners
    tables = take_banks(banks, lambda bank: chosen.experts(bank, rank))
    model.slots = Slots(tables, owners, group)
    sources = {bank: TableSource(table, bank) for table in tables for bank in table.owned}
    topology = Topology(size, min(size, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    for path, layer in layers_of(model):
        source = layer.experts.source
        assert isinstance(source, Bank)
        layer.experts.source = sources[source.name]
        layer.dispatcher = AllToAll(
            group,
            owners.owners[source.name],
            topology,
            max_rows=owned.max_rows,
            compare_plans=owned.compare_plans,
            name=path or "a layer",
        )


def layers_of(model: nn.Module) -> Sequence[tuple[str, MoE]]:
    """The mixtures of experts of a model, with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, MoE)]
