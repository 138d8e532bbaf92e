"""New materialisation plans after every step: what the layers counted becomes history, and planners look at it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

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

        `dtype`: in which layers compute. Raises ValueError for a planner that cannot be built, and PlanError.
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
        self.planners: dict[str, Planner] = {
            name: build_planner(self.owned.plan, costs[name]) for name in self.slots.banks
        }
        for name, bank in self.slots.banks.items():
            bank.planner = self.planners[name]

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
        """Move the step's counts, of all copies of the model, to the banks' histories."""
        mesh = self.ranks.mesh
        for bank in self.slots.banks.values():
            counts = bank.loads
            if mesh is not None and mesh["dp_replicate"].size() > 1:
                total = torch.from_numpy(counts).to(bank.table.master.device)
                group = mesh.get_group("dp_replicate")
                with waiting_for("the sum of experts' loads over copies", group):
                    dist.all_reduce(total, group=group)
                counts = total.cpu().numpy()
            bank.history = [*bank.history, counts.copy()][-LONGEST_HISTORY:]
            bank.loads = np.zeros_like(bank.loads)

    def plan(self) -> None:
        """Make every bank's plan. Raises PlanError, on all ranks, where a plan cannot be or ranks disagree."""
        plans: dict[str, Present] = {}
        problem = ""
        for name, bank in self.slots.banks.items():
            try:
                found = self.planners[name].plan(bank.history, None, bank.owners, self.topology)
                check_plan(name, found, bank.owners, self.topology)
            except Exception as error:
                if not self.compared:
                    raise
                problem = f"bank {name!r}: {type(error).__name__}: {error}"
                break
            plans[name] = found
        if self.compared:
            self.agree(problem, [digest(plan) for plan in plans.values()])
        for name, plan in plans.items():
            self.slots.banks[name].present = plan

    def agree(self, problem: str, digests: Sequence[int]) -> None:
        """Raise PlanError on every rank where one has a problem, or another plan than the others."""
        found: list[Any] = [None] * self.topology.ranks
        with waiting_for("plans of all ranks", self.slots.group):
            dist.all_gather_object(found, (problem, list(digests)), group=self.slots.group)
        for rank, (theirs, _) in enumerate(found):
            if theirs:
                raise PlanError(f"parallel.experts.plan: the planner failed on rank {rank}: {theirs}")
        for rank, (_, theirs) in enumerate(found):
            for name, mine, first in zip(self.slots.banks, theirs, found[0][1], strict=True):
                if mine != first:
                    raise PlanError(
                        f"parallel.experts.plan: bank {name!r}: ranks 0 and {rank} made different plans; a planner may "
                        "only depend on what it is given, which is the same on every rank"
                    )

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
