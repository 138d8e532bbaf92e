"""What a materialisation plan costs: the modelled time of one bank in one step, in integer picoseconds.

Integers only, so that every rank finds the same number whatever its machine. Where a rank's rows are shared evenly, the
model takes the whole part of each share: it may be short of `token_plan` by a row per expert and rank.

Dims: P ranks, E experts of a bank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from moesaic.parallel.compiled import run_compiled
from moesaic.parallel.placement import Counts, Present, Topology, no_copies

LONGEST = 10**14
"""A hundred seconds, the largest price: far from where sums in int64 end."""
UNFIT = np.iinfo(np.int64).max
"""In place of a time, where a plan has more copies on a rank than are allowed."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Prices of what a bank's step is made of, in picoseconds, and how often it happens.

    `dataclasses.asdict` gives a mapping of integers, and `Costs(**mapping)` an equal object.
    """

    row: int
    """One row through one expert, forward and backward."""
    expert: int = 0
    """An expert that has rows, however few, forward and backward, in one micro-batch."""
    row_near: int = 0
    """One row on one of its four trips: what it takes of the port of a rank."""
    row_far: int = 0
    """The same for the link of a node, which its ranks share; only rows that change nodes take it."""
    copy_near: int
    """One expert's weights through the port of a rank."""
    copy_far: int
    """One expert's weights through the link of a node."""
    grad_near: int
    """The gradient of one copy, back through the port of a rank."""
    grad_far: int
    """The gradient of one copy, back through the link of a node."""
    message: int = 0
    """Latency of one message."""
    hidden_forward: int = 0
    """Other work in the forward pass of a micro-batch, behind which copies travel unseen."""
    hidden_backward: int = 0
    """Other work in the backward pass of a micro-batch, behind which copies and gradients travel unseen."""
    gathers_forward: int = 1
    """Times that copies are sent in the forward passes of a step: 1 where they are kept for the step, else once for
    each micro-batch."""
    gathers_backward: int = 0
    """Times that copies are sent in the backward passes of a step: 0 where they are kept until then."""
    reductions: int = 1
    """Times that gradients of copies are returned in a step."""
    micro_batches: int = 1
    """Micro-batches of a step, whose rows are counted together."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= LONGEST:
                raise ValueError(
                    f"{field.name}: {value} is not between 0 and {LONGEST}; give picoseconds, or how often"
                )
        if self.micro_batches == 0:
            raise ValueError("micro_batches: 0 is not positive; a step has at least one")

    def of_one_call(self) -> "Costs":
        """Those of one micro-batch, for plans that are made when its counts are known."""
        return replace(
            self,
            gathers_forward=min(1, self.gathers_forward),
            gathers_backward=min(1, self.gathers_backward),
            reductions=min(1, self.reductions),
            micro_batches=1,
        )

    @lru_cache  # noqa: B019 (as many as there are banks)
    def of_steps(self, steps: int) -> "Costs":
        """Those of several steps together, for counts that were added up: what is paid per row stays as it is."""
        paid = ("expert", "copy_near", "copy_far", "grad_near", "grad_far", "message")
        hidden = ("hidden_forward", "hidden_backward")
        return replace(self, **{name: min(LONGEST, steps * getattr(self, name)) for name in (*paid, *hidden)})


def layer_time(
    counts: Counts,
    present: Present,
    owners: Sequence[int],
    topology: Topology,
    costs: Costs,
    planned: Present | None = None,
) -> int:
    """Picoseconds that a bank adds to a step: the busiest rank's arithmetic, four trips of rows, and what copies and
    their gradients take beyond the work that hides them.

    Rows travel by the rule of `token_plan`. An exchange takes as long as its busiest port or link, and one message for
    each other rank at most. Copies go from the owner to each rank. `planned`: what was sent before the layer's counts
    were known; the other copies are sent in sight. None: all of it. Formula: `T = compute + 4 travel + max(0, gather -
    hidden) + max(0, gradients + second gather - hidden)`.
    """
    home = np.asarray(owners)
    time = int(prefix_times(counts.T, home, present.T[None], topology, costs)[0, -1])
    if planned is None:
        return time
    moved = (present & ~no_copies(home, topology.ranks)).T
    whole, early, late = (
        int(
            _copies(part, home, topology)
            .total()
            .time(costs.copy_near, costs.copy_far, costs.message, topology)[0]
        )
        for part in (moved, moved & planned.T, moved & ~planned.T)
    )
    sight = late + max(0, early - costs.hidden_forward) - max(0, whole - costs.hidden_forward)
    return time + costs.gathers_forward * sight


def prefix_times(
    counts: Int64[np.ndarray, "E P"],
    owners: Int64[np.ndarray, " E"],
    templates: Bool[np.ndarray, "n H P"],
    topology: Topology,
    costs: Costs,
    most_copies: int | None = None,
) -> Int64[np.ndarray, "n H1"]:
    """`layer_time` of many plans at once: entry (i, k) is that of the plan where the first k experts are where
    template i has them, and the others on their owners only. Experts are in the order in which they are to be copied.

    A template has every expert on its owner too, and may end after the first H experts. UNFIT where a rank would have
    more than `most_copies` experts that it does not own.
    """
    number, depth, _ = templates.shape
    times = np.full((number, depth + 1), UNFIT)
    most = len(counts) if most_copies is None else most_copies
    integers = [np.ascontiguousarray(array, np.int64) for array in (counts, owners, as_prices(costs))]
    sizes = (number, depth, len(counts), topology.ranks, topology.ranks_per_node, most)
    if run_compiled("prefix_times", [*integers, np.ascontiguousarray(templates, bool), times], sizes):
        return times
    alone = _load(counts, np.arange(topology.ranks) == owners[:, None], owners, topology, costs)
    for template, found in zip(templates, times, strict=True):
        load = alone.prefixes(_load(counts[:depth], template, owners[:depth], topology, costs))
        fits = load.copies.ranks[0].max(-1) <= most
        found[fits] = _time(load, topology, costs)[fits]
    return times


@lru_cache
def as_prices(costs: Costs) -> Int64[np.ndarray, " prices"]:
    """The fields in order, as compiled kernels read them."""
    return np.array([getattr(costs, field.name) for field in fields(Costs)], np.int64)


class _Traffic(NamedTuple):
    """What arrives and what leaves, for each of K experts, or in total for each of K plans."""

    ranks: Int64[np.ndarray, "2 K P"]
    nodes: Int64[np.ndarray, "2 K N"]
    """What changes nodes."""

    def total(self) -> "_Traffic":
        return _Traffic(*(array.sum(-2, keepdims=True) for array in self))

    def prefixes(self, other: "_Traffic") -> "_Traffic":
        return _Traffic(*map(_prefixes, self, other))

    def time(self, near: int, far: int, message: int, topology: Topology) -> Int64[np.ndarray, " K"]:
        """Of one exchange."""
        rank, node = self.ranks.max((0, 2)), self.nodes.max((0, 2))
        return np.maximum(rank * near, node * far) + message * np.minimum(rank, topology.ranks - 1)


class _Load(NamedTuple):
    """A bank's work and traffic, for each of K experts, or in total for each of K plans."""

    work: Int64[np.ndarray, "K P"]
    rows: _Traffic
    copies: _Traffic

    def prefixes(self, other: "_Load") -> "_Load":
        """The total, with none to all of the first experts as in `other`."""
        work = _prefixes(self.work, other.work)
        return _Load(work, self.rows.prefixes(other.rows), self.copies.prefixes(other.copies))


def _prefixes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    total = ours.sum(-2, keepdims=True)
    replaced = theirs - ours[..., : theirs.shape[-2], :]
    return np.concatenate([total, total + replaced.cumsum(-2)], -2)


def _time(load: _Load, topology: Topology, costs: Costs) -> Int64[np.ndarray, " K"]:
    trip = load.rows.time(costs.row_near, costs.row_far, costs.message * costs.micro_batches, topology)
    gather = load.copies.time(costs.copy_near, costs.copy_far, costs.message, topology)
    back = load.copies.time(costs.grad_near, costs.grad_far, costs.message, topology)
    forward = costs.gathers_forward * np.maximum(0, gather - costs.hidden_forward)
    hidden = max(costs.gathers_backward, costs.reductions) * costs.hidden_backward
    backward = np.maximum(0, costs.gathers_backward * gather + costs.reductions * back - hidden)
    return load.work.max(1) + 4 * trip + forward + backward


def _load(
    counts: Int64[np.ndarray, "E P"],
    there: Bool[np.ndarray, "E P"],
    owners: Int64[np.ndarray, " E"],
    topology: Topology,
    costs: Costs,
) -> _Load:
    """Of each expert."""
    local = counts * there
    seats = _by_node(there, topology)
    away = _by_node(counts - local, topology)
    near = np.where(seats > 0, away // np.maximum(seats, 1), 0)
    leaving = np.where(seats > 0, 0, away)
    far = leaving.sum(1, keepdims=True) // np.maximum(seats.sum(1, keepdims=True), 1)
    guests = there * (near + far)[:, topology.nodes()]
    rows = local + guests
    work = costs.row * rows + costs.expert * costs.micro_batches * (rows > 0)
    traffic = _Traffic(np.stack([guests, counts - local]), np.stack([seats * far, leaving]))
    moved = there & (np.arange(topology.ranks) != owners[:, None])
    return _Load(work, traffic, _copies(moved, owners, topology))


def _copies(moved: Bool[np.ndarray, "E P"], owners: Int64[np.ndarray, " E"], topology: Topology) -> _Traffic:
    """Of each expert, which its owner sends once for each rank."""
    nodes = topology.nodes()
    at_home = np.arange(nodes[-1] + 1) == nodes[owners][:, None]  # (E, N)
    arriving = _by_node(moved, topology) * ~at_home
    given = (np.arange(topology.ranks) == owners[:, None]) * moved.sum(1, keepdims=True)
    leaving = at_home * arriving.sum(1, keepdims=True)
    return _Traffic(np.stack([moved, given]), np.stack([arriving, leaving]))


def _by_node(values: np.ndarray, topology: Topology) -> Int64[np.ndarray, "E N"]:
    return np.add.reduceat(
        values, np.arange(0, topology.ranks, topology.ranks_per_node), axis=1, dtype=np.int64
    )
