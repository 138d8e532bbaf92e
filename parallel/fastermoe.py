"""Shadowing: the hottest experts on all ranks, chosen when a layer's counts are known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesaic.parallel.copies import hottest_first
from moesaic.parallel.costs import Costs, prefix_times
from moesaic.parallel.placement import Counts, Present, Topology, no_copies


@dataclass(frozen=True, kw_only=True)
class FasterMoEConfig:
    """Copies of the hottest experts on all ranks, sent when the layer's counts are known, behind nothing."""

    kind: Literal["fastermoe"] = "fastermoe"


class FasterMoE:
    """Takes the next hottest expert while the modelled time falls. Source: FasterMoE (PPoPP 2022), dynamic shadowing,
    with moesaic's cost model."""

    exact = True

    def __init__(self, config: FasterMoEConfig, costs: Costs) -> None:
        self.costs = costs

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        present = no_copies(owners, topology.ranks)
        if exact is None:
            return present
        order = hottest_first(exact.sum(0))
        everywhere = np.ones_like(present.T)[None]
        in_sight = replace(self.costs.of_one_call(), hidden_forward=0)
        (times,) = prefix_times(exact.T[order], np.asarray(owners)[order], everywhere, topology, in_sight)
        falls = times[1:] < times[:-1]
        present[:, order[: len(falls) if falls.all() else falls.argmin()]] = True
        return present
