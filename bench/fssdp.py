"""A stack of layers whose experts are owned, a whole training step under every plan: FSSDP against expert parallelism
and copies of everything, and what the cost model said before against what the clock says.

Forked gloo ranks with one thread each, one model, given routings: the first rank's experts are wanted more than
others', by as much as each table says. Outputs and gradients of all plans are compared before anything is timed; then
plans take turns, a step each, on the same draw of a routing. Results: bench/results/fssdp_SHAPE_RANKS_ranks.md.

    python bench/fssdp.py [--quick] [--rounds 9] [--shapes wide fine] [--ranks 2 4]

Dims: T tokens of a rank, D width, F hidden width, E experts, K experts per token, P ranks.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from expert_memory import ExpertMemory
from fssdp_table import ABOUT, AGAIN, ALONE, AUTO, BALANCED, EVERYWHERE, HECATE, Found, section
from timing import interleave, refuse_other_results, write_result
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.moe import MoE, TopKRouter
from moesaic.moe.routing import Routing
from moesaic.parallel import ParallelConfig, parallelize, sum_replicated
from moesaic.parallel.auto import AutoConfig
from moesaic.parallel.config import OwnedExperts
from moesaic.parallel.costs import Costs, layer_time
from moesaic.parallel.hecate import HecateConfig
from moesaic.parallel.measure import repeated
from moesaic.parallel.placement import Counts, Present, even_owners
from moesaic.parallel.plans import ExpertParallelConfig, PlanConfig, ReplicateAllConfig
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.replan import Replan
from moesaic.parallel.shard import local
from moesaic.parallel.slots import slots_of
from moesaic.parallel.spawn import run_ranks
from moesaic.parallel.traffic import Meter
from moesaic.train.device import tune_host

SHAPES = {"wide": (512, 1024, 8, 2, 4096), "fine": (512, 256, 64, 8, 4096), "quick": (64, 64, 8, 2, 256)}
"""D, F, E, K, T of each rank."""
SKEWS = (1.0, 1.5, 1.8)
"""Rows of the first rank over the mean, where every rank has the experts that it owns."""
DEPTH = 4
"""Layers, each with a bank of its own, and a dense projection before it."""
WITHIN = 4.0
"""Load of a rank's most wanted expert over that of its least wanted one; geometric in between."""
DRAWS = 6
TOLERANCE = 1e-4
"""Largest difference over the largest value."""
PLANS: dict[str, PlanConfig] = {
    ALONE: ExpertParallelConfig(),
    EVERYWHERE: ReplicateAllConfig(),
    AUTO: AutoConfig(),
    AGAIN: AutoConfig(),
}
"""And `hecate`, whose overlap is given, a quarter of the experts: costs measure nothing behind which copies hide."""


class Block(nn.Module):
    """A dense projection and a mixture of experts."""

    def __init__(self, shape: tuple[int, ...], number: int) -> None:
        super().__init__()
        D, F, E, K, _ = shape
        self.dense = nn.Linear(D, D, bias=False)
        config = MoE.Config(num_experts=E, hidden=F, router=TopKRouter.Config(k=K))
        self.moe = MoE(config, D, name=f"experts {number}")

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return x + self.moe(nn.functional.rms_norm(self.dense(x), x.shape[-1:]), routing)


class Stack(nn.Module):
    """Blocks, whose routings are given."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape, number) for number in range(DEPTH))

    def forward(self, x: Tensor, routings: Sequence[Routing]) -> Tensor:
        for block, routing in zip(self.blocks, routings, strict=True):
            x = block(x, routing)
        return x


@dataclass
class Candidate:
    """A plan of which the step makes use, and what its planners have seen."""

    replan: Replan
    rematerialize: bool
    history: dict[str, list[Counts]] = field(default_factory=dict)
    present: dict[str, Present] = field(default_factory=dict)
    steps: int = 0
    busy: list[float] = field(default_factory=list)
    """Processor seconds of this rank in every step."""


class Trial:
    """One rank's part of everything."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.ranks = ranks_of(ParallelConfig(), "cpu")
        torch.manual_seed(0)
        model = Stack(shape)
        config = ParallelConfig(experts=OwnedExperts())
        self.model = parallelize(model, config, self.ranks, units=list(model.blocks))
        slots = slots_of(model)
        assert slots is not None
        self.slots = slots
        torch.manual_seed(1 + self.ranks.rank)
        for table_ in slots:
            for _, _, matrix in table_.each():
                nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
        cut = {True: [], False: []}  # a fused kernel takes one class of tensors
        for parameter in model.parameters():
            cut[isinstance(parameter, DTensor)].append(parameter)
        groups = [{"params": parameters} for parameters in cut.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-5, fused=True)
        self.meter = Meter(model, self.ranks, micro_batches=1, dtype=torch.float32)
        D, T = shape[0], shape[-1]
        tokens = torch.Generator().manual_seed(100 + self.ranks.rank)
        self.x, self.grad = (torch.randn(T, D, generator=tokens) for _ in range(2))

    def _replan(self, plan: PlanConfig, costs: Costs | None) -> Replan:
        owned = OwnedExperts(plan=plan, costs=costs)
        return Replan(self.model, owned, self.ranks, micro_batches=1, dtype=torch.float32)

    def candidate(self, plan: PlanConfig, costs: Costs, *, rematerialize: bool = False) -> Candidate:
        self.slots.copying.rematerialize = rematerialize
        replan = self._replan(plan, repeated(costs, self.slots, False, 1))
        present = {name: bank.present for name, bank in self.slots.banks.items()}
        return Candidate(replan, rematerialize, present=present)

    def draw(self, skew: float) -> list[list[Routing]]:
        """Routings of the next steps, for every layer."""
        E, K, T = self.shape[2:]
        wanted = inclusion(E, K, self.ranks.size, skew)
        source = torch.Generator().manual_seed(1000 + self.ranks.rank)
        unused = torch.zeros(T, E)
        return [
            [
                Routing.token_choice(
                    choose(wanted, T, K, source),
                    torch.rand(T, K, generator=source).requires_grad_(),
                    probabilities=unused,
                    logits=unused,
                )
                for _ in range(DEPTH)
            ]
            for _ in range(DRAWS)
        ]

    def step(self, candidate: Candidate, routings: Sequence[Routing], *, update: bool = True) -> list[Tensor]:
        """A training step; without an `update`, what it computes."""
        began = time.process_time()
        self.slots.copying.rematerialize = candidate.rematerialize
        self.slots.copying.prefetch = 0 if candidate.rematerialize else 1
        for name, bank in self.slots.banks.items():
            bank.planner = candidate.replan.planners[name]
            bank.history, bank.present = candidate.history.get(name, []), candidate.present[name]
        self.slots.begin(last=True)
        x = self.x.detach().requires_grad_()
        gates = [routing.weights.detach().requires_grad_() for routing in routings]
        given = [replace(routing, weights=gate) for routing, gate in zip(routings, gates, strict=True)]
        y = self.model(x, given)
        y.backward(self.grad)
        sum_replicated(self.model, self.ranks)
        seen = []
        if update:
            self.optimizer.step()
        else:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            found = (y, x.grad, *(gate.grad for gate in gates), *grads)
            seen = [local(tensor).detach().clone() for tensor in found if tensor is not None]
        self.optimizer.zero_grad()
        for table_ in self.slots:
            table_.clear()
        candidate.replan.step()
        for name, bank in self.slots.banks.items():
            candidate.history[name], candidate.present[name] = bank.history, bank.present
        candidate.busy.append(time.process_time() - began)
        return seen

    def compare(self, candidates: Mapping[str, Candidate], routings: list[list[Routing]]) -> None:
        """Two steps of each: the first ones' plans know nothing yet."""
        reference: list[Tensor] = []
        for name, candidate in candidates.items():
            self.step(candidate, routings[0], update=False)
            seen = self.step(candidate, routings[1], update=False)
            reference = reference or seen
            for number, (mine, other) in enumerate(zip(seen, reference, strict=True)):
                refuse_other_results(f"{name}, tensor {number}", mine, other, TOLERANCE)

    def run(self, skew: float, rounds: int) -> tuple[dict[str, Found], Costs]:
        """All candidates under one skew, and beside them a step of expert parallelism on balanced routings; and the
        prices of now."""
        costs = next(
            iter(self._replan(AutoConfig(), None).costs.values())
        )  # banks are equal, and so are their prices
        plans = {**PLANS, HECATE: HecateConfig(overlap=self.shape[2] // 4)}
        candidates = {
            name: self.candidate(plan, costs, rematerialize=name == AGAIN) for name, plan in plans.items()
        }
        drawn = self.draw(skew)
        routings = dict.fromkeys(candidates, drawn)
        self.compare(candidates, drawn)
        candidates[BALANCED], routings[BALANCED] = self.candidate(PLANS[ALONE], costs), self.draw(1.0)
        watched = {}
        for name, candidate in candidates.items():
            self.step(candidate, routings[name][2])
            self.meter.reset()
            predicted = self.predicted(candidate, routings[name][3])
            with ExpertMemory(self.slots, self.optimizer) as memory:
                self.step(candidate, routings[name][3])
            traffic = self.meter.collect()
            assert traffic is not None
            watched[name] = traffic, memory.peak, predicted
            candidate.busy.clear()

        def call(candidate: Candidate, routings: list[list[Routing]]):
            def once() -> None:
                self.step(candidate, routings[candidate.steps % DRAWS])
                candidate.steps += 1
                dist.barrier()

            return once

        calls = {name: call(candidate, routings[name]) for name, candidate in candidates.items()}
        timings = interleave(calls, rounds=rounds, warmup=1)
        found = {}
        for name, (traffic, peak, predicted) in watched.items():
            seconds, busy = timings.seconds[name], candidates[name].busy[-rounds:]
            found[name] = Found(traffic, peak, seconds, busy, predicted)
        return found, costs

    def predicted(self, candidate: Candidate, routings: Sequence[Routing]) -> float:
        """Seconds of all banks in the step that comes."""
        total = 0
        for (name, bank), routing in zip(self.slots.banks.items(), routings, strict=True):
            counts = routing.experts.bincount(minlength=len(bank.owners)).repeat(self.ranks.size)
            every = torch.empty_like(counts)
            dist.all_to_all_single(every, counts)
            costs = candidate.replan.costs[name]
            total += layer_time(
                every.view(self.ranks.size, -1).numpy(),
                candidate.present[name],
                bank.owners,
                self.slots.topology,
                costs,
            )
        return total / 1e12


def inclusion(experts: int, k: int, ranks: int, skew: float) -> np.ndarray:
    """Chance of every expert to be among a token's k: `skew` times the mean for the first rank's experts together, the
    rest shared evenly by the other ranks."""
    owners = np.array(even_owners({"": experts}, ranks).owners[""])
    chances = np.zeros(experts)
    for rank in range(ranks):
        mine = np.flatnonzero(owners == rank)
        share = skew / ranks if rank == 0 else (1 - skew / ranks) / (ranks - 1)
        weights = WITHIN ** -np.linspace(0, 1, len(mine))
        chances[mine] = k * share * weights / weights.sum()
    if chances.max() > 1:
        raise ValueError(f"skew: {skew} asks for more than one row of a token for one expert; lower it")
    return chances


def choose(chances: np.ndarray, tokens: int, k: int, source: torch.Generator) -> Tensor:
    """(T, K) different experts, each with its chance: systematic sampling (Madow, 1949)."""
    ends = torch.from_numpy(chances).cumsum(0)
    marks = torch.rand(tokens, 1, generator=source, dtype=torch.float64) + torch.arange(k)
    return torch.searchsorted(ends, marks).clamp(max=len(chances) - 1)


def on_a_rank(shape: tuple[int, ...], rounds: int) -> list[tuple[dict[str, Found], Costs]]:
    trial = Trial(shape)
    return [trial.run(skew, rounds) for skew in SKEWS]


def measured(name: str, ranks: int, rounds: int) -> str:
    """All skews of one shape."""
    shape = SHAPES[name]
    results = run_ranks(lambda: on_a_rank(shape, rounds), ranks, timeout=7200)
    D, F, E, K, T = shape
    lines = [f"## D {D}, F {F}, E {E}, K {K}, T {T} per rank, {DEPTH} layers, {ranks} ranks"]
    for number, skew in enumerate(SKEWS):
        found, costs = [of_rank[number][0] for of_rank in results], results[0][number][1]
        lines.append(section(skew, found, costs))
    print("\n\n".join(lines), "\n", flush=True)
    return "\n\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument(
        "--quick", action="store_true", help="a small shape, to see that it runs; no result is written"
    )
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--shapes", nargs="+", default=["wide", "fine"])
    arguments.add_argument("--ranks", type=int, nargs="+", default=[2])
    options = arguments.parse_args()
    tune_host()
    torch.set_num_threads(1)  # before ranks are forked
    if options.quick:
        measured("quick", options.ranks[0], rounds=3)
        return
    for ranks in options.ranks:
        for name in options.shapes:
            sections = [ABOUT, measured(name, ranks, options.rounds)]
            command = f"python bench/fssdp.py --rounds {options.rounds} --shapes {name} --ranks {ranks}"
            title = "Experts with copies: whole steps under every plan"
            write_result(f"fssdp_{name}_{ranks}_ranks", title, command, 1, sections)


if __name__ == "__main__":
    main()
