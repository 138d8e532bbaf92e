"""The two algorithms of FSSDP (arXiv:2502.02581): which experts to copy for a step, and who should own which.

Dims: P ranks, E experts of a bank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from jaxtyping import Int64

from moesaic.parallel.copies import hottest_first, recent, spread
from moesaic.parallel.costs import LONGEST, Costs, layer_time
from moesaic.parallel.placement import Counts, OwnerMap, Present, Topology, even_owners, no_copies


@dataclass(frozen=True, kw_only=True)
class HecateConfig:
    """As many of the hottest experts on all ranks as other work hides, or seats by load where memory is short."""

    kind: Literal["hecate"] = "hecate"
    window: int = 5
    """Steps whose counts, added up, predict those of the next."""
    overlap: int | None = None
    """How many experts, copied to all ranks, other work hides (the paper's t). None: from the costs."""
    most_copies: int | None = None
    """Most experts of a bank that a rank gets copies of (the paper's m); None: all."""
    calibrate: bool = False
    """Look again when the layer's counts are known, and send more copies where that pays although nothing hides it."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: {self.window} is not positive; give a number of steps")
        for name in ("overlap", "most_copies"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: {value} is negative; give a number of experts, or null")


class Hecate:
    """Plans for one bank. Source: arXiv:2502.02581, algorithm 1 and its calibration (section 4)."""

    def __init__(self, config: HecateConfig, costs: Costs) -> None:
        self.config, self.costs, self.exact = config, costs, config.calibrate

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        overlap = self.config.overlap
        if overlap is None:
            overlap = hidden_experts(self.costs, topology)
        most = len(owners) if self.config.most_copies is None else self.config.most_copies
        alone = no_copies(owners, topology.ranks)
        planned = alone
        if history:
            room = np.full(topology.ranks, most)
            loads = recent(history, self.config.window).sum(0)
            planned = sparse_materialization(loads, alone, room, overlap, topology)
        if exact is None:
            return planned
        room = most - (planned & ~alone).sum(1)
        more = sparse_materialization(exact.sum(0), planned, room, overlap, topology)
        if (more == planned).all():
            return planned
        costs = self.costs.of_one_call()
        before, after = (
            layer_time(exact, plan, owners, topology, costs, planned=planned) for plan in (planned, more)
        )
        return more if after < before else planned


def hidden_experts(costs: Costs, topology: Topology) -> int:
    """How many experts can be copied to every rank behind other work, and their gradients returned.

    Counted is what arrives at a rank, or over the link of a node for all of its ranks, in the forward and in the
    backward pass.
    """
    width = min(topology.ranks_per_node, topology.ranks) if topology.ranks > topology.ranks_per_node else 0
    copy = max(costs.copy_near, width * costs.copy_far)
    back = max(costs.grad_near, width * costs.grad_far)
    windows = max(costs.gathers_backward, costs.reductions)
    needed = costs.gathers_backward * copy + costs.reductions * back
    passes = [(costs.hidden_forward, copy), (windows * costs.hidden_backward, needed)]
    return min((hidden // each for hidden, each in passes if each), default=LONGEST)


def sparse_materialization(
    loads: Int64[np.ndarray, " E"],
    present: Present,
    room: Int64[np.ndarray, " P"],
    overlap: int,
    topology: Topology,
) -> Present:
    """`present` with copies of the `overlap` hottest experts: on every rank, where all ranks have room for all of them;
    else as many as there is room for, in proportion to load.

    `room`: most new copies on each rank. By load, experts take their turns, the hottest first: each gets its share of
    the seats that are left, at most one on every rank, on nodes that lack it first. An expert without rows is not
    copied. Source: arXiv:2502.02581, algorithm 1.
    """
    hot = hottest_first(loads)[:overlap]
    hot = hot[loads[hot] > 0]
    everywhere = present.copy()
    everywhere[:, hot] = True
    if ((everywhere & ~present).sum(1) <= room).all():
        return everywhere
    seats, free, left = [], int(room.sum()), int(loads[hot].sum())
    for expert in hot.tolist():
        load = int(loads[expert])
        seats.append(min(free * load // left, topology.ranks - int(present[:, expert].sum())))
        free, left = free - seats[-1], left - load
    spread_out = present.copy()
    ones = np.ones(len(hot), np.int64)
    spread_out[:, hot] = spread(present[:, hot].T, np.array(seats), ones, room, room, topology).T
    return spread_out


def heterogeneous_owners(loads: Mapping[str, Sequence[int]], hot: int, topology: Topology) -> OwnerMap:
    """Owners for experts of which the `hot` hottest of each bank will be copied anyway: the others share their loads
    over nodes, then over ranks, and the hot ones take the slots that are left, bank by bank over all nodes.

    `loads` are rows per expert, by bank. A rank has as many slots over all banks as `even_owners` gives it, however
    many of one bank. Banks take their turns, the one with the highest load of an expert first, and ties go by name; of
    equally loaded nodes or ranks, that with fewer free slots comes first. Source: arXiv:2502.02581, algorithm 2, which
    leaves the places of the hot experts open; their owners send many copies at once, so here no node has more of a
    bank than it must.
    """
    ranks, size = topology.ranks, topology.ranks_per_node
    even = even_owners({bank: len(loads[bank]) for bank in sorted(loads)}, ranks)
    slots = [even.slots(rank) for rank in range(ranks)]
    nodes = [range(first, min(first + size, ranks)) for first in range(0, ranks, size)]
    banks = sorted(loads, key=lambda bank: (-max(loads[bank]), bank))
    orders = {bank: sorted(range(len(of)), key=lambda e, of=of: (-of[e], e)) for bank, of in loads.items()}
    owners = {bank: [0] * len(of) for bank, of in loads.items()}

    def take(bank: str, experts: Sequence[int], weights: Sequence[int], fuller_first: bool) -> None:
        sign = 1 if fuller_first else -1
        taken = [0] * ranks
        for expert, weight in zip(experts, weights, strict=True):
            free = [node for node in nodes if any(slots[rank] for rank in node)]
            node = min(
                free,
                key=lambda node: (
                    Fraction(sum(taken[rank] for rank in node), len(node)),
                    sign * sum(slots[rank] for rank in node),
                    node.start,
                ),
            )
            rank = min(
                (rank for rank in node if slots[rank]),
                key=lambda rank: (taken[rank], sign * slots[rank], rank),
            )
            owners[bank][expert] = rank
            taken[rank] += weight
            slots[rank] -= 1

    for bank in banks:
        cold = orders[bank][hot:]
        take(bank, cold, [loads[bank][expert] for expert in cold], fuller_first=True)
    for bank in banks:
        chosen = orders[bank][:hot]
        take(bank, chosen, [1] * len(chosen), fuller_first=False)
    return OwnerMap(ranks, {bank: tuple(owners[bank]) for bank in loads})
