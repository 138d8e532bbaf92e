"""Experts with copies against one process: bit for bit where all numbers are small integers, whatever the plan.

Freed copies are NaN here, so that reading one shows. Trials with the same owners
share one model on their ranks, one after the other, as process groups take longer to make than a trial.
"""

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
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
    "levels": ("one", "two"),
    "dtype": (torch.float64, torch.bfloat16),
}
"""With bf16, numbers are so small that bf16 holds every sum, and gradients of copies travel in fp32."""
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
    levels: str
    dtype: torch.dtype
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
    """Three layers side by side on the same tokens: the second has a shared expert beside the others, the third shares
    its experts with the first."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        first = layer_of(case)
        assert first.bank is not None
        second = type(first)(replace(first.config, shared_experts=1), DIM, name="other").double()
        third = type(first)(first.config, DIM, bank=first.bank).double()
        with torch.no_grad():
            for number, parameter in enumerate([*second.parameters(), *third.parameters()]):
                parameter.copy_(integers(*parameter.shape, seed=50 + number))
        self.layers = torch.nn.ModuleList([first, second, third])
        if dtype != torch.float64:
            for parameter in self.parameters():
                parameter.data.clamp_(-1, 1)

    def forward(self, x: Tensor, routings: Sequence[Routing], recompute: bool = False) -> Tensor:
        parts = [
            checkpoint(layer, x, routing, use_reentrant=False, preserve_rng_state=False)
            if recompute
            else layer(x, routing)
            for layer, routing in zip(self.layers, routings, strict=True)
        ]
        return torch.stack(parts).sum(0)  # type: ignore[arg-type]


def inputs(case: Case, rank: int, micro: int, dtype: torch.dtype) -> tuple[Tensor, list[Routing], Tensor]:
    """Tokens, choices of every layer, and what the output's gradient is."""
    tokens = case.tokens[rank] if micro != 1 else case.tokens[-1 - rank]
    seed = 100 * micro + 10 * rank
    other = Case(case.owners, (tokens,) * (seed + LAYERS), case.choose)
    routings = [routing_of(other, seed + layer) for layer in range(LAYERS)]
    x, grad = integers(tokens, DIM, seed=seed + 300), integers(tokens, DIM, seed=seed + 400)
    if dtype != torch.float64:
        x, grad = x.clamp(-1, 1).to(dtype), grad.clamp(-1, 1).to(dtype)
    return x, routings, grad


def passes(model: Layers, trial: Trial, rank: int, micro: int, recompute: bool = False) -> dict[str, Tensor]:
    """A forward and a backward pass; what a rank sees."""
    x, routings, grad = inputs(trial.case, rank, micro, trial.dtype)
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
    model = Layers(trial.case, trial.dtype)
    found: dict[str, Tensor] = {}
    for micro, rank in itertools.product(range(trial.micro), range(trial.case.ranks)):
        found |= passes(model, trial, rank, micro)
    return found | {
        f"grad {name}": grad
        for name, grad in logical_tensors(model, lambda t: t.grad).items()
        if "bank" in name or "shared" in name
    }


def own(case: Case, levels: str) -> Layers:
    """The layers on ranks, as trials take them one after the other."""
    model = Layers(case)
    owned = OwnedExperts(compare_plans=True, levels=levels)  # type: ignore[arg-type]
    config = ParallelConfig(experts=owned)
    os.environ["LOCAL_WORLD_SIZE"] = str(case.ranks // 2 if levels == "two" and case.ranks % 2 == 0 else 1)
    owners = OwnerMap(case.ranks, {"experts": case.owners, "other": case.owners[::-1]})
    own_experts(model, config, ranks_of(config, "cpu"), owners)
    return model


def on_a_rank(model: Layers, trial: Trial) -> dict[str, Tensor]:
    case, rank = trial.case, dist.get_rank()
    slots = slots_of(model)
    assert slots is not None
    whole = Layers(case, trial.dtype)
    values = {name: tensor.detach() for name, tensor in logical_tensors(whole).items()}
    with torch.no_grad():
        for table in slot_tables(model):
            table.clear()
            for name, expert, matrix in table.each():
                matrix.copy_(values[name][expert])
        for name, tensor in logical_tensors(model).items():
            if not isinstance(tensor, ExpertRows):
                tensor.grad = None
                tensor.copy_(values[name])
    copying = slots.copying
    copying.rematerialize, copying.accumulate = trial.rematerialize, trial.accumulate  # type: ignore[assignment]
    copying.prefetch, copying.poison = trial.prefetch, True
    copying.wire = None if trial.dtype == torch.float64 else torch.float32
    for layer in model.layers:
        layer.dispatcher.max_rows, layer.dispatcher.recomputed = trial.max_rows, trial.recompute  # type: ignore[union-attr]
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
                layer.dispatcher.prefetch(trial.dtype)  # type: ignore[union-attr]
        found |= passes(model, trial, rank, micro, trial.recompute)
    slots.settle()
    for name, grad in logical_tensors(model, lambda t: t.grad).items():
        if isinstance(grad, ExpertRows):
            found[f"grad {name}"] = grad.whole(slots.group)
        elif "shared" in name:
            dist.all_reduce(grad)
            found[f"grad {name}"] = grad
    return found


def check(trials: Sequence[Trial]) -> None:
    for count in sorted({trial.case.ranks for trial in trials}):
        these = [trial for trial in trials if trial.case.ranks == count]
        models = sorted({(trial.case, trial.levels) for trial in these}, key=repr)

        def work(these: Sequence[Trial] = these, models: Sequence[tuple[Case, str]] = models) -> list[Any]:
            made = {key: own(*key) for key in models}
            return [on_a_rank(made[trial.case, trial.levels], trial) for trial in these]

        results = run_ranks(work, count, timeout=250)
        for index, trial in enumerate(these):
            want = on_one_process(trial)
            seen = {name for of_rank in results for name in of_rank[index]}
            assert seen == want.keys(), str(trial)
            for rank, of_rank in enumerate(results):
                for name, value in of_rank[index].items():
                    assert torch.equal(value, want[name]), f"rank {rank}, {name}: {trial}"


def pairs(options: Sequence[object]) -> set[tuple[int, object, int, object]]:
    """Every two options that a trial brings together."""
    return {(i, options[i], j, options[j]) for i, j in itertools.combinations(range(len(options)), 2)}


def trial(number: int, options: Sequence[Any]) -> Trial:
    """With the next of the cases; two levels need nodes with equally many ranks, two of them where that can be."""
    return Trial(CASES[number % len(CASES)], *options, seed=number)


def cover() -> list[Trial]:
    """Few trials in which every two options meet: greedily, of a few thousand drawn at random."""
    draw = random.Random(0)
    drawn = [tuple(draw.choice(of) for of in OPTIONS.values()) for _ in range(2000)]
    missing = set().union(*map(pairs, drawn))
    chosen: list[Trial] = []
    while missing:
        best = max(drawn, key=lambda options: len(pairs(options) & missing))
        missing -= pairs(best)
        chosen.append(trial(len(chosen), best))
    return chosen


def test_no_plan_changes_a_bit() -> None:
    chosen = cover()
    assert len(chosen) <= 24
    values = list(OPTIONS.values())
    expected = sum(len(a) * len(b) for a, b in itertools.combinations(values, 2))
    options = [tuple(getattr(one, name) for name in OPTIONS) for one in chosen]
    assert len(set().union(*map(pairs, options))) == expected
    check(chosen)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_plan_of_many_changes_a_bit() -> None:
    draw = random.Random(1)
    check([trial(number, [draw.choice(of) for of in OPTIONS.values()]) for number in range(200)])
