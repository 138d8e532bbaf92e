"""The planner that searches: templates of copies, each for the hottest k experts, priced by the cost model.

Dims: P ranks, E experts of a bank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64

from moesaic.parallel.compiled import as_kernel_input, run_compiled
from moesaic.parallel.copies import hottest_first, recent, spread
from moesaic.parallel.costs import Costs, as_prices, prefix_times
from moesaic.parallel.placement import Counts, Present, Topology, no_copies

DEPTH = 32
"""How many of the hottest experts the templates hold that leave ranks out; copies of colder ones gain little."""
MILLION = 10**6


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Copies where the cost model says that they pay, from none to everything everywhere."""

    kind: Literal["auto"] = "auto"
    window: int = 5
    """Steps whose counts, added up, predict those of the next."""
    most_copies: int | None = None
    """Most experts of a bank that a rank gets copies of; None: all."""
    margin: float = 0.02
    """Part of a step's time that a plan must save for the previous one to be given up."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: {self.window} is not positive; give a number of steps")
        if self.most_copies is not None and self.most_copies < 0:
            raise ValueError(
                f"most_copies: {self.most_copies} is negative; give a number of experts, or null"
            )
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin: {self.margin} is not in [0, 1); 0 gives a plan up for any gain")


class Auto:
    """Plans for one bank; it remembers its last plan.

    Four templates, each for the hottest k experts of the window: copies on all ranks of the owner's node; one copy on
    each node; seats in proportion to load, so that no copy serves more than a rank's mean; copies everywhere. The best
    is taken, of equal ones the first, and no copies before all.
    """

    exact = False

    def __init__(self, config: AutoConfig, costs: Costs) -> None:
        self.config, self.costs = config, costs
        self._last: Present | None = None

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        if not history:
            return no_copies(owners, topology.ranks)
        steps = [as_kernel_input(counts, np.int64) for counts in history[-self.config.window :]]
        shape = (topology.ranks, len(owners))
        assert all(counts.shape == shape for counts in steps), "counts of other ranks or another bank"
        last = self._last
        if last is None or last.shape != shape:
            last = np.zeros(shape, bool)
        costs = self.costs.of_steps(len(steps))
        found = np.zeros(shape, bool)
        most = len(owners) if self.config.most_copies is None else self.config.most_copies
        margin = round(self.config.margin * MILLION)
        arrays = [steps, _as_array(owners), as_prices(costs), last, found]
        sizes = (len(steps), len(owners), topology.ranks, topology.ranks_per_node, DEPTH, most, margin)
        if not run_compiled("auto_plan", arrays, sizes):
            found = _search(recent(steps, len(steps)), _as_array(owners), last, topology, costs, most, margin)
        self._last = found.copy()
        return found

    def state(self) -> dict[str, Any]:
        """The last plan, for JSON: the experts on each rank."""
        if self._last is None:
            return {"experts": 0, "present": []}
        return {
            "experts": self._last.shape[1],
            "present": [np.flatnonzero(row).tolist() for row in self._last],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self._last = np.zeros((len(state["present"]), state["experts"]), bool)
        for row, experts in zip(self._last, state["present"], strict=True):
            row[experts] = True


@lru_cache
def _as_array(owners: tuple[int, ...]) -> Int64[np.ndarray, " E"]:
    return np.array(owners, np.int64)


def _search(
    counts: Counts,
    owners: Int64[np.ndarray, " E"],
    last: Present,
    topology: Topology,
    costs: Costs,
    most_copies: int,
    margin: int,
) -> Present:
    """The plan for a window's counts, in numpy; kernels/cpp/auto.cpp does the same. `margin`: in millionths."""
    loads = counts.sum(0)
    order = hottest_first(loads)
    home = owners[order]
    heat = _Heat(counts.T[order], loads[order], home, np.arange(topology.ranks) == home[:, None], topology)
    some = heat.templates(most_copies)
    before = heat.alone | last.T[order]  # owners may have changed
    whole = np.array([np.ones_like(before), before])
    some_times, (all_times, before_times) = (
        prefix_times(heat.counts, heat.owners, templates, topology, costs, most_copies)
        for templates in (some, whole)
    )
    template, k = divmod(int(some_times.argmin()), some_times.shape[1])
    k_all = int(all_times.argmin())
    best, then, none = int(some_times[template, k]), int(before_times[-1]), int(all_times[0])
    chosen = some[template, :k]
    if all_times[k_all] < best:
        best, chosen = int(all_times[k_all]), whole[0, :k_all]
    if then <= none and (then - best) * MILLION <= then * margin:
        chosen = before
    heat.alone[: len(chosen)] = chosen
    found = np.empty(counts.shape, bool)
    found[:, order] = heat.alone.T
    return found


@dataclass(frozen=True)
class _Heat:
    """A bank's window with the hottest expert first."""

    counts: Int64[np.ndarray, "E P"]
    loads: Int64[np.ndarray, " E"]
    owners: Int64[np.ndarray, " E"]
    alone: Bool[np.ndarray, "E P"]
    """No copies."""
    topology: Topology

    def templates(self, most_copies: int) -> Bool[np.ndarray, "3 H P"]:
        """The hottest experts on their owners' nodes, once on each node, and by load."""
        nodes = self.topology.nodes()
        own_node = nodes[self.owners[:DEPTH], None] == nodes
        number = int(nodes[-1]) + 1
        each_node = self._spread(np.full_like(self.loads, number - 1), most_copies)
        mean = max(1, -(-int(self.loads.sum()) // self.topology.ranks))
        seats = np.minimum(-(-self.loads // mean), self.topology.ranks)
        by_load = self._spread(np.maximum(seats - 1, 0), most_copies)
        return np.stack([own_node, each_node, by_load])

    def _spread(self, seats: Int64[np.ndarray, " E"], most_copies: int) -> Bool[np.ndarray, "H P"]:
        """So many copies besides the owner, each with an equal part of the load, to ranks that have least of it."""
        ranks = self.topology.ranks
        weights = self.loads // (seats + 1)
        spare = np.zeros(ranks, np.int64)
        np.subtract.at(spare, self.owners, weights)
        room = np.full(ranks, most_copies)
        return spread(self.alone[:DEPTH], seats[:DEPTH], weights[:DEPTH], spare, room, self.topology)
