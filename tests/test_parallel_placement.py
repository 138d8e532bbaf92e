"""Owner maps, token plans and rounds: laws that hold for any numbers, and cases written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel.placement import (
    OwnerMap,
    Round,
    Topology,
    balanced_owners,
    better_owners,
    digest,
    even_owners,
    no_copies,
    peak,
    rounds,
    token_plan,
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Topology]:
    """Counts, presence and a topology; every expert is somewhere."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    present = rng.random((ranks, experts)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    present[rng.integers(0, ranks, experts), np.arange(experts)] = True
    counts = rng.integers(0, draw(st.sampled_from([1, 4, 30])), (ranks, experts))
    return counts, present, Topology(ranks, draw(st.integers(1, 4)))


@settings(max_examples=300, deadline=None)
@given(layers())
def test_token_plans_keep_every_token_and_stay_near(layer: tuple[np.ndarray, np.ndarray, Topology]) -> None:
    counts, present, topology = layer
    plan = token_plan(counts, present, topology)
    assert (plan >= 0).all()
    assert (plan.sum(2) == counts).all()
    node = topology.nodes()
    for (source, expert, destination), tokens in np.ndenumerate(plan):
        if tokens == 0:
            continue
        assert present[destination, expert]
        if present[source, expert]:
            assert destination == source
        elif (present[:, expert] & (node == node[source])).any():
            assert node[destination] == node[source]
    for source, expert in np.ndindex(*counts.shape):
        shares = plan[source, expert][plan[source, expert] > 0]
        if len(shares) > 1:
            assert shares.max() - shares.min() <= 1


@settings(max_examples=300, deadline=None)
@given(layers(), st.sampled_from([None, 1, 2, 5, 100]))
def test_rounds_deliver_every_row_once_in_order(
    layer: tuple[np.ndarray, np.ndarray, Topology], max_rows: int | None
) -> None:
    """Simulate the exchange: rows carry (source, expert, number), and arrive sorted by expert and source."""
    counts, present, topology = layer
    ranks = topology.ranks
    plan = token_plan(counts, present, topology)
    every = [rounds(plan, present, rank, max_rows) for rank in range(ranks)]
    assert len({len(found) for found in every}) == 1
    rows = [
        [(rank, expert, number) for expert, count in enumerate(counts[rank]) for number in range(count)]
        for rank in range(ranks)
    ]
    arrived: list[list[tuple[int, int, int]]] = [[] for _ in range(ranks)]
    for turn in range(len(every[0])):
        now: list[Round] = [found[turn] for found in every]
        boxes = [[rows[rank][place] for place in found.taken.places()] for rank, found in enumerate(now)]
        for rank, found in enumerate(now):
            if max_rows is not None:
                assert found.receive.sum() <= max_rows
            came = []
            for source, box in enumerate(boxes):
                cuts = np.concatenate([[0], now[source].send.cumsum()])
                part = box[cuts[rank] : cuts[rank + 1]]
                assert len(part) == found.receive[source]
                came += part
            ordered = [came[place] for place in found.sorted.places()]
            assert [expert for _, expert, _ in ordered] == [
                expert
                for expert, count in zip(np.flatnonzero(present[rank]), found.counts, strict=True)
                for _ in range(count)
            ]
            arrived[rank] += ordered
    assert sorted(row for came in arrived for row in came) == sorted(row for mine in rows for row in mine)
    once = [rounds(plan, present, rank, None)[0] for rank in range(ranks)]
    for rank, found in enumerate(once):  # the order of arrival does not depend on the number of rounds
        assert len(arrived[rank]) == found.counts.sum()
        assert arrived[rank] == sorted(arrived[rank], key=lambda row: (row[1], row[0], row[2]))


def test_even_owners_are_even_over_all_banks() -> None:
    owners = even_owners({"a": 5, "b": 5, "c": 2}, 4)
    assert owners.owners["a"] == (0, 0, 1, 2, 3)
    assert owners.owners["b"] == (0, 1, 1, 2, 3)
    assert owners.owners["c"] == (2, 3)
    assert [owners.slots(rank) for rank in range(4)] == [3, 3, 3, 3]
    assert owners.experts("b", 1) == (1, 2)
    assert owners.experts("c", 0) == ()


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1
    ),
    st.integers(0, 99),
)
def test_balanced_owners_keep_memory_even(ranks: int, loads: dict[str, list[int]], seed: int) -> None:
    """Every rank has as many experts of a bank as before; what is better is better in every bank and in all."""
    even = even_owners({bank: len(of) for bank, of in loads.items()}, ranks)
    found = balanced_owners(loads, ranks)
    rng = np.random.default_rng(seed)
    now = OwnerMap(ranks, {bank: tuple(rng.permutation(owners)) for bank, owners in even.owners.items()})
    better = better_owners(loads, now, 0.02)
    for bank, of in loads.items():
        assert sorted(found.owners[bank]) == sorted(better.owners[bank]) == list(even.owners[bank])
        one = {bank: of}
        if better.owners[bank] != now.owners[bank]:
            assert peak(one, better) < peak(one, now) - 0.02
    assert 1 <= peak(loads, better) <= peak(loads, now)
    if all(sum(of) for of in loads.values()):
        assert better_owners(loads, better, 0.02) == better


def test_the_heaviest_experts_are_given_away_first() -> None:
    loads = {"a": [9, 8, 1, 1, 7, 6]}
    owners = balanced_owners(loads, 2)
    assert owners.owners["a"] == (0, 1, 0, 1, 1, 0)  # 9 + 6 + 1 and 8 + 7 + 1
    assert peak(loads, owners) == 1
    assert peak(loads, even_owners({"a": 6}, 2)) == pytest.approx(18 / 16)
    assert balanced_owners({"a": [30, 1, 1, 1]}, 2).owners["a"] == (0, 1, 1, 0)  # room for two
    assert balanced_owners({"a": [5, 5, 5]}, 2).owners["a"] == (0, 1, 0)  # ties by number
    assert peak({"a": [0, 0]}, OwnerMap(2, {"a": (0, 1)})) == 1
    # ranks wait in every bank: two banks that lean to different ranks do not make up for each other
    assert peak({"a": [3, 1], "b": [1, 3]}, OwnerMap(2, {"a": (0, 1), "b": (0, 1)})) == 1.5


def test_little_is_no_reason_to_move() -> None:
    now = OwnerMap(2, {"a": (0, 0, 1, 1), "b": (0, 0, 1, 1)})
    loads = {"a": [100, 99, 100, 101], "b": [9, 9, 1, 1]}
    assert peak({"a": loads["a"]}, now) > peak({"a": loads["a"]}, balanced_owners(loads, 2))
    assert better_owners(loads, now, 0.02).owners == {"a": (0, 0, 1, 1), "b": (0, 1, 0, 1)}


def test_owners_must_be_ranks() -> None:
    with pytest.raises(ValueError, match=r"bank 'a': owners \[2\] are not among ranks 0 to 1"):
        OwnerMap(2, {"a": (0, 2)})


def test_an_expert_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts \[1\] are on no rank"):
        token_plan(np.ones((2, 2), np.int64), np.array([[True, False], [False, False]]), Topology(2, 1))


def test_no_copies_send_tokens_to_owners() -> None:
    owners = (1, 0, 1)
    counts = np.array([[2, 3, 0], [1, 0, 4]])
    plan = token_plan(counts, no_copies(owners, 2), Topology(2, 2))
    assert plan[0].tolist() == [[0, 2], [3, 0], [0, 0]]
    assert plan[1].tolist() == [[0, 1], [0, 0], [0, 4]]


def test_digests_differ_with_values_shapes_and_types() -> None:
    values = [np.zeros(4, np.int64), np.zeros((2, 2), np.int64), np.zeros(4, np.int32), np.ones(4, np.int64)]
    assert len({digest(value) for value in values}) == 4
    assert digest(values[0]) == digest(values[0].copy())
