"""Rules: what changes the model between optimizer steps without a gradient.

A rule is called once after every optimizer step with the step's reduced counts, which are the same on all ranks. What
it remembers lies in tensors of the model, which are checkpointed, or is told by `state` (see `Remembering`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter, balanced_bias
from moesaic.parallel.banks import OwnedBank
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.costs import Costs
from moesaic.parallel.hecate import heterogeneous_owners
from moesaic.parallel.placement import OwnerMap, better_owners, peak
from moesaic.parallel.plans import ReplicateAllConfig
from moesaic.parallel.replan import Replan
from moesaic.parallel.reshard import reshard
from moesaic.parallel.slots import slots_of

MARGIN = 0.02
"""By how much the busiest rank's rows, over the mean, must fall for the experts of a bank to move."""


@dataclass(frozen=True)
class StepState:
    """What rules may look at after a step."""

    step: int
    counts: Mapping[int, Int[Tensor, " E"]]
    """Assignments per expert over the global batch, by layer: original forward pass of training tokens only."""


Rule = Callable[[Transformer, StepState], dict[str, float]]
"""Changes the model in place; returns metrics."""


@runtime_checkable
class Remembering(Protocol):
    """A rule that remembers something from step to step."""

    name: str
    """Under which a checkpoint has it."""

    def state(self, model: Transformer) -> dict[str, Any]:
        """What to remember, as JSON."""
        ...

    def restore(self, model: Transformer, state: Mapping[str, Any]) -> None:
        """Continue from there, on any layout; collective."""
        ...


@torch.no_grad()
def balance_bias(model: Transformer, state: StepState) -> dict[str, float]:
    """Step every router's selection bias towards equal load (arXiv:2408.15664, algorithm 1)."""
    largest: list[Tensor] = []
    for layer, counts in state.counts.items():
        router = sparse_layer(model, layer).router
        if not isinstance(router, TopKRouter):
            continue
        router.bias.copy_(balanced_bias(router.bias, counts, router.config.bias_rate))
        largest.append(router.bias.abs().max())
    return {"router/largest_bias": torch.stack(largest).max().item() if largest else 0.0}


@dataclass
class Rebalance:
    """Gives experts new owners every so many steps, by the rows that they had since.

    Layers that share a bank add their rows. With `balanced` owners a bank's experts move only where that brings the
    busiest rank nearer to the mean by more than `MARGIN`. Weights and optimizer state go along, so no value depends on
    who owns what.
    """

    every: int
    """Steps between moves."""
    optimizer: torch.optim.Optimizer
    owners: Literal["balanced", "heterogeneous"] = "balanced"
    """See `OwnedExperts`."""
    rows: dict[str, Int[Tensor, " E"]] = field(default_factory=dict)
    """By bank, since the last time."""
    last: dict[str, float] = field(default_factory=dict)
    """Metrics of the last time."""
    name: str = "rebalance"

    def __call__(self, model: Transformer, state: StepState) -> dict[str, float]:
        for layer, counts in state.counts.items():
            source = sparse_layer(model, layer).experts.source
            assert isinstance(source, OwnedBank)
            self.rows[source.name] = self.rows[source.name] + counts if source.name in self.rows else counts
        if (state.step + 1) % self.every == 0:
            self.last = self.move(model)
            self.rows = {}
        return self.last

    def move(self, model: Transformer) -> dict[str, float]:
        """Find owners for the rows so far, and move what is worth it."""
        slots = slots_of(model)
        assert slots is not None
        old = slots.owners
        loads = {bank: self.rows[bank].tolist() for bank in old.owners}
        if self.owners == "balanced":
            new = better_owners(loads, old, MARGIN)
        else:
            copied = [int((bank.present & ~bank.alone).any(0).sum()) for bank in slots.banks.values()]
            new = heterogeneous_owners(loads, round(sum(copied) / len(copied)), slots.topology)
        moved = reshard(model, self.optimizer, new)
        return {
            "owners/moved": float(moved),
            "owners/peak_before": peak(loads, old),
            "owners/peak_after": peak(loads, new),
        }

    def state(self, model: Transformer) -> dict[str, Any]:
        slots = slots_of(model)
        assert slots is not None
        return {
            "ranks": slots.owners.ranks,
            "owners": {bank: list(owners) for bank, owners in slots.owners.owners.items()},
            "rows": {bank: rows.tolist() for bank, rows in self.rows.items()},
            "last": self.last,
        }

    def restore(self, model: Transformer, state: Mapping[str, Any]) -> None:
        """On another number of ranks experts stay where they are."""
        slots = slots_of(model)
        assert slots is not None
        device = model.embedding.device
        self.rows = {bank: torch.tensor(rows, device=device) for bank, rows in state["rows"].items()}
        self.last = dict(state["last"])
        if state["ranks"] == slots.owners.ranks:
            owners = {bank: tuple(state["owners"][bank]) for bank in slots.owners.owners}
            reshard(model, self.optimizer, OwnerMap(slots.owners.ranks, owners))


@dataclass
class PlanCopies:
    """Plans anew, after every step, which ranks get copies of which experts."""

    replan: Replan
    name: str = "plan"

    def __call__(self, model: Transformer, state: StepState) -> dict[str, float]:
        return self.replan.step()

    def state(self, model: Transformer) -> dict[str, Any]:
        return self.replan.state()

    def restore(self, model: Transformer, state: Mapping[str, Any]) -> None:
        self.replan.restore(state)


def rules_of(
    model: Transformer,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    owned: OwnedExperts | None = None,
    replan: Replan | None = None,
) -> list[Rule]:
    """The rules that the configuration asks for: the model's, and with an optimizer those that move its state.

    `owned` says how experts are owned; where the model's have no owners, nothing moves. `replan`: what plans copies,
    after experts have moved.
    """
    sparse = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    rules: list[Rule] = []
    routers = [ffn.router for ffn in sparse]
    if any(isinstance(router, TopKRouter) and router.config.bias_rate > 0 for router in routers):
        rules.append(balance_bias)
    if owned is not None and owned.rebalance and optimizer is not None and slots_of(model) is not None:
        rules.append(Rebalance(owned.rebalance, optimizer, owned.owners))
    if replan is not None:
        rules.append(PlanCopies(replan))
    return rules


def states_of(rules: Iterable[Rule], model: Transformer) -> dict[str, Any]:
    """What the rules remember, by their names; JSON."""
    return {rule.name: rule.state(model) for rule in rules if isinstance(rule, Remembering)}


def measured_costs(rules: Iterable[Rule]) -> Mapping[str, Costs]:
    """Prices by bank that were measured for planners; none where they are given, or where no planner asks for them."""
    for rule in rules:
        if isinstance(rule, PlanCopies) and rule.replan.owned.costs is None:
            asked = not isinstance(rule.replan.owned.plan, ReplicateAllConfig)
            return rule.replan.costs if asked else {}
    return {}


def restore_rules(rules: Iterable[Rule], model: Transformer, states: Mapping[str, Any]) -> None:
    """Have rules continue from what `states_of` told; collective. A rule that was not there before begins anew."""
    for rule in rules:
        if isinstance(rule, Remembering) and rule.name in states:
            rule.restore(model, states[rule.name])


def sparse_layer(model: Transformer, layer: int) -> MoE:
    """The MoE of a layer."""
    ffn = model.blocks[layer].ffn
    assert isinstance(ffn, MoE)
    return ffn
