"""The cost model against sums over the token plan, worked examples, and its compiled prefixes against plain numpy."""

from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel import compiled, costs, placement
from moesaic.parallel.costs import UNFIT, Costs, layer_time, prefix_times
from moesaic.parallel.placement import Topology, no_copies, token_plan

FREE = Costs(row=0, copy_near=0, copy_far=0, grad_near=0, grad_far=0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, Topology, Costs]:
    """Counts (P, E) that all shares of up to six ranks divide, a plan, owners, a topology, prices."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    owners = rng.integers(0, ranks, experts)
    present = (rng.random((ranks, experts)) < draw(st.sampled_from([0.0, 0.3, 1.0]))) | no_copies(
        tuple(owners.tolist()), ranks
    )
    counts = 60 * rng.integers(0, draw(st.sampled_from([1, 2, 9])), (ranks, experts))
    prices = {field.name: int(rng.integers(0, 30)) for field in fields(Costs)}
    prices |= {"hidden_forward": prices["hidden_forward"] * 9, "micro_batches": prices["micro_batches"] + 1}
    return counts, present, owners, Topology(ranks, draw(st.integers(1, 4))), Costs(**prices)


def by_hand(
    counts: np.ndarray,
    present: np.ndarray,
    owners: np.ndarray,
    topology: Topology,
    c: Costs,
    planned: np.ndarray | None,
) -> int:
    """The formula from who sends what to whom: matrices (source, destination) of rows and of copies."""
    ranks, node = topology.ranks, topology.nodes()
    plan = token_plan(counts, present, topology)
    arriving = plan.sum(0)  # (expert, destination)
    work = [
        sum(c.row * rows + c.expert * c.micro_batches for rows in arriving[:, rank] if rows)
        for rank in range(ranks)
    ]

    def exchange(sent: np.ndarray, near: int, far: int, message: int) -> int:
        sent = sent * ~np.eye(ranks, dtype=bool)
        port = max(sent.sum(0).max(), sent.sum(1).max())
        changes = sent * (node[:, None] != node)
        links = [
            max(changes[node == each].sum(), changes[:, node == each].sum()) for each in range(node.max() + 1)
        ]
        return max(port * near, max(links) * far) + message * min(port, ranks - 1)

    def sent_copies(there: np.ndarray) -> np.ndarray:
        matrix = np.zeros((ranks, ranks), np.int64)
        for rank, expert in zip(*np.nonzero(there), strict=True):
            matrix[owners[expert], rank] += 1
        return matrix

    everything = sent_copies(present)
    early = everything if planned is None else sent_copies(present & planned)
    gather = exchange(early, c.copy_near, c.copy_far, c.message)
    late = exchange(everything - early, c.copy_near, c.copy_far, c.message)
    again = exchange(everything, c.copy_near, c.copy_far, c.message)
    back = exchange(everything, c.grad_near, c.grad_far, c.message)
    return (
        max(work)
        + 4 * exchange(plan.sum(1), c.row_near, c.row_far, c.message * c.micro_batches)
        + c.gathers_forward * (max(0, gather - c.hidden_forward) + late)
        + max(
            0,
            c.reductions * back
            + c.gathers_backward * again
            - c.hidden_backward * max(c.reductions, c.gathers_backward),
        )
    )


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 99))
def test_the_model_equals_sums_over_the_token_plan(problem: Any, seed: int) -> None:
    planned = np.random.default_rng(seed).random(np.shape(problem[1])) < 0.5
    counts, present, owners, topology, prices = problem
    thrice = layer_time(3 * counts, present, owners, topology, prices.of_steps(3))
    assert thrice == 3 * layer_time(*problem)
    assert layer_time(*problem) == by_hand(*problem, planned=None)
    assert layer_time(*problem, planned=planned) == by_hand(*problem, planned=planned)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 99), st.sampled_from([None, 0, 1, 2]))
def test_prefixes_are_plans(problem: Any, seed: int, most: int | None) -> None:
    """Compiled or not: the same integers as one plan at a time, also where shares leave something over."""
    counts, present, owners, topology, prices = problem
    rng = np.random.default_rng(seed)
    counts = counts + rng.integers(0, 7, counts.shape)
    alone = no_copies(owners, topology.ranks)
    templates = np.stack([present, alone | (rng.random(present.shape) < 0.5)])
    depth = rng.integers(0, len(owners) + 1)
    args = (counts.T, owners, templates.transpose(0, 2, 1)[:, :depth], topology, prices, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "run_compiled", lambda *_: False)
        plain = prefix_times(*args)
    np.testing.assert_array_equal(prefix_times(*args), plain)
    assert plain.shape == (2, depth + 1)
    for (template, k), time in np.ndenumerate(plain):
        plan = np.concatenate([templates[template, :, :k], alone[:, k:]], 1)
        if most is not None and (plan & ~alone).sum(1).max() > most:
            assert time == UNFIT
        else:
            assert time == layer_time(counts, plan, owners, topology, prices)


def test_a_layer_worked_out() -> None:
    """Four ranks on two nodes; expert 0 of rank 0 is wanted by all, expert 1 of rank 2 by its owner."""
    topology, owners = Topology(4, 2), (0, 2)
    counts = np.array([[10, 0], [10, 0], [10, 20], [10, 0]])
    alone = no_copies(owners, 4)
    work = replace(FREE, row=3, expert=7, micro_batches=2)
    assert layer_time(counts, alone, owners, topology, work) == 3 * 40 + 14
    rows = replace(FREE, row_near=5, row_far=4)  # rank 0 takes in 30, 20 of them from the other node
    assert layer_time(counts, alone, owners, topology, rows) == 4 * max(30 * 5, 20 * 4)
    rows = replace(rows, row_far=8, message=100)  # from three ranks
    assert layer_time(counts, alone, owners, topology, rows) == 4 * (20 * 8 + 300)

    node = alone.copy()
    node[3, 0] = True  # one copy for the other node
    assert layer_time(counts, node, owners, topology, work) == 3 * 20 + 14  # on ranks 0, 2 and 3
    assert layer_time(counts, node, owners, topology, replace(FREE, row_near=5, row_far=8)) == 4 * 10 * 5
    everywhere = np.ones((4, 2), bool)
    copies = Costs(
        row=0, copy_near=5, copy_far=4, grad_near=50, grad_far=10, hidden_forward=10, hidden_backward=50
    )
    # rank 0 sends three copies and rank 2 too; two of each change nodes
    assert layer_time(counts, everywhere, owners, topology, copies) == (15 - 10) + (150 - 50)
    twice = replace(copies, gathers_forward=2, gathers_backward=2, reductions=2)
    assert layer_time(counts, everywhere, owners, topology, twice) == 2 * 5 + 2 * (150 + 15 - 50)
    assert layer_time(counts, everywhere, owners, topology, copies, planned=node) == (5 * 3 + 0) + 100


def test_costs_are_plain_integers() -> None:
    prices = Costs(**{field.name: place + 1 for place, field in enumerate(fields(Costs))})
    assert Costs(**asdict(prices)) == prices
    once = prices.of_one_call()
    assert (once.gathers_forward, once.gathers_backward, once.reductions, once.micro_batches) == (1, 1, 1, 1)
    assert replace(prices, gathers_backward=0).of_one_call().gathers_backward == 0
    with pytest.raises(ValueError, match="row_far: -1 is not between 0"):
        replace(prices, row_far=-1)
    with pytest.raises(ValueError, match="micro_batches: 0 is not positive"):
        replace(prices, micro_batches=0)


def test_nothing_compiled_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_there", lambda: False)
    assert not compiled.run_compiled("prefix_times", [np.zeros(1)], [1])
    alone = placement.no_copies((0, 0), 1)
    assert prefix_times(
        np.array([[3], [2]]), np.zeros(2, int), alone.T[None], Topology(1, 1), FREE
    ).tolist() == [[0] * 3]
