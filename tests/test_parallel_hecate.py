"""The two algorithms of FSSDP on cases worked out, and laws that hold for any loads."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel.costs import Costs, layer_time
from moesaic.parallel.hecate import (
    Hecate,
    HecateConfig,
    heterogeneous_owners,
    hidden_experts,
    sparse_materialization,
)
from moesaic.parallel.placement import Topology, even_owners, no_copies

FOUR, TWO_NODES = Topology(4, 4), Topology(4, 2)
PRICES = Costs(row=10, copy_near=100, copy_far=100, grad_near=200, grad_far=200)


def ranks_with(present: np.ndarray) -> list[list[int]]:
    """The ranks of each expert."""
    return [np.flatnonzero(column).tolist() for column in present.T]


def test_what_fits_goes_everywhere() -> None:
    alone = no_copies((0, 1, 2, 3), 4)
    found = sparse_materialization(np.array([10, 40, 30, 20]), alone, np.full(4, 2), 2, TWO_NODES)
    assert ranks_with(found) == [[0], [0, 1, 2, 3], [0, 1, 2, 3], [3]]
    assert ranks_with(alone) == [[0], [1], [2], [3]]  # what was given is as it was


def test_where_memory_is_short_seats_go_by_load() -> None:
    """Four seats for loads of 40, 30 and 20: 4 * 40 // 90, then 3 * 30 // 50, then the rest."""
    alone = no_copies((0, 1, 2, 3), 4)
    found = sparse_materialization(np.array([40, 30, 20, 10]), alone, np.full(4, 1), 3, TWO_NODES)
    assert ranks_with(found) == [[0, 2], [1, 3], [0, 1, 2], [3]]


def test_what_cannot_be_used_is_not_copied() -> None:
    alone = no_copies((0, 1, 2, 3), 4)
    found = sparse_materialization(np.array([0, 5, 0, 0]), alone, np.full(4, 4), 3, FOUR)
    assert ranks_with(found) == [[0], [0, 1, 2, 3], [2], [3]]
    assert (sparse_materialization(np.array([9, 5, 1, 1]), alone, np.full(4, 4), 0, FOUR) == alone).all()
    assert (sparse_materialization(np.array([9, 5, 1, 1]), alone, np.full(4, 0), 3, FOUR) == alone).all()


def test_how_many_experts_are_hidden() -> None:
    """What arrives counts: a rank's own copies, and over the link of a node those of all its ranks."""
    prices = replace(PRICES, hidden_forward=1000, hidden_backward=1300)
    assert hidden_experts(prices, FOUR) == 6  # 1300 // 200
    assert hidden_experts(replace(prices, hidden_forward=500), FOUR) == 5
    assert hidden_experts(replace(prices, gathers_backward=1), FOUR) == 4  # 1300 // 300
    assert hidden_experts(prices, TWO_NODES) == 3  # 1300 // 400
    free = replace(prices, copy_near=0, grad_near=0)
    assert hidden_experts(free, FOUR) > 10**6


def test_hecate_plans_from_the_window() -> None:
    history = [np.array([[9, 0], [9, 0]])] + [np.array([[1, 3], [1, 3]])] * 2
    owners, topology = (0, 0), Topology(2, 2)
    two = Hecate(HecateConfig(window=2, overlap=1), PRICES)
    assert ranks_with(two.plan(history, None, owners, topology)) == [[0], [0, 1]]
    three = Hecate(HecateConfig(window=3, overlap=1), PRICES)
    assert ranks_with(three.plan(history, None, owners, topology)) == [[0, 1], [0]]
    assert not two.exact
    assert ranks_with(two.plan([], None, owners, topology)) == [[0], [0]]


def test_calibration_sends_what_pays_and_fits() -> None:
    """The window says expert 0, the layer says expert 1: its copies cost 300 and 600 at its owner."""
    owners, history = (0, 0, 1, 1), [np.array([[9, 1, 1, 1]] * 4)]
    planner = Hecate(HecateConfig(overlap=1, calibrate=True), PRICES)
    assert planner.exact
    planned = planner.plan(history, None, owners, FOUR)
    assert ranks_with(planned) == [[0, 1, 2, 3], [0], [1], [1]]
    much, little = (np.array([[0, rows, 0, 0]] * 4) for rows in (1000, 10))
    after = planner.plan(history, much, owners, FOUR)
    assert ranks_with(after) == [[0, 1, 2, 3], [0, 1, 2, 3], [1], [1]]
    times = [layer_time(much, plan, owners, FOUR, PRICES, planned=planned) for plan in (planned, after)]
    assert times == [40_000 + 300 + 600, 10_000 + 600 + 1200]
    assert (planner.plan(history, little, owners, FOUR) == planned).all()
    full = Hecate(HecateConfig(overlap=1, most_copies=1, calibrate=True), PRICES)
    # rank 0 owns both, so it has room for a copy, but no use for one
    assert ranks_with(full.plan(history, much, owners, FOUR)) == [[0, 1, 2, 3], [0], [1], [1]]


@pytest.mark.parametrize(("field", "value"), [("window", 0), ("overlap", -1), ("most_copies", -2)])
def test_bad_numbers_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: {value} is"):
        HecateConfig(**{field: value})


def test_cold_experts_are_balanced_and_hot_ones_spread() -> None:
    """Worked out by hand: the cold ones of a (5, 4, 1), those of b (3, 2, 2), then both hot ones."""
    loads = {"b": [8, 3, 2, 2], "a": [9, 5, 4, 1]}
    owners = heterogeneous_owners(loads, 1, TWO_NODES)
    assert owners.owners == {"b": (3, 2, 0, 1), "a": (1, 0, 2, 3)}
    assert list(owners.owners) == ["b", "a"]
    assert heterogeneous_owners(dict(reversed(loads.items())), 1, TWO_NODES).owners == owners.owners


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1
    ),
    st.integers(0, 9),
)
def test_heterogeneous_owners_keep_memory_even(
    ranks: int, per_node: int, loads: dict[str, list[int]], hot: int
) -> None:
    found = heterogeneous_owners(loads, hot, Topology(ranks, per_node))
    even = even_owners({bank: len(loads[bank]) for bank in sorted(loads)}, ranks)
    assert [found.slots(rank) for rank in range(ranks)] == [even.slots(rank) for rank in range(ranks)]
    assert {bank: len(of) for bank, of in found.owners.items()} == {
        bank: len(of) for bank, of in loads.items()
    }


def test_the_owners_of_hot_experts_are_on_all_nodes() -> None:
    rng = np.random.default_rng(0)
    topology = Topology(8, 2)
    loads = {f"bank{i}": (rng.random(16) ** 4 * 1000).astype(int).tolist() for i in range(3)}
    owners = heterogeneous_owners(loads, 4, topology)
    for bank, of in loads.items():
        hottest = sorted(range(16), key=lambda expert: -of[expert])[:4]
        where = Counter(owners.owners[bank][expert] // 2 for expert in hottest)
        cold = Counter()
        for expert in set(range(16)) - set(hottest):
            cold[owners.owners[bank][expert] // 2] += of[expert]
        even = Counter()
        for expert in set(range(16)) - set(hottest):
            even[expert // 4] += of[expert]
        assert max(cold.values()) <= max(even.values())
        assert max(where.values()) <= 2
