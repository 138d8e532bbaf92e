"""A run's architecture and layout as people read them."""

from collections.abc import Mapping
from dataclasses import MISSING, fields

from moesaic.moe.layer import MoE
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.costs import Costs
from moesaic.parallel.placement import even_owners
from moesaic.parallel.plans import CustomPlanConfig
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


def layout_in_words(run: RunConfig, ranks: int) -> str:
    """Processes, mesh, and experts of a layer that each rank owns, in a few words."""
    if ranks == 1:
        return "1 process"
    replicas, shards = run.parallel.dp_replicate, run.parallel.shards(ranks)
    words = f"{ranks} processes: dp_replicate {replicas} x dp_shard {shards}"
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
    words += copies_in_words(owned)
    most = owned.max_rows
    return words if most is None else f"{words} in rounds of up to {most:,} rows"


def copies_in_words(owned: OwnedExperts) -> str:
    """Who plans copies, how many at most, and whether they stay; nothing where there are none."""
    plan = owned.plan
    if not owned.copies:
        return ""
    words = f", copies by {plan.planner if isinstance(plan, CustomPlanConfig) else plan.kind}"
    most = getattr(plan, "most_copies", None)
    words += "" if most is None else f" (up to {most} a rank)"
    return words + (", freed after use" if owned.rematerialize else "")


def costs_in_words(costs: Mapping[str, Costs]) -> list[str]:
    """What planners reckon with: a line for all banks of equal prices."""
    banks: dict[Costs, list[str]] = {}
    for bank, prices in costs.items():
        banks.setdefault(prices, []).append(bank)
    return [f"{_named(names)}: {_prices(prices)}" for prices, names in banks.items()]


def costs_to_paste(costs: Mapping[str, Costs]) -> list[str]:
    """The same prices as values of `parallel.experts.costs`: a line for all banks of equal prices."""
    lines = []
    for prices in dict.fromkeys(costs.values()):
        given = {f.name: getattr(prices, f.name) for f in fields(prices)}
        needed = {f.name for f in fields(prices) if f.default is MISSING}
        kept = {n: v for n, v in given.items() if n in needed or v != getattr(Costs, n)}
        names = [bank for bank, of in costs.items() if of == prices]
        lines.append(f"costs of {_named(names)}: {{{', '.join(f'{n}: {v}' for n, v in kept.items())}}}")
    return lines


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)} banks)"


def _prices(costs: Costs) -> str:
    """Microseconds; between nodes where that is known."""

    def both(near: int, far: int) -> str:
        known = [_microseconds(near)] if near or not far else []
        return " or ".join([*known, *([f"{_microseconds(far)} between nodes"] if far else [])])

    return (
        f"a row {_microseconds(costs.row)}, its trip {both(costs.row_near, costs.row_far)}, "
        f"an expert with rows {_microseconds(costs.expert)}, a message {_microseconds(costs.message)}, "
        f"a copy {both(costs.copy_near, costs.copy_far)}, its gradient {both(costs.grad_near, costs.grad_far)}"
    )


def _microseconds(picoseconds: int) -> str:
    return f"{picoseconds / 1e6:.3g} us"
