"""Seats for copies: the compiled loop against the plain one, and a case written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel import copies
from moesaic.parallel.copies import hottest_first, recent, spread
from moesaic.parallel.placement import Topology, no_copies


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_seats_are_taken_alike_and_within_room(ranks: int, experts: int, per_node: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    alone = no_copies(tuple(rng.integers(0, ranks, experts)), ranks).T
    seats, weights = rng.integers(0, ranks + 2, experts), rng.integers(0, 5, experts)
    spare, room = rng.integers(-5, 5, ranks), rng.integers(0, 4, ranks)
    before = [array.copy() for array in (alone, seats, weights, spare, room)]
    found = spread(alone, seats, weights, spare, room, Topology(ranks, per_node))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "run_compiled", lambda *_: False)
        plain = spread(alone, seats, weights, spare, room, Topology(ranks, per_node))
    np.testing.assert_array_equal(found, plain)
    for array, was in zip((alone, seats, weights, spare, room), before, strict=True):
        np.testing.assert_array_equal(array, was)
    added = found & ~alone
    assert (found >= alone).all()
    assert (added.sum(0) <= room).all()
    assert (added.sum(1) <= seats).all()
    # a seat stays empty only where every rank has the expert or no room
    open_ranks = ~found & (added.sum(0) < room)
    assert not (open_ranks.any(1) & (added.sum(1) < seats)).any()


def test_nodes_that_lack_an_expert_come_first() -> None:
    topology = Topology(6, 2)
    alone = np.zeros((2, 6), bool)
    alone[:, 0] = True
    room = np.full(6, 2)
    found = spread(alone, np.array([1, 3]), np.array([1, 1]), np.full(6, 2), room, topology)
    assert np.flatnonzero(found[0]).tolist() == [0, 2]  # of equal nodes and ranks, the lowest
    # node 2 has more to spare than node 1, whose other rank is next; then node 0 again, although it has the expert
    assert np.flatnonzero(found[1]).tolist() == [0, 1, 3, 4]


def test_recent_counts_and_the_order_of_experts() -> None:
    history = [np.full((1, 2), value) for value in (1, 2, 4)]
    assert recent(history, 2).tolist() == [[6, 6]]
    assert recent(history, 9).tolist() == [[7, 7]]
    assert recent(history, 1).tolist() == [[4, 4]]
    assert history[-1].tolist() == [[4, 4]]
    assert hottest_first(np.array([3, 9, 3, 0])).tolist() == [1, 0, 2, 3]
