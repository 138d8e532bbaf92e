"""Planners: which ranks get copies of which experts, for a bank and a step.

A planner is a pure function of integers: every rank calls it with the same ones and gets the same plan. Between no
copies (expert parallelism) and copies everywhere (as in FSDP) lies everything else. Configs stand beside the planners
that they build.

Dims: P ranks, E experts of a bank.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from moesaic.parallel.auto import Auto, AutoConfig
from moesaic.parallel.costs import Costs
from moesaic.parallel.fastermoe import FasterMoE, FasterMoEConfig
from moesaic.parallel.hecate import Hecate, HecateConfig
from moesaic.parallel.placement import Counts, Present, Topology, no_copies


class PlanError(ValueError):
    """A plan that cannot be carried out."""


@runtime_checkable
class Planner(Protocol):
    """Plans one bank."""

    @property
    def exact(self) -> bool:
        """Whether it is asked a second time within the layer, when that layer's counts are known."""
        ...

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        """Which experts are where: on their owners at least.

        `history`: counts of the last steps, oldest first; empty in the first step. `exact`: None before the step;
        then, only where the planner is exact, what the layer counted in this micro-batch. What is returned then joins
        what was planned before the step, and the copies that are new are sent at once.
        """
        ...


@runtime_checkable
class RememberingPlanner(Planner, Protocol):
    """A planner whose plans depend on what it planned before: checkpoints keep that, so that runs continue bit for
    bit."""

    def state(self) -> dict[str, Any]:
        """What it remembers, for JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExpertParallelConfig:
    """No copies: every expert is on its owner only."""

    kind: Literal["expert_parallel"] = "expert_parallel"


class ExpertParallel:
    """Tokens travel, and no weights."""

    exact = False

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        return no_copies(owners, topology.ranks)


@dataclass(frozen=True, kw_only=True)
class ReplicateAllConfig:
    """Copies of every expert on every rank: no token travels, as in FSDP."""

    kind: Literal["replicate_all"] = "replicate_all"


class ReplicateAll:
    """Weights travel, and no tokens."""

    exact = False

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        return np.ones((topology.ranks, len(owners)), bool)


@dataclass(frozen=True, kw_only=True)
class CustomPlanConfig:
    """A planner of your own."""

    kind: Literal["custom"] = "custom"
    planner: str
    """`package.module:Class`, built as `Class(costs=costs, **options)` for each bank; see `Planner`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the class."""


PlanConfig = (
    ExpertParallelConfig | ReplicateAllConfig | HecateConfig | FasterMoEConfig | AutoConfig | CustomPlanConfig
)


def build_planner(config: PlanConfig, costs: Costs) -> Planner:
    """The planner of one bank. Raises ValueError, naming the field, for a custom planner that cannot be built."""
    match config:
        case ExpertParallelConfig():
            return ExpertParallel()
        case ReplicateAllConfig():
            return ReplicateAll()
        case HecateConfig():
            return Hecate(config, costs)
        case FasterMoEConfig():
            return FasterMoE(config, costs)
        case AutoConfig():
            return Auto(config, costs)
        case CustomPlanConfig():
            return _custom(config, costs)


def _custom(config: CustomPlanConfig, costs: Costs) -> Planner:
    module, _, name = config.planner.partition(":")
    if not module or not name:
        raise ValueError(f"planner: {config.planner!r} is not package.module:Class")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"planner: {config.planner!r} cannot be imported ({error}); is it on PYTHONPATH, or installed?"
        ) from error
    except AttributeError:
        raise ValueError(f"planner: module {module!r} has no {name!r}; give one of its classes") from None
    try:
        planner = found(costs=costs, **config.options)
    except TypeError as error:
        raise ValueError(
            f"options: {config.planner} does not take {config.options} and costs: {error}"
        ) from error
    for wanted in ("exact", "plan"):
        if not hasattr(planner, wanted):
            raise ValueError(
                f"planner: {config.planner!r} has no {wanted!r}; see moesaic.parallel.plans.Planner"
            )
    return planner


def check_plan(bank: str, present: Present, owners: Sequence[int], topology: Topology) -> None:
    """Raise PlanError unless `present` is a bool array (P, E) with every expert on its owner."""
    check_form(bank, present, owners, topology)
    lost = np.flatnonzero(~present[list(owners), range(len(owners))])
    if len(lost):
        expert = int(lost[0])
        raise PlanError(
            f"bank {bank!r}: expert {expert} is not on its owner, rank {owners[expert]}; a plan may only add copies"
        )


def check_form(bank: str, present: Present, owners: Sequence[int], topology: Topology) -> None:
    """Raise PlanError unless `present` is a bool array (P, E)."""
    shape = (topology.ranks, len(owners))
    if not isinstance(present, np.ndarray) or present.shape != shape or present.dtype != bool:
        what = (
            f"{present.dtype} {present.shape}" if isinstance(present, np.ndarray) else type(present).__name__
        )
        raise PlanError(
            f"bank {bank!r}: a plan is a numpy array of bool {shape} (ranks, experts), not {what}"
        )
