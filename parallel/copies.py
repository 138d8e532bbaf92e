"""What planners share: recent loads, the order of experts, and seats for copies.

Dims: P ranks, E experts of a bank.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

from moesaic.parallel.compiled import run_compiled
from moesaic.parallel.placement import Counts, Topology


def recent(history: Sequence[Counts], window: int) -> Counts:
    """What the last steps counted, `window` of them at most, added up. `history` is not empty."""
    total = history[-1].copy()
    for counts in history[-window:-1]:
        total += counts
    return total


def hottest_first(loads: Int64[np.ndarray, " E"]) -> Int64[np.ndarray, " E"]:
    """Experts by load, the highest first; of equal ones, the lower id."""
    return np.argsort(-loads, kind="stable")


def spread(
    present: Bool[np.ndarray, "E P"],
    seats: Int64[np.ndarray, " E"],
    weights: Int64[np.ndarray, " E"],
    spare: Int64[np.ndarray, " P"],
    room: Int64[np.ndarray, " P"],
    topology: Topology,
) -> Bool[np.ndarray, "E P"]:
    """Where `seats` more copies of each expert go, expert by expert, besides where they are.

    Each goes to a node that lacks the expert, if there is one; of several, to the one with most to spare, then to its
    rank with most to spare, then to the lower id. A copy takes the expert's weight from what a rank has to spare, and 1
    from its room; a rank without room gets none. Where no rank is left, seats stay empty.
    """
    present = np.array(present, bool, order="C")
    spare, room = np.array(spare, np.int64), np.array(room, np.int64)
    sizes = (*present.shape, topology.ranks_per_node)
    integers = [np.ascontiguousarray(array, np.int64) for array in (seats, weights)]
    if run_compiled("spread_copies", [present, *integers, spare, room], sizes):
        return present
    starts = np.arange(0, topology.ranks, topology.ranks_per_node)
    ends = np.minimum(starts + topology.ranks_per_node, topology.ranks)
    of_node = np.add.reduceat(spare, starts)
    lowest = np.iinfo(np.int64).min
    for there, wanted, weight in zip(present, seats, weights, strict=True):
        able = ~there & (room > 0)
        for _ in range(wanted):
            open_nodes = np.logical_or.reduceat(able, starts)
            if not open_nodes.any():
                break
            lacking = open_nodes & ~np.logical_or.reduceat(there, starts)
            node = np.where(lacking if lacking.any() else open_nodes, of_node, lowest).argmax()
            here = slice(starts[node], ends[node])
            rank = starts[node] + np.where(able[here], spare[here], lowest).argmax()
            there[rank], able[rank] = True, False
            spare[rank] -= weight
            of_node[node] -= weight
            room[rank] -= 1
    return present
