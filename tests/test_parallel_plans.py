"""Planners: laws that hold for all of them, that the search is the best of them, and the errors of custom ones."""

import json
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel import auto, copies, costs
from moesaic.parallel.auto import Auto, AutoConfig
from moesaic.parallel.costs import Costs, layer_time
from moesaic.parallel.fastermoe import FasterMoEConfig
from moesaic.parallel.hecate import HecateConfig
from moesaic.parallel.placement import Counts, Present, Topology, no_copies, token_plan
from moesaic.parallel.plans import (
    CustomPlanConfig,
    ExpertParallelConfig,
    PlanConfig,
    PlanError,
    Planner,
    RememberingPlanner,
    ReplicateAllConfig,
    build_planner,
    check_plan,
)

ALL: list[PlanConfig] = [
    ExpertParallelConfig(),
    ReplicateAllConfig(),
    HecateConfig(),
    HecateConfig(overlap=3, most_copies=1, calibrate=True),
    HecateConfig(overlap=2, window=1),
    FasterMoEConfig(),
    AutoConfig(margin=0.0),
    AutoConfig(most_copies=1),
]
PRICES = Costs(
    row=10, row_near=3, row_far=6, copy_near=40, copy_far=90, grad_near=80, grad_far=180, message=5
)


@st.composite
def banks(draw: st.DrawFn) -> tuple[list[np.ndarray], tuple[int, ...], Topology, Costs]:
    """The counts of up to three steps, owners, a topology and prices."""
    ranks, experts = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = rng.random(experts) ** draw(st.sampled_from([0, 1, 6]))
    steps = [rng.poisson(draw(st.sampled_from([0, 3, 60])) * popularity, (ranks, experts)) for _ in range(3)]
    prices = Costs(
        row=int(rng.integers(0, 30)),
        expert=int(rng.integers(0, 50)),
        row_near=int(rng.integers(0, 5)),
        row_far=int(rng.integers(0, 20)),
        copy_near=int(rng.integers(0, 200)),
        copy_far=int(rng.integers(0, 400)),
        grad_near=int(rng.integers(0, 200)),
        grad_far=int(rng.integers(0, 400)),
        message=int(rng.integers(0, 9)),
        hidden_forward=int(rng.integers(0, 2000)),
        hidden_backward=int(rng.integers(0, 4000)),
        gathers_backward=int(rng.integers(0, 2)),
    )
    owners = tuple(rng.integers(0, ranks, experts).tolist())
    return steps, owners, Topology(ranks, draw(st.integers(1, 4))), prices


@settings(max_examples=100, deadline=None)
@given(banks(), st.sampled_from(ALL), st.integers(0, 3))
def test_every_plan_can_be_carried_out(bank: tuple, config: PlanConfig, steps: int) -> None:
    """Owners keep their experts, no token is lost, memory is kept, nobody's input changes, and two ranks agree."""
    counts, owners, topology, prices = bank
    history = counts[:steps]
    planner, other = build_planner(config, prices), build_planner(config, prices)
    alone = no_copies(owners, topology.ranks)
    given = [step.copy() for step in counts]
    for exact in (None, counts[2]) if planner.exact else (None,):
        planned = planner.plan(history, exact, owners, topology)
        for again in (planner, other):
            np.testing.assert_array_equal(again.plan([*history], exact, owners, topology), planned)
        check_plan("bank", planned, owners, topology)
        assert (token_plan(counts[2], planned, topology).sum(2) == counts[2]).all()
        most = getattr(config, "most_copies", None)
        if most is not None:
            assert (planned & ~alone).sum(1).max() <= most
        if steps == 0 and exact is None and not isinstance(config, ReplicateAllConfig):
            assert (planned == alone).all()
    for step, was in zip(counts, given, strict=True):
        np.testing.assert_array_equal(step, was)


@settings(max_examples=150, deadline=None)
@given(banks(), st.integers(0, 9))
def test_the_search_is_the_best_of_them(bank: tuple, overlap: int) -> None:
    """On what it has seen, never worse than no copies, nor than any other planner."""
    (counts, *_), owners, topology, prices = bank
    found = Auto(AutoConfig(margin=0.0), prices).plan([counts], None, owners, topology)
    best = layer_time(counts, found, owners, topology, prices)
    for config in (*ALL[:3], HecateConfig(overlap=overlap), FasterMoEConfig()):
        planner = build_planner(config, prices)
        plan = planner.plan([counts], counts if planner.exact else None, owners, topology)
        planned = no_copies(owners, topology.ranks) if planner.exact else None
        assert best <= layer_time(counts, plan, owners, topology, prices, planned=planned)


@settings(max_examples=60, deadline=None)
@given(banks(), st.integers(2, 5))
def test_a_step_seen_again_changes_nothing(bank: tuple, times: int) -> None:
    """Added up over a window, rows are weighed against as many steps' copies."""
    (counts, *_), owners, topology, prices = bank
    counts = counts * 2520  # which all numbers up to nine divide
    once, often = (
        Auto(AutoConfig(margin=0.0), prices).plan([counts] * number, None, owners, topology)
        for number in (1, times)
    )
    assert (once == often).all()


@settings(max_examples=60, deadline=None)
@given(banks(), st.sampled_from([None, 0, 1, 2]))
def test_a_remembered_plan_never_costs_more_than_no_copies(bank: tuple, most: int | None) -> None:
    counts, owners, topology, prices = bank
    planner = Auto(AutoConfig(window=1, margin=0.3, most_copies=most), prices)
    rng = np.random.default_rng(0)
    for step in counts:
        plan = planner.plan([step], None, owners, topology)
        alone = no_copies(owners, topology.ranks)
        times = [layer_time(step, each, owners, topology, prices) for each in (plan, alone)]
        assert times[0] <= times[1]
        owners = tuple(rng.permutation(owners).tolist())


@settings(max_examples=100, deadline=None)
@given(
    banks(), st.sampled_from([None, 0, 1, 2]), st.sampled_from([0.0, 0.02, 0.3]), st.sampled_from([1, 3, 32])
)
def test_the_compiled_search_finds_the_same(bank: tuple, most: int | None, margin: float, depth: int) -> None:
    """As the one in numpy does, whatever the plans before it, and while owners change."""
    counts, owners, topology, prices = bank
    config = AutoConfig(window=2, margin=margin, most_copies=most)
    compiled, plain = Auto(config, prices), Auto(config, prices)
    rng = np.random.default_rng(int(counts[0].sum()))
    before = rng.random(counts[0].shape) < rng.choice([0, 0.1, 0.5])
    for planner in (compiled, plain):
        planner.restore({"experts": len(owners), "present": [np.flatnonzero(row).tolist() for row in before]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto, "DEPTH", depth)
        for step in range(3):
            history = [
                each.astype(kind, order="F") for each, kind in zip(counts[: step + 1], "lil", strict=False)
            ]
            found = compiled.plan(history, None, owners, topology)
            with pytest.MonkeyPatch.context() as without:
                for module in (auto, copies, costs):
                    without.setattr(module, "run_compiled", lambda *_: False)
                np.testing.assert_array_equal(found, plain.plan(history, None, owners, topology))
            owners = tuple(rng.permutation(owners).tolist())


def test_a_little_gain_is_no_reason_to_change() -> None:
    """Copies of expert 0, then of expert 1 only when they gain more than the margin; and it can be written down."""
    owners, topology, prices = (
        (0, 0),
        Topology(2, 2),
        Costs(row=1, copy_near=6, copy_far=0, grad_near=0, grad_far=0),
    )

    def planned(planner: Auto, first: int, second: int) -> list[list[int]]:
        plan = planner.plan([np.array([[first, second], [first, second]])], None, owners, topology)
        return [np.flatnonzero(row).tolist() for row in plan]

    planner = Auto(AutoConfig(margin=0.1), prices)
    assert planned(planner, 50, 5) == [[0, 1], [0]]
    assert planned(planner, 50, 10) == [[0, 1], [0]]  # 76 now, 72 with both: 5 percent
    resumed = Auto(AutoConfig(margin=0.1), prices)
    assert isinstance(resumed, RememberingPlanner)
    resumed.restore(json.loads(json.dumps(planner.state())))
    assert planned(Auto(AutoConfig(margin=0.1), prices), 50, 10) == [[0, 1], [0, 1]]
    assert planned(resumed, 50, 10) == [[0, 1], [0]]
    assert planned(resumed, 50, 30) == [[0, 1], [0, 1]]
    fresh = Auto(AutoConfig(), prices)
    fresh.restore(json.loads(json.dumps(fresh.state())))
    assert planned(fresh, 50, 5) == [[0, 1], [0]]
    # a plan for other ranks is of no use
    assert fresh.plan([np.ones((1, 2), int)], None, (0, 0), Topology(1, 1)).tolist() == [[True, True]]


def test_the_search_finds_what_others_cannot() -> None:
    """Two nodes of four, one hot expert, slow links and ports that are costly too: one copy on the other node is
    best."""
    topology, owners = Topology(8, 4), (0, 1, 2, 3, 4, 5, 6, 7)
    counts = np.full((8, 8), 10)
    counts[:, 0] = 100
    prices = Costs(row=1, row_far=10, copy_near=1, copy_far=1500, grad_near=1, grad_far=1500)
    plan = Auto(AutoConfig(), prices).plan([counts], None, owners, topology)
    assert plan[:, 0].tolist() == [True, False, False, False, True, False, False, False]
    assert plan.sum() == 9


def test_shadowing_stops_where_the_time_stops_falling() -> None:
    owners, topology = (0, 0, 1), Topology(2, 2)
    prices = Costs(
        row=1, copy_near=10, copy_far=0, grad_near=0, grad_far=0, hidden_forward=10**6, micro_batches=3
    )
    planner = build_planner(FasterMoEConfig(), prices)
    counts = np.array([[30, 14, 0], [30, 14, 2]])
    # rank 0 has 88; with a copy of expert 0, 58 + 10; of 1 too, rank 1 has 46 + 20
    assert planner.plan([], counts, owners, topology).tolist() == [[True, True, False], [True, True, True]]
    assert planner.exact
    less = np.array([[30, 10, 0], [30, 10, 2]])  # 50 + 10, then 42 + 20
    assert planner.plan([], less, owners, topology).tolist() == [[True, True, False], [True, False, True]]


class FirstEverywhere:
    """A planner such as a user writes."""

    exact = False

    def __init__(self, costs: Costs, experts: int) -> None:
        self.experts = experts

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        present = no_copies(owners, topology.ranks)
        present[:, : self.experts] = True
        return present


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("mine")
    module.FirstEverywhere, module.Nothing = FirstEverywhere, dict
    monkeypatch.setitem(sys.modules, "mine", module)


def test_a_planner_of_ones_own(mine: None) -> None:
    planner = build_planner(CustomPlanConfig(planner="mine:FirstEverywhere", options={"experts": 1}), PRICES)
    assert isinstance(planner, Planner)
    assert not isinstance(planner, RememberingPlanner)
    assert planner.plan([], None, (0, 1), Topology(2, 1)).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("planner", "options", "message"),
    [
        ("mine", {}, "planner: 'mine' is not package.module:Class"),
        ("no_such_module:X", {}, "planner: 'no_such_module:X' cannot be imported"),
        ("mine:Other", {}, "planner: module 'mine' has no 'Other'"),
        ("mine:FirstEverywhere", {"expert": 1}, "options: mine:FirstEverywhere does not take"),
        ("mine:Nothing", {}, "planner: 'mine:Nothing' has no 'exact'"),
    ],
)
def test_what_is_no_planner_is_named(mine: None, planner: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_planner(CustomPlanConfig(planner=planner, options=options), PRICES)


@pytest.mark.parametrize(
    ("present", "message"),
    [
        (
            np.ones((2, 3), bool),
            r"bank 'a': a plan is a numpy array of bool \(2, 2\) \(ranks, experts\), not bool \(2, 3\)",
        ),
        (np.ones((2, 2)), r"not float64 \(2, 2\)"),
        ([[True, True], [True, True]], "not list"),
        (np.array([[True, True], [True, False]]), "bank 'a': expert 1 is not on its owner, rank 1"),
    ],
)
def test_bad_plans_are_named(present: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_plan("a", present, (0, 1), Topology(2, 2))


@pytest.mark.parametrize(
    ("field", "value"), [("window", 0), ("most_copies", -1), ("margin", 1.0), ("margin", -0.1)]
)
def test_bad_numbers_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}: {value} is"):
        AutoConfig(**{field: value})
