"""Where experts live and where tokens go: pure functions of integers, computed alike on every rank.

An owner map says which rank holds an expert's weights from step to step. A materialisation plan says on which ranks an
expert is there for one step: on its owner, and wherever a copy was sent. A token plan follows from both, and from how
many tokens each rank has for each expert. Nothing here communicates.

Dims: P ranks, E experts of a bank.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

Counts = Int64[np.ndarray, "P E"]
"""Tokens that each rank has for each expert."""
Present = Bool[np.ndarray, "P E"]
"""A materialisation plan: which experts are on which ranks for one step."""


@dataclass(frozen=True)
class Topology:
    """Ranks and the nodes that they share."""

    ranks: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1:
            raise ValueError(f"{self.ranks} ranks on nodes of {self.ranks_per_node}: both must be positive")

    def nodes(self) -> Int64[np.ndarray, " P"]:
        """The node of each rank."""
        return np.arange(self.ranks) // self.ranks_per_node


@dataclass(frozen=True)
class OwnerMap:
    """The owner of every expert of every bank. A rank keeps the experts of a bank in ascending order."""

    ranks: int
    owners: Mapping[str, tuple[int, ...]]
    """Bank -> owner of each of its experts."""

    def __post_init__(self) -> None:
        for bank, owners in self.owners.items():
            wrong = sorted({owner for owner in owners if not 0 <= owner < self.ranks})
            if wrong:
                raise ValueError(f"bank {bank!r}: owners {wrong} are not among ranks 0 to {self.ranks - 1}")

    def experts(self, bank: str, rank: int) -> tuple[int, ...]:
        """What a rank owns of a bank, ascending."""
        return tuple(expert for expert, owner in enumerate(self.owners[bank]) if owner == rank)

    def slots(self, rank: int) -> int:
        """Experts that a rank owns, over all banks."""
        return sum(owner == rank for owners in self.owners.values() for owner in owners)


def even_owners(experts: Mapping[str, int], ranks: int) -> OwnerMap:
    """Contiguous runs of each bank, as even as numbers allow; what is left over goes to each rank in turn over the
    banks, so that in total no rank owns more than one expert above another."""
    owners, turn = {}, 0
    for bank, count in experts.items():
        each, left = divmod(count, ranks)
        sizes = [each] * ranks
        for extra in range(left):
            sizes[(turn + extra) % ranks] += 1
        turn = (turn + left) % ranks
        owners[bank] = tuple(rank for rank, size in enumerate(sizes) for _ in range(size))
    return OwnerMap(ranks, owners)


def balanced_owners(loads: Mapping[str, Sequence[int]], ranks: int) -> OwnerMap:
    """Owners that share each bank's load: the heaviest expert first, to the least loaded rank that has room.

    `loads` are rows per expert, by bank. Every rank has as many experts of a bank as `even_owners` gives it, so memory
    is as even; the first number breaks ties. Source: longest processing time first (Graham, 1969), with room.
    """
    even = even_owners({bank: len(of) for bank, of in loads.items()}, ranks)
    owners = {}
    for bank, of in loads.items():
        room = Counter(even.owners[bank])
        chosen = [0] * len(of)
        least = [(0, rank) for rank in sorted(room)]  # a heap of (load so far, rank)
        for expert in sorted(range(len(of)), key=lambda expert: (-of[expert], expert)):
            load, rank = heapq.heappop(least)
            chosen[expert] = rank
            room[rank] -= 1
            if room[rank]:
                heapq.heappush(least, (load + of[expert], rank))
        owners[bank] = tuple(chosen)
    return OwnerMap(ranks, owners)


def better_owners(loads: Mapping[str, Sequence[int]], now: OwnerMap, margin: float) -> OwnerMap:
    """`balanced_owners` for the banks that it brings nearer to balance by more than `margin` (see `peak`), and the
    present owners for the others."""
    wanted = balanced_owners(loads, now.ranks)
    owners = {}
    for bank, of in loads.items():
        new, old = wanted.owners[bank], now.owners[bank]
        one = {bank: of}
        gain = peak(one, now) - peak(one, wanted)
        owners[bank] = new if gain > margin else old
    return OwnerMap(now.ranks, owners)


def peak(loads: Mapping[str, Sequence[int]], owners: OwnerMap) -> float:
    """Rows of the busiest rank over those of the mean rank. Ranks wait for each other in every bank, so both are summed
    over the banks; 1 is balance."""
    busiest = total = 0
    for bank, of in loads.items():
        rows = [0] * owners.ranks
        for owner, load in zip(owners.owners[bank], of, strict=True):
            rows[owner] += load
        busiest += max(rows)
        total += sum(rows)
    return busiest * owners.ranks / total if total else 1.0


def no_copies(owners: Sequence[int] | Int64[np.ndarray, " E"], ranks: int) -> Bool[np.ndarray, "P E"]:
    """The materialisation plan of expert parallelism: every expert on its owner only."""
    return np.arange(ranks)[:, None] == np.asarray(owners)


def token_plan(
    counts: Counts, present: Bool[np.ndarray, "P E"], topology: Topology
) -> Int64[np.ndarray, "P E P"]:
    """How many of a rank's tokens for an expert go to which rank: (source, expert, destination).

    An expert that is present on the source serves all of the source's tokens; else those of the same node share them
    evenly; else all that have it. What does not divide goes to one rank each; the source's number picks the first.
    """
    ranks = len(counts)
    node = topology.nodes()
    near = (node[:, None] == node)[:, :, None] & present  # (source, destination, expert)
    able = np.where(near.any(1, keepdims=True), near, present)
    own = np.eye(ranks, dtype=bool)[:, :, None] & present
    able = np.where(own.any(1, keepdims=True), own, able)
    sharing = able.sum(1)  # (source, expert)
    if (sharing == 0).any():
        raise ValueError(f"experts {np.flatnonzero(~present.any(0)).tolist()} are on no rank")
    each, left = np.divmod(counts, sharing)
    place = np.cumsum(able, axis=1) - 1  # of a destination among those that share
    turned = (place - np.arange(ranks)[:, None, None]) % sharing[:, None, :]
    plan = np.where(able, each[:, None, :] + (turned < left[:, None, :]), 0)
    return np.ascontiguousarray(plan.transpose(0, 2, 1))


@dataclass(frozen=True)
class Runs:
    """Consecutive places: run i covers `first[i]` to `first[i] + length[i] - 1`. Runs without places are left out."""

    first: Int64[np.ndarray, " n"]
    length: Int64[np.ndarray, " n"]

    def places(self) -> Int64[np.ndarray, " total"]:
        """All places, run by run."""
        ends = self.length.cumsum()
        return np.repeat(self.first - ends + self.length, self.length) + np.arange(
            ends[-1] if len(ends) else 0
        )


@dataclass(frozen=True)
class Round:
    """One exchange of a layer's rows, as one rank sees it."""

    send: Int64[np.ndarray, " P"]
    """Rows to each rank."""
    receive: Int64[np.ndarray, " P"]
    """Rows from each rank."""
    taken: Runs
    """Places in the rank's own rows (sorted by expert), in the order in which they are sent."""
    sorted: Runs
    """Places in what arrives, in the order of its experts, and of an expert, of its sources."""
    counts: Int64[np.ndarray, " M"]
    """Rows of each expert that is present on the rank, ascending."""


def rounds(
    plan: Int64[np.ndarray, "P E P"], present: Bool[np.ndarray, "P E"], rank: int, max_rows: int | None
) -> list[Round]:
    """The exchanges of a layer; all ranks find equally many.

    No rank receives more than `max_rows` in one. A destination's rows are numbered by expert, then by source, and cut
    there: an expert's rows come in one order, however many rounds there are.
    """
    arrivals = plan.sum((0, 1))  # at each rank
    most = int(arrivals.max(initial=0))
    number = 1 if max_rows is None else max(1, -(-most // max_rows))
    size = most if max_rows is None else max_rows
    lengths = plan.transpose(2, 1, 0)  # (destination, expert, source)
    ends = lengths.reshape(lengths.shape[0], -1).cumsum(1).reshape(lengths.shape)
    starts = ends - lengths
    # where the run for a destination begins among a source's own rows, which are sorted by expert
    mine = plan[rank]  # (expert, destination)
    own = mine.reshape(-1).cumsum().reshape(mine.shape) - mine
    found = []
    here = np.flatnonzero(present[rank])
    for index in range(number):
        low, high = index * size, (index + 1) * size
        part = np.clip(np.minimum(ends, high) - np.maximum(starts, low), 0, None)
        skipped = np.clip(low - starts, 0, lengths)
        sent = part[:, :, rank]  # (destination, expert)
        arriving = part[rank]  # (expert, source)
        # what arrives lies source by source, and of a source expert by expert
        offsets = arriving.T.reshape(-1).cumsum().reshape(arriving.T.shape).T - arriving
        found.append(
            Round(
                send=sent.sum(1),
                receive=arriving.sum(0),
                taken=_runs((own.T + skipped[:, :, rank]), sent),
                sorted=_runs(offsets, arriving),
                counts=arriving.sum(1)[here],
            )
        )
    return found


def _runs(first: np.ndarray, length: np.ndarray) -> Runs:
    kept = length.reshape(-1) > 0
    return Runs(first.reshape(-1)[kept], length.reshape(-1)[kept])


def digest(*values: Any) -> int:
    """A number that differs where plans do, to compare over ranks."""
    hashed = hashlib.sha256()
    for value in values:
        array = np.ascontiguousarray(value)
        hashed.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return int.from_bytes(hashed.digest()[:7], "big")
