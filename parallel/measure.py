"""What plans cost on this machine: a layer computed with made-up tokens, and rows, copies and gradients that travel.

All ranks measure at once, as they will compute, and the slowest counts. What travels is measured alone and taken for
exposed: what other work may hide is not measured.

Dims: T tokens of a rank, D width, E experts, P ranks, S ranks of a node.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.kernels.plan import plan_choice
from moesaic.moe.experts import Experts
from moesaic.parallel.all_to_all import AllToAll, Traffic
from moesaic.parallel.banks import Gather, OwnedBank
from moesaic.parallel.costs import LONGEST, Costs
from moesaic.parallel.own import layers_of
from moesaic.parallel.placement import Present
from moesaic.parallel.ranks import Ranks, waiting_for
from moesaic.parallel.slots import Slots, slots_of

FEWEST_ROUNDS, MOST_ROUNDS, ENOUGH = 3, 20, 0.05
"""Rounds of a measurement: as many as take this many seconds, within limits. Short ones are easily disturbed."""
FEW, MANY = 256, 1024
"""Tokens of each expert. A row's price is what the difference costs: with few rows, kernels work in small pieces, and
rows seem dearer than those of a real step."""
MOST = 4
"""Experts of a rank that take part."""
EXCHANGES = "exchanges that are measured"
"""What a rank waits for here."""
PATIENCE = 0.3
"""Seconds of a pass with few tokens beyond which many are not tried."""


def measure_costs(
    model: nn.Module, ranks: Ranks, *, micro_batches: int, dtype: torch.dtype
) -> dict[str, Costs]:
    """Prices for every bank of a model, equal on all ranks; collective. Banks of equal shapes are measured once.

    `dtype`: in which layers compute. Leaves the model as it is; gradients must have been cleared.
    """
    slots = slots_of(model)
    assert slots is not None
    found: dict[str, Costs] = {}
    shapes: dict[tuple[object, ...], Costs] = {}
    recomputed = False
    with measuring(slots):
        for _, layer in layers_of(model):
            assert isinstance(layer.dispatcher, AllToAll)
            bank = layer.dispatcher.bank
            recomputed |= layer.dispatcher.recomputed
            shape = (*bank.table.shape, *bank.table.out, bank.owners)
            if shape not in shapes:
                mine = _Layer(layer.experts, layer.dispatcher, dtype).costs()
                shapes[shape] = _slowest(mine, ranks)
            found[bank.name] = shapes[shape]
    return {name: repeated(costs, slots, recomputed, micro_batches) for name, costs in found.items()}


def repeated(costs: Costs, slots: Slots, recomputed: bool, micro_batches: int) -> Costs:
    """Prices with the numbers of times that a step of so many micro-batches has."""
    keeps = slots.copying.accumulate == "last"
    again = slots.copying.rematerialize or recomputed
    kept = keeps and not slots.copying.rematerialize
    return replace(
        costs,
        micro_batches=micro_batches,
        gathers_forward=1 if kept else micro_batches,
        gathers_backward=micro_batches if again and not kept else 0,
        reductions=1 if keeps else micro_batches,
    )


@contextmanager
def measuring(slots: Slots) -> Iterator[None]:
    """Within it, copies and their gradients travel at every pass; afterwards it is as if nothing had happened."""
    copying = slots.copying
    before = copying.accumulate, copying.rematerialize
    plans = {name: bank.present for name, bank in slots.banks.items()}
    copying.accumulate, copying.rematerialize = "each", False
    try:
        yield
    finally:
        copying.accumulate, copying.rematerialize = before
        slots.begin(last=True)
        copying.reset()
        for name, bank in slots.banks.items():
            bank.loads, bank.present = np.zeros_like(bank.loads), plans[name]
        for table in slots:
            table.clear()


def _slowest(mine: Costs, ranks: Ranks) -> Costs:
    every = ranks.gather(asdict(mine))
    return Costs(**{name: max(costs[name] for costs in every) for name in every[0]})


class _Layer:
    """One layer, with made-up tokens."""

    def __init__(self, experts: Experts, dispatcher: AllToAll, dtype: torch.dtype) -> None:
        self.experts, self.dispatcher, self.dtype = experts, dispatcher, dtype
        self.bank: OwnedBank = dispatcher.bank
        self.topology = dispatcher.topology
        self.size = max(1, min(MOST, *(bank_of.sum() for bank_of in self.bank.alone)))
        """Experts of each rank that take part."""

    def costs(self) -> Costs:
        near = self.topology.ranks_per_node > 1
        rows, message = FEW * self.size, self.message()
        few = self.seconds(self.passes(each=FEW))
        as_many_to_one = self.seconds(self.passes(experts=1, each=rows))
        expert = max(0.0, few - as_many_to_one) / max(1, self.size - 1)
        many = self.seconds(self.passes(each=MANY)) if few <= PATIENCE else few
        row = (many - few) / ((MANY - FEW) * self.size)
        if row <= 0:  # not measured, or disturbed by other work
            row = few / rows

        def trips(hop: int, sharing: int) -> float:
            return max(0.0, self.seconds(self.trip(hop)) - message) / (MANY * self.size * sharing)

        def copies(hop: int, sharing: int) -> tuple[float, float]:
            wanted = self.copies(hop)
            if not wanted.any():
                return 0.0, 0.0
            gather = self.seconds(lambda: Gather(self.bank, self.dtype, wanted).finish())
            back = self.seconds(lambda: self.give_back(wanted))
            return gather / (self.size * sharing), back / (self.size * sharing)

        per_node = self.topology.ranks_per_node
        far = self.topology.ranks > per_node
        row_near, (copy_near, grad_near) = (trips(1, 1), copies(1, 1)) if near else (0.0, (0.0, 0.0))
        row_far, (copy_far, grad_far) = (
            (trips(per_node, per_node), copies(per_node, per_node)) if far else (0.0, (0.0, 0.0))
        )
        prices = {
            "row": row,
            "expert": expert,
            "row_near": row_near,
            "row_far": row_far,
            "copy_near": copy_near,
            "copy_far": copy_far,
            "grad_near": grad_near,
            "grad_far": grad_far,
            "message": message,
        }
        return Costs(**{name: min(LONGEST, round(seconds * 1e12)) for name, seconds in prices.items()})

    def passes(self, *, each: int, experts: int | None = None) -> Callable[[], object]:
        """A forward and a backward pass: every rank's tokens to the first of its own experts."""
        bank, device = self.bank, self.bank.table.master.device
        chosen = np.flatnonzero(bank.alone[bank.rank])[: experts or self.size]
        tokens = each * len(chosen)
        picks = torch.from_numpy(np.resize(chosen, tokens)).to(device)[:, None]
        gates = torch.ones(tokens, 1, device=device, requires_grad=True)
        plan = plan_choice(picks, len(bank.owners))
        width = bank.table.out[0]
        x = torch.randn(tokens, width, device=device, dtype=self.dtype, requires_grad=True)
        grad = torch.ones_like(x)

        def once() -> None:
            bank.present = bank.alone
            planner, bank.planner = bank.planner, None
            inputs = (x, gates.flatten(), plan, self.experts)
            if self.dispatcher.recomputed:
                y = checkpoint(self.dispatcher.run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                y = self.dispatcher.run(*inputs)
            torch.autograd.backward(y, grad)
            bank.copying.finish()
            bank.planner = planner
            self.dispatcher.traffic = Traffic()

        return once

    def trip(self, hop: int) -> Callable[[], object]:
        """Rows from every rank to the one `hop` further on."""
        rank, ranks = self.bank.rank, self.topology.ranks
        given = torch.zeros(MANY * self.size, self.bank.table.out[0], device=self.bank.table.master.device)
        given = given.to(self.dtype)
        send = [len(given) if other == (rank + hop) % ranks else 0 for other in range(ranks)]
        receive = [len(given) if other == (rank - hop) % ranks else 0 for other in range(ranks)]
        return lambda: self.exchange(given, receive, send)

    def exchange(self, given: Tensor, *splits: list[int]) -> None:
        """Rows to their ranks; `splits`: how many come from and go to each, where not as many to all."""
        with waiting_for(EXCHANGES, self.dispatcher.group):
            dist.all_to_all_single(torch.empty_like(given), given, *splits, group=self.dispatcher.group)

    def give_back(self, wanted: Present) -> None:
        """Gradients of these copies to the owners, who add them."""
        bank, table = self.bank, self.bank.table
        table.gradient_of(table.owned[bank.name])
        bank.send(
            lambda experts: table.master.new_zeros(len(experts), table.master.shape[1], dtype=self.dtype),
            wanted,
        )
        bank.copying.finish()

    def copies(self, hop: int) -> Present:
        """Every rank wants the first experts of the rank `hop` further on."""
        wanted = np.zeros_like(self.bank.alone)
        for rank in range(self.topology.ranks):
            theirs = np.flatnonzero(self.bank.alone[(rank + hop) % self.topology.ranks])
            wanted[rank, theirs[: self.size]] = True
        return wanted & ~self.bank.alone

    def message(self) -> float:
        """Latency of one of the messages of an exchange, beyond that of an exchange in which nobody sends anything."""
        ranks = self.topology.ranks

        def exchange(length: int) -> float:
            given = torch.zeros(ranks * length, device=self.bank.table.master.device)
            return self.seconds(lambda: self.exchange(given))

        return max(0.0, exchange(1) - exchange(0)) / max(1, ranks - 1)

    def seconds(self, run: Callable[[], object]) -> float:
        """The fastest of some rounds, which all ranks begin together, after one for caches; the next says how many pay.
        Of a round, the slowest rank counts, so that all ranks find the same."""

        def once() -> float:
            self.wait()
            with waiting_for(EXCHANGES, self.dispatcher.group):
                dist.barrier(self.dispatcher.group)
            began = time.perf_counter()
            run()
            self.wait()
            return time.perf_counter() - began

        def slowest(taken: Sequence[float]) -> list[float]:
            every = torch.tensor(taken, dtype=torch.float64, device=self.bank.table.master.device)
            with waiting_for(EXCHANGES, self.dispatcher.group):
                dist.all_reduce(every, op=dist.ReduceOp.MAX, group=self.dispatcher.group)
            return every.tolist()

        once()
        (second,) = slowest([once()])
        rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, round(ENOUGH / max(second, 1e-9))))
        return min(second, *slowest([once() for _ in range(rounds - 1)]))

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.bank.table.master.is_cuda:
            torch.cuda.synchronize()
