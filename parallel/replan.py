"""New materialisation plans after every step: what the layers counted becomes history, and planners look at it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from moesaic.parallel.agree import made_alike
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.costs import Costs
from moesaic.parallel.measure import measure_costs
from moesaic.parallel.placement import Present, digest
from moesaic.parallel.plans import (
    CustomPlanConfig,
    ExpertParallelConfig,
    PlanError,
    Planner,
    RememberingPlanner,
    ReplicateAllConfig,
    build_planner,
    check_plan,
)
from moesaic.parallel.ranks import Ranks, waiting_for
from moesaic.parallel.slots import Slots, slots_of

T = TypeVar("T")

LONGEST_HISTORY = 16
"""Steps that planners can look back on."""


class Replan:
    """Plans for the banks of a model. Every rank has one, and all make the same plans.

    A plan is made from integers that are equal everywhere and from `costs`, which are measured once: they are kept in
    checkpoints with the history, so that a resumed run makes the plans that it would have made.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: OwnedExperts,
        ranks: Ranks,
        *,
        micro_batches: int = 1,
        dtype: torch.dtype,
    ) -> None:
        """Measure costs, where they are not given, and make the first plans; collective.

        `dtype`: in which layers compute. Raises PlanError, on every rank, where a planner cannot be built or its plan
        cannot be.
        """
        slots = slots_of(model)
        assert slots is not None
        self.slots: Slots = slots
        self.owned, self.ranks, self.topology = owned, ranks, slots.topology
        if owned.costs is not None:
            costs = dict.fromkeys(slots.banks, owned.costs)
        elif isinstance(owned.plan, ExpertParallelConfig | ReplicateAllConfig):
            costs = dict.fromkeys(slots.banks, Costs(row=0, copy_near=0, copy_far=0, grad_near=0, grad_far=0))
        else:
            costs = measure_costs(model, ranks, micro_batches=micro_batches, dtype=dtype)
        self.compared = owned.compare_plans or isinstance(owned.plan, CustomPlanConfig)
        """Whether ranks compare their plans: a planner of the user's own may do anything."""
        self.use(costs)
        self.plan()

    def use(self, costs: Mapping[str, Costs]) -> None:
        """Make planners that plan with these costs."""
        self.costs = dict(costs)
        self.planners = self.alike(self.build, lambda _: 0)
        for name, bank in self.slots.banks.items():
            bank.planner, bank.compared = self.planners[name], self.compared

    def build(self, bank: str) -> Planner:
        """The planner of a bank. Raises PlanError for one that cannot be built."""
        try:
            return build_planner(self.owned.plan, self.costs[bank])
        except ValueError as error:
            raise PlanError(str(error)) from error

    def step(self) -> dict[str, float]:
        """Take in what a step counted, and plan the next one; collective. Returns metrics."""
        self.remember()
        before = {name: bank.present for name, bank in self.slots.banks.items()}
        self.plan()
        banks = self.slots.banks
        changed = [name for name in banks if not np.array_equal(before[name], banks[name].present)]
        copies = [int((bank.present & ~bank.alone).sum()) for bank in banks.values()]
        return {"plan/copies": float(sum(copies)), "plan/changed": float(len(changed))}

    def remember(self) -> None:
        """Move the step's counts, of all replicas of the model, to the banks' histories; one message."""
        banks = self.slots.banks.values()
        every = [bank.loads for bank in banks]
        mesh = self.ranks.mesh
        if mesh is not None and mesh["dp_replicate"].size() > 1:
            flat = np.concatenate([counts.reshape(-1) for counts in every])
            total = torch.from_numpy(flat).to(mesh.device_type)
            group = mesh.get_group("dp_replicate")
            with waiting_for("the sum of experts' loads over replicas", group):
                dist.all_reduce(total, group=group)
            parts = total.cpu().split([counts.size for counts in every])
            every = [part.view(counts.shape).numpy() for part, counts in zip(parts, every, strict=True)]
        for bank, counts in zip(banks, every, strict=True):
            bank.history = [*bank.history, counts][-LONGEST_HISTORY:]
            bank.loads = np.zeros_like(bank.loads)

    def plan(self) -> None:
        """Make every bank's plan. Raises PlanError, on all ranks, where a plan cannot be or ranks disagree."""
        for name, present in self.alike(self.asked, digest).items():
            self.slots.banks[name].present = present

    def asked(self, bank: str) -> Present:
        """What the planner of a bank says."""
        of = self.slots.banks[bank]
        found = self.planners[bank].plan(of.history, None, of.owners, self.topology)
        check_plan(bank, found, of.owners, self.topology)
        return found

    def alike(self, make: Callable[[str], T], digest: Callable[[T], int]) -> dict[str, T]:
        """What `make` gives for every bank; where ranks compare, it is the same on all of them, or PlanError."""
        if not self.compared:
            return {bank: make(bank) for bank in self.slots.banks}
        assert self.ranks.control is not None
        return made_alike(make, self.slots.banks, digest, self.ranks.control)

    def state(self) -> dict[str, Any]:
        """What the next plans depend on; JSON."""
        banks = self.slots.banks.items()
        return {
            "ranks": self.topology.ranks,
            "costs": {name: asdict(costs) for name, costs in self.costs.items()},
            "history": {name: [counts.tolist() for counts in bank.history] for name, bank in banks},
            "copies": {name: np.argwhere(bank.present & ~bank.alone).tolist() for name, bank in banks},
            "planners": {
                name: planner.state()
                for name, planner in self.planners.items()
                if isinstance(planner, RememberingPlanner)
            },
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`; on another number of ranks, begin anew."""
        if state["ranks"] != self.topology.ranks:
            return
        self.use({name: Costs(**state["costs"][name]) for name in self.slots.banks})
        for name, bank in self.slots.banks.items():
            bank.history = [np.array(counts, np.int64) for counts in state["history"][name]]
            bank.present = bank.alone.copy()
            for rank, expert in state["copies"][name]:
                bank.present[rank, expert] = True
            planner = self.planners[name]
            if isinstance(planner, RememberingPlanner) and name in state["planners"]:
                planner.restore(state["planners"][name])
