"""Materialisation plans: what a planner is, and what a plan must be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moesaic.parallel.placement import Counts, Present, Topology, no_copies


class PlanError(RuntimeError):
    """A plan that cannot be, or that differs between ranks."""


class Planner(Protocol):
    """Decides which ranks get copies of which experts of a bank."""

    exact: bool

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present: ...


def check_plan(present: Present, owners: tuple[int, ...], topology: Topology, bank: str) -> None:
    """Raise PlanError."""
    if not present[no_copies(owners, topology.ranks)].all():
        raise PlanError(bank)


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """No copies."""

    kind: Literal["expert_parallel"] = "expert_parallel"


PlanConfig = ExpertParallel
