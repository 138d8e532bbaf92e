"""Sparse collectives for ranks on several nodes: a row crosses to another node once, and gradients leave one as a sum.

A row is cut into as many slices as a node has ranks. The owner hands slice j to its node's rank j, which sends it to
the rank j of every node that wants the expert, so that all of a node's links share the load; there it spreads.
Gradients take the way back and are added up on it: within a node in ascending order of ranks, then over nodes in
ascending order, in fp32 or wider. Ranks of the owner's own node exchange whole rows with it. SparseAllGather and
SparseReduceScatter are those of FSSDP (Qing et al., arXiv:2502.02581, section 3), which leaves the ways of rows open.

Dims: P ranks, E experts of a bank, L length of a row, N nodes, S ranks of a node and so slices of a row. A piece is one
slice of one expert's row, of L / S numbers, rounded up.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import pad

from moesaic.parallel.collectives import Arrived, Rows, Steps, Transfer, Wanted, exchange, uploaded
from moesaic.parallel.placement import Topology
from moesaic.parallel.ranks import waiting_for

Numbers = Int64[np.ndarray, " n"]
Pieces = Bool[np.ndarray, "peers E S"]
"""Pieces by the rank of a group that they go to or come from. Of one rank they travel by expert, then by slice."""


@dataclass(frozen=True)
class Moves:
    """One exchange, as one rank sees it. What it sends to itself is copied."""

    send: Pieces
    receive: Pieces


@dataclass(frozen=True)
class Held:
    """Pieces that a rank has: slice s of expert e is `pieces[where[e, s]]`."""

    pieces: Float[Tensor, "n piece"]
    where: Int64[np.ndarray, "E S"]
    """Anything, for pieces that the rank does not have."""

    def take(self, experts: Numbers, slices: Numbers) -> Float[Tensor, "m piece"]:
        """These pieces, in this order."""
        return picked(self.pieces, self.where[experts, slices])

    def rows(self, experts: Numbers) -> Float[Tensor, "m piece"]:
        """All pieces of these experts, in this order."""
        return picked(self.pieces, self.where[experts].reshape(-1))


class TwoLevel:
    """Rows go from the owner to the ranks of its node, across, and to the ranks of the other node: three exchanges, or
    one where no row leaves its node."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        """Called by all ranks of the run, each with the group whose ranks share one copy of the experts with it."""
        if topology.ranks % topology.ranks_per_node:
            raise ValueError(
                f"parallel.experts.levels: two levels need nodes with equally many ranks, but {topology.ranks} ranks "
                f"share the experts, {topology.ranks_per_node} per node, and the last node has fewer; use `levels: one`"
            )
        self.group, self.topology = group, topology
        self.rank, self.slices = dist.get_rank(group), topology.ranks_per_node
        self.bytes = 0
        self.bytes_across = 0
        """Sent to other nodes so far, which `bytes` includes."""
        self.near, self.across = make_groups(group, self.slices)
        self.groups = (self.near, self.across)
        """The ranks of this node, and the ranks of all nodes that have this one's number in theirs."""

    def all_gather(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        return Transfer("copies of experts", self.group, self._gather(rows, wanted, owners))

    def reduce_scatter(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Transfer:
        """What arrives is fp32 or wider: a row from each rank of this node that wants an expert of this rank, then for
        each of its experts that other nodes want, their sum."""
        return Transfer("gradients of copies", self.group, self._reduce(rows, wanted, owners))

    def _gather(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Steps:
        some, wanted, owners = _asked_for(wanted, owners)
        first, *rest = gather_moves(wanted, owners, self.topology, self.rank)
        cut, length = self._cut(rows, some, first)
        came = yield from self._exchange(self.near, cut, first)
        experts = first.receive.nonzero()[1]
        chosen = experts[wanted[self.rank, experts]][:: self.slices]  # the others only pass through
        if not rest:
            return self._arrived(some[chosen], came, length)
        crossing, last = rest
        passing = Held(came, places(first.receive))
        there = yield from self._exchange(self.across, passing, crossing)
        end = yield from self._exchange(self.near, Held(there, places(crossing.receive)), last)
        far = np.flatnonzero(last.receive.any((0, 2)))
        parts = [passing.rows(chosen), Held(end, places(last.receive)).rows(far)]
        return self._arrived(some[np.concatenate([chosen, far])], torch.cat(parts), length)

    def _reduce(self, rows: Rows, wanted: Wanted, owners: Sequence[int]) -> Steps:
        some, wanted, owners = _asked_for(wanted, owners)
        first, *rest = reduce_moves(wanted, owners, self.topology, self.rank)
        cut, length = self._cut(rows, some, first)
        came = yield from self._exchange(self.near, cut, first)
        experts = first.receive.nonzero()[1]
        own = np.asarray(owners)[experts] == self.rank
        chosen = experts[own][:: self.slices]
        whole = picked(came, np.flatnonzero(own)) if rest else came
        whole = whole.to(torch.promote_types(came.dtype, torch.float32))
        if not rest:
            return self._arrived(some[chosen], whole, length)
        crossing, last = rest
        leaving = added(came, first.receive, ~own)
        there = yield from self._exchange(self.across, leaving, crossing)
        total = added(there, crossing.receive, np.ones(len(there), bool))
        end = yield from self._exchange(self.near, total, last)
        far = np.flatnonzero(last.receive.any((0, 2)))
        parts = [whole, Held(end, places(last.receive)).rows(far)]
        return self._arrived(some[np.concatenate([chosen, far])], torch.cat(parts), length)

    def _cut(self, rows: Rows, some: Numbers, moves: Moves) -> tuple[Held, int]:
        """The rows that a first exchange sends from, cut, and their length."""
        experts = np.flatnonzero(moves.send.any((0, 2)))
        whole = rows(some[experts].tolist())
        length = whole.shape[1]
        piece = -(-length // self.slices)
        if piece * self.slices > length:
            whole = pad(whole, (0, piece * self.slices - length))
        where = np.zeros(moves.send.shape[1:], np.int64)
        where[experts] = np.arange(whole.shape[0] * self.slices).reshape(-1, self.slices)
        return Held(whole.reshape(-1, piece), where), length

    def _arrived(self, experts: Numbers, pieces: Tensor, length: int) -> Arrived:
        """All pieces of these experts, put together without what was padded."""
        rows = pieces.reshape(-1, self.slices * pieces.shape[1])[:, :length]
        return Arrived(experts.tolist(), rows.contiguous())

    def _exchange(
        self, group: dist.ProcessGroup, held: Held, moves: Moves
    ) -> Generator[dist.Work, None, Float[Tensor, "n piece"]]:
        """What arrives, in the order of `moves.receive`."""
        _, experts, slices = moves.send.nonzero()
        leaving = held.take(experts, slices)
        send, receive = moves.send.sum((1, 2)), moves.receive.sum((1, 2))
        out, work = exchange(group, leaving, send.tolist(), receive.tolist())
        others = int(send.sum() - send[dist.get_rank(group)])
        sent = others * leaving.shape[1] * leaving.element_size()
        self.bytes += sent
        self.bytes_across += sent if group is self.across else 0
        yield work
        del leaving  # kept until it has left
        return out


def picked(pieces: Tensor, places: Numbers) -> Tensor:
    """The pieces at these places, in this order."""
    return pieces.index_select(0, *uploaded([places], pieces.device))


def places(pieces: Pieces) -> Int64[np.ndarray, "E S"]:
    """Where each piece lies among those that arrive, which come once each."""
    _, experts, slices = pieces.nonzero()
    where = np.zeros(pieces.shape[1:], np.int64)
    where[experts, slices] = np.arange(len(experts))
    return where


def added(pieces: Float[Tensor, "n piece"], receive: Pieces, chosen: Bool[np.ndarray, " n"]) -> Held:
    """Sums of the chosen ones of the pieces that arrived, over the ranks that they came from, in ascending order, in
    fp32 or wider. Of an expert all are the same slice."""
    sources, experts, _ = receive.nonzero()
    summed, number = np.unique(experts[chosen], return_inverse=True)
    target = np.zeros(len(experts), np.int64)
    target[chosen] = number
    wide = torch.promote_types(pieces.dtype, torch.float32)
    sums = pieces.new_zeros(len(summed), pieces.shape[1], dtype=wide)
    for source in np.unique(sources[chosen]):
        taken = np.flatnonzero(chosen & (sources == source))
        to, of = uploaded([target[taken], taken], pieces.device)
        sums.index_add_(0, to, pieces.index_select(0, of).to(wide))  # every row of `sums` once: no race
    where = np.zeros(receive.shape[1:], np.int64)
    where[summed] = np.arange(len(summed))[:, None]
    return Held(sums, where)


def _asked_for(wanted: Wanted, owners: Sequence[int]) -> tuple[Numbers, Wanted, list[int]]:
    """The experts that anybody wants, few as a rule, and what is known of them: planning takes time for all it sees."""
    some = np.flatnonzero(wanted.any(0))
    return some, wanted[:, some], np.asarray(owners)[some].tolist()


class _Layout:
    """What the exchanges of one rank follow from."""

    def __init__(self, wanted: Wanted, owners: Sequence[int], topology: Topology, rank: int) -> None:
        size = topology.ranks_per_node
        self.node, self.number = divmod(rank, size)
        self.slices = np.arange(size)
        self.nodes = np.arange(topology.ranks // size)
        owner = np.asarray(owners, np.int64)
        self.owner_node, self.owner_number = topology.nodes()[owner], owner % size  # (E,)
        by_node = wanted.reshape(len(self.nodes), size, -1)
        self.wanted = by_node[self.node]  # (S, E), by the ranks of this node
        self.here = self.owner_node == self.node  # (E,)
        self.crosses = by_node.any(1) & (
            self.owner_node != self.nodes[:, None]
        )  # (N, E), to that node or from it
        self.leaves = self.here & self.crosses.any(0)  # (E,), this node's experts that others want

    def owned_by(self, numbers: Numbers) -> Bool[np.ndarray, "m E"]:
        """Experts of these ranks of the node."""
        return self.here & (self.owner_number == numbers[:, None])

    def slice_of(self, numbers: Numbers) -> Bool[np.ndarray, "m 1 S"]:
        """The slice that passes through each of these ranks of the node."""
        return self.slices == numbers[:, None, None]


def gather_moves(wanted: Wanted, owners: Sequence[int], topology: Topology, rank: int) -> list[Moves]:
    """The exchanges of one rank that bring copies: within its node, across, within. All ranks find equally many, one
    where nothing crosses."""
    at = _Layout(wanted, owners, topology, rank)

    def spread(sources: Numbers, targets: Numbers) -> Pieces:
        slices = at.leaves[:, None] & at.slice_of(targets)
        return at.owned_by(sources)[..., None] & (slices | at.wanted[targets][..., None])

    def cross(sources: Numbers, targets: Numbers) -> Pieces:
        experts = at.crosses[targets] & (at.owner_node == sources[:, None])
        return experts[..., None] & at.slice_of(np.array([at.number]))

    def fill(sources: Numbers, targets: Numbers) -> Pieces:
        return (at.wanted[targets] & ~at.here)[..., None] & at.slice_of(sources)

    first = _moves(spread, at.number, at.slices)
    if not at.crosses.any():
        return [first]
    return [first, _moves(cross, at.node, at.nodes), _moves(fill, at.number, at.slices)]


def reduce_moves(wanted: Wanted, owners: Sequence[int], topology: Topology, rank: int) -> list[Moves]:
    """The exchanges of one rank that bring gradients back: within its node, across, within. All ranks find equally
    many, one where nothing crosses."""
    at = _Layout(wanted, owners, topology, rank)

    def collect(sources: Numbers, targets: Numbers) -> Pieces:
        slices = ~at.here[:, None] & at.slice_of(targets)
        return at.wanted[sources][..., None] & (slices | at.owned_by(targets)[..., None])

    def cross(sources: Numbers, targets: Numbers) -> Pieces:
        experts = at.crosses[sources] & (at.owner_node == targets[:, None])
        return experts[..., None] & at.slice_of(np.array([at.number]))

    def hand_over(sources: Numbers, targets: Numbers) -> Pieces:
        return (at.leaves & at.owned_by(targets))[..., None] & at.slice_of(sources)

    first = _moves(collect, at.number, at.slices)
    if not at.crosses.any():
        return [first]
    return [first, _moves(cross, at.node, at.nodes), _moves(hand_over, at.number, at.slices)]


def _moves(rule: Callable[[Numbers, Numbers], Pieces], me: int, peers: Numbers) -> Moves:
    """Both sides of an exchange, from a rule that says what sources send to targets; one of either is this rank."""
    return Moves(rule(np.array([me]), peers), rule(peers, np.array([me])))


def make_groups(group: dist.ProcessGroup, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of this rank: of its node, `size` consecutive ranks of `group`, and of its number in the nodes."""
    replicas: list[Any] = [None] * dist.get_world_size()
    found = []
    with waiting_for("groups of ranks within and across nodes"):
        dist.all_gather_object(replicas, dist.get_process_group_ranks(group))
        # a group must be made by all ranks of the run, its members or not, in one order
        for ranks in sorted({tuple(replica) for replica in replicas}):
            nodes = np.array(ranks).reshape(-1, size)
            for members in [*nodes.tolist(), *nodes.T.tolist()]:
                made = dist.new_group(members)
                if dist.get_rank() in members:
                    found.append(made)
    near, across = found
    return near, across
