"""Experts with copies against one process: bit for bit where all numbers are small integers, whatever the plan.

Freed matrices and matrices that nobody asked for are NaN here, so that reading one shows.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from test_parallel_experts import DIM, Case, integers, layer_of, routing_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.models.names import logical_tensors
from moesaic.moe.routing import Routing
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.own import own_experts
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.shard import slot_tables
from moesaic.parallel.slots import ExpertRows, slots_of
from moesaic.parallel.spawn import run_ranks

OPTIONS = {
    "rematerialize": (False, True),
    "accumulate": ("each", "last"),
    "recompute": (False, True),
    "max_rows": (None, 3),
    "micro": (1, 3),
    "prefetch": (0, 1, 2),
    "plan": ("none", "all", "random", "every step", "within the layer"),
}
LAYERS = 3
CASES = [
    Case((0, 0, 1, 1), (5, 5)),
    Case((0, 0, 1, 1, 1), (4, 7)),
    Case((1, 1, 1, 1), (3, 6)),
    Case((0, 1, 1), (6, 9), "one"),
    Case((0, 1, 1), (6, 0), "skip"),
    Case((0, 0, 2, 2), (3, 0, 5)),
    Case((2, 1, 0), (6, 1, 4), "one"),
    Case((3, 2, 1, 0, 0, 1), (2, 3, 4, 5)),
    Case((1, 1, 1, 1), (2, 3, 0, 5), "skip"),
    Case((0, 3), (0, 0, 0, 0)),
]


@dataclass(frozen=True)
class Trial:
    """A case with options, and what draws its plans."""

    case: Case
    rematerialize: bool
    accumulate: str
    recompute: bool
    max_rows: int | None
    micro: int
    prefetch: int
    plan: str
    seed: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in (*OPTIONS, "seed", "case"))


class Adding:
    """A planner that looks at the layer's own counts: copies wherever there are tokens for an odd expert."""

    exact = True

    def plan(self, history: object, exact: np.ndarray | None, owners: object, topology: object) -> np.ndarray:
        assert exact is not None
        return (exact > 0) & (np.arange(exact.shape[1]) % 2 == 1)


class Layers(torch.nn.Module):
    """Three layers side by side on the same tokens; the last shares its experts with the first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        first = layer_of(case)
        assert first.bank is not None
        second = type(first)(first.config, DIM, name="other").double()
        third = type(first)(first.config, DIM, bank=first.bank).double()
        with torch.no_grad():
            for number, parameter in enumerate([*second.parameters(), *third.parameters()]):
                parameter.copy_(integers(*parameter.shape, seed=50 + number))
        self.layers = torch.nn.ModuleList([first, second, third])

    def forward(self, x: Tensor, routings: Sequence[Routing], recompute: bool = False) -> Tensor:
        parts = [
            checkpoint(layer, x, routing, use_reentrant=False, preserve_rng_state=False)
            if recompute
            else layer(x, routing)
            for layer, routing in zip(self.layers, routings, strict=True)
        ]
        return torch.stack(parts).sum(0)  # type: ignore[arg-type]


def inputs(case: Case, rank: int, micro: int) -> tuple[Tensor, list[Routing], Tensor]:
    """Tokens, choices of every layer, and what the output's gradient is."""
    tokens = case.tokens[rank] if micro != 1 else case.tokens[-1 - rank]
    seed = 100 * micro + 10 * rank
    other = Case(case.owners, (tokens,) * (seed + LAYERS), case.choose)
    routings = [routing_of(other, seed + layer) for layer in range(LAYERS)]
    return integers(tokens, DIM, seed=seed + 300), routings, integers(tokens, DIM, seed=seed + 400)


def passes(model: Layers, case: Case, rank: int, micro: int, recompute: bool = False) -> dict[str, Tensor]:
    """A forward and a backward pass; what a rank sees."""
    x, routings, grad = inputs(case, rank, micro)
    x.requires_grad_()
    for routing in routings:
        routing.weights.retain_grad()
    y = model(x, routings, recompute)
    y.backward(grad)
    found = {f"y {micro} {rank}": y.detach(), f"x {micro} {rank}": x.grad}
    for layer, routing in enumerate(routings):
        found[f"gates {layer} {micro} {rank}"] = routing.weights.grad
    return found  # type: ignore[return-value]


def on_one_process(trial: Trial) -> dict[str, Tensor]:
    model = Layers(trial.case)
    found: dict[str, Tensor] = {}
    for micro, rank in itertools.product(range(trial.micro), range(trial.case.ranks)):
        found |= passes(model, trial.case, rank, micro)
    return found | {
        f"grad {name}": t for name, t in logical_tensors(model, lambda t: t.grad).items() if "bank" in name
    }


def on_a_rank(trial: Trial) -> dict[str, Tensor]:
    case = trial.case
    model = Layers(case)
    values = {name: tensor.detach().clone() for name, tensor in logical_tensors(model).items()}
    ranks = ranks_of(ParallelConfig(), "cpu")
    owned = OwnedExperts(
        max_rows=trial.max_rows,
        compare_plans=True,
        rematerialize=trial.rematerialize,
        accumulate=trial.accumulate,  # type: ignore[arg-type]
        prefetch=trial.prefetch,
    )
    other = case.owners[::-1]
    config = ParallelConfig(experts=owned, recompute="block" if trial.recompute else "none")
    own_experts(model, config, ranks, OwnerMap(case.ranks, {"experts": case.owners, "other": other}))
    with torch.no_grad():
        for table in slot_tables(model):
            for name, expert, matrix in table.each():
                matrix.copy_(values[name][expert])
    slots = slots_of(model)
    assert slots is not None
    assert slots.copying is not None
    slots.copying.poison = True
    draw = np.random.default_rng(trial.seed)

    def plan() -> None:
        for bank in slots.banks.values():
            copies = {"none": 0.0, "all": 1.0}.get(trial.plan, 0.5)
            bank.present = bank.alone | (draw.random(bank.alone.shape) < copies)
            bank.planner = Adding() if trial.plan == "within the layer" else None  # type: ignore[assignment]

    plan()
    found: dict[str, Tensor] = {}
    for micro in range(trial.micro):
        if trial.plan == "every step" and trial.accumulate == "each":
            plan()
        slots.begin(last=micro == trial.micro - 1)
        if trial.prefetch:
            for layer in model.layers[: trial.prefetch]:
                layer.dispatcher.prefetch(torch.float64)  # type: ignore[union-attr]
        found |= passes(model, case, ranks.rank, micro, trial.recompute)
    slots.settle()
    for name, value in logical_tensors(model, lambda t: t.grad).items():
        if isinstance(value, ExpertRows):
            found[f"grad {name}"] = value.whole(slots.group)
    return found


def check(trials: Sequence[Trial]) -> None:
    for count in sorted({trial.case.ranks for trial in trials}):
        these = [trial for trial in trials if trial.case.ranks == count]
        results = run_ranks(lambda these=these: [on_a_rank(trial) for trial in these], count)
        for index, trial in enumerate(these):
            want = on_one_process(trial)
            seen = {name for of_rank in results for name in of_rank[index]}
            assert seen == want.keys(), str(trial)
            for rank, of_rank in enumerate(results):
                for name, value in of_rank[index].items():
                    assert torch.equal(value, want[name]), f"rank {rank}, {name}: {trial}"


def trials(count: int, seed: int) -> list[Trial]:
    """Options at random for every case in turn."""
    draw = random.Random(seed)
    return [
        Trial(CASES[number % len(CASES)], *(draw.choice(of) for of in OPTIONS.values()), seed=number)  # type: ignore[arg-type]
        for number in range(count)
    ]


def test_no_plan_changes_a_bit() -> None:
    check(trials(40, seed=0))
