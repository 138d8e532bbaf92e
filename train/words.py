"""A run's architecture and layout as people read them."""

from moesaic.moe.layer import MoE
from moesaic.parallel.placement import even_owners
from moesaic.parallel.ranks import Ranks
from moesaic.train.config import RunConfig


def architecture_in_words(run: RunConfig) -> str:
    """The architecture in a line."""
    model = run.model
    parts = [f"{model.layers} layers of width {model.dim}", f"{model.heads} heads"]
    sparse = [ffn for ffn in model.ffns() if isinstance(ffn, MoE.Config)]
    if sparse:
        ffn = sparse[0]
        shared = f" + {ffn.shared_experts} shared" if ffn.shared_experts else ""
        parts.append(
            f"{len(sparse)} sparse: {ffn.router.k} of {ffn.num_experts} experts of {ffn.hidden}{shared}"
        )
    return ", ".join(parts)


def layout_in_words(run: RunConfig, ranks: Ranks) -> str:
    """Processes, mesh, and experts of a layer that each rank owns, in a few words."""
    if ranks.size == 1:
        return "1 process"
    copies, shards = run.parallel.dp_replicate, run.parallel.shards(ranks.size)
    words = f"{ranks.size} processes: dp_replicate {copies} x dp_shard {shards}"
    banks = {
        ffn.bank or f"layer{layer}": ffn.num_experts
        for layer, ffn in enumerate(run.model.ffns())
        if isinstance(ffn, MoE.Config)
    }
    owned = run.parallel.owned
    if owned is None or not banks:
        return words
    owners = even_owners(banks, shards)
    each = {len(owners.experts(bank, rank)) for bank in banks for rank in range(shards)}
    words += f", experts owned ({min(each)}{f' to {max(each)}' if len(each) > 1 else ''} each)"
    most = owned.max_rows
    return words if most is None else f"{words} in rounds of up to {most:,} rows"
