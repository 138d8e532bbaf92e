"""One MoE layer whose experts are owned by two ranks, forward and backward: against the arithmetic of the busier rank
alone, and against the layer that one writes with `all_to_all_single` and `F.grouped_mm`.

Forked gloo ranks with one thread each, the same weights, tokens and choices on both sides; outputs and gradients are
compared before anything is timed. Balanced tokens choose by a softmax gate, skewed ones are told. DeepSpeed's layer
joins where it is installed and tokens choose: it has no way to be told. Its time includes its gate; outputs are
compared too. Results: bench/results/expert_parallel.md.

    python bench/expert_parallel.py [--rounds 15] [--shapes 0 1] [--dtypes float32 bfloat16]
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from peers import AllToAllPeer, deepspeed_layer
from timing import Timings, interleave, refuse_other_results, table, write_result
from torch import Tensor

from moesaic.kernels.expert_mlp import expert_rows
from moesaic.moe import MoE, TopKRouter
from moesaic.moe.routing import Routing
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.own import own_experts
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.shard import slot_tables
from moesaic.parallel.spawn import run_ranks
from moesaic.train.device import tune_host

RANKS = 2
SHAPES = [(256, 512, 16, 2, 1024), (512, 1024, 8, 2, 2048)]
"""D, F, E, K, T of each rank."""
TINY = (32, 32, 4, 2, 64)
SKEW = {"balanced": None, "skewed": 1.0}
"""Expert e is drawn in proportion to 1 / (1 + e) ** skew: the first rank has the popular half. None: a gate chooses."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Largest difference over the largest value."""
PASSES = 3
"""Forward and backward passes before memory is read."""
ALONE, OURS, PEER, DEEPSPEED = (
    "its arithmetic alone",
    "moesaic",
    "all_to_all_single + grouped_mm",
    "DeepSpeed",
)


@dataclass(frozen=True)
class Found:
    """What a rank saw of a candidate: compared, not timed."""

    y: Tensor
    x: Tensor
    gates: Tensor
    w1: Tensor
    w2: Tensor


class Problem:
    """This rank's tokens and experts."""

    def __init__(self, shape: tuple[int, ...], skew: float | None, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        D, F, E, K, T = shape
        weights = torch.Generator().manual_seed(0)
        rank, here = dist.get_rank(), E // RANKS
        mine = slice(rank * here, (rank + 1) * here)
        self.w1 = (torch.randn(E, 2, F, D, generator=weights) * D**-0.5).to(dtype)[mine].clone()
        self.w2 = (torch.randn(E, D, F, generator=weights) * F**-0.5).to(dtype)[mine].clone()
        tokens = torch.Generator().manual_seed(1 + rank)
        self.x = torch.randn(T, D, generator=tokens).to(dtype)
        self.grad = torch.randn(T, D, generator=tokens).to(dtype)
        gate = torch.randn(E, D, generator=weights) * D**-0.5
        self.gate = gate if skew is None else None
        """With which tokens choose, if they do."""
        if skew is None:
            likely, self.experts = (self.x.float() @ gate.T).softmax(-1).topk(K)
            self.gates = likely / likely.sum(-1, keepdim=True)
        else:
            popularity = (1.0 + torch.arange(E)) ** -skew
            self.experts = popularity.expand(T, -1).multinomial(K, generator=tokens)
            self.gates = torch.rand(T, K, generator=tokens)
        counts = self.experts.flatten().bincount(minlength=E)
        dist.all_reduce(counts)
        self.counts = counts[mine].clone()
        """Rows of each expert that is here, from everywhere."""
        self.group = dist.group.WORLD

    def pass_of(self, layer: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and gradients of tokens and gates; gradients of weights are left where they are."""
        x, gates = self.x.detach().requires_grad_(), self.gates.detach().requires_grad_()
        y = layer(x, gates)
        y.backward(self.grad)
        assert x.grad is not None
        assert gates.grad is not None
        return y.detach(), x.grad, gates.grad

    def ours(self) -> Callable[[], Found]:
        D, F, E, K, T = self.shape
        layer = MoE(MoE.Config(num_experts=E, hidden=F, router=TopKRouter.Config(k=K)), D).to(self.dtype)
        own_experts(layer, ParallelConfig(experts=OwnedExperts()), ranks_of(ParallelConfig(), "cpu"))
        (held,) = slot_tables(layer)
        with torch.no_grad():
            held.master.copy_(torch.cat([self.w1.flatten(1), self.w2.flatten(1)], 1))
        unused = torch.zeros(T, E)

        def run(x: Tensor, gates: Tensor) -> Tensor:
            choice = Routing.token_choice(self.experts, gates, probabilities=unused, logits=unused)
            return layer(x, choice)

        def once() -> Found:
            layer.zero_grad()
            seen = self.pass_of(run)
            assert held.master.grad is not None
            w1, w2 = held.master.grad.split([self.w1[0].numel(), self.w2[0].numel()], 1)
            return Found(*seen, w1.view_as(self.w1), w2.view_as(self.w2))

        return once

    def peer(self) -> Callable[[], Found]:
        assert self.group is not None
        layer = AllToAllPeer(self.w1, self.w2, self.group)

        def once() -> Found:
            layer.zero_grad()
            seen = self.pass_of(lambda x, gates: layer(x, self.experts, gates.to(x.dtype)))
            assert layer.w1.grad is not None
            assert layer.w2.grad is not None
            return Found(*seen, layer.w1.grad, layer.w2.grad)

        return once

    def alone(self) -> Callable[[], object]:
        """The rows that arrive here through the experts that are here, and back."""
        rows = torch.randn(int(self.counts.sum()), self.shape[0]).to(self.dtype)
        grad = torch.randn_like(rows)

        def once() -> object:
            leaves = [tensor.detach().requires_grad_() for tensor in (rows, self.w1, self.w2)]
            y = expert_rows(leaves[0], leaves[1], leaves[2], self.counts, kind="swiglu")
            return torch.autograd.grad(y, leaves, grad)

        return once

    def deepspeed(self, gate: Tensor) -> Callable[[], Tensor]:
        """Its layer, forward and backward; gives the output."""
        K = self.shape[3]
        layer = deepspeed_layer(gate, K, RANKS, self.w1, self.w2).to(self.dtype)

        def once() -> Tensor:
            layer.zero_grad()
            x = self.x.detach().requires_grad_()
            y = layer(x)[0]
            y.backward(self.grad)
            return y.detach()

        return once

    def compare(self, ours: Found, theirs: Found) -> None:
        for field in fields(Found):
            self.compare_values(field.name, getattr(ours, field.name), getattr(theirs, field.name))

    def compare_values(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        refuse_other_results(name, theirs, ours, TOLERANCE[self.dtype])


def measured(
    shape: tuple[int, ...], skew: float | None, dtype: torch.dtype, rounds: int
) -> tuple[Timings, int]:
    """On one rank: times of all candidates, each from a common start to the end of the last rank; and rows here."""
    problem = Problem(shape, skew, dtype)
    ours, peer = problem.ours(), problem.peer()
    seen = ours()
    problem.compare(seen, peer())
    calls: dict[str, Callable[[], object]] = {ALONE: problem.alone(), OURS: ours, PEER: peer}
    if find_spec("deepspeed") and problem.gate is not None:
        calls[DEEPSPEED] = theirs = problem.deepspeed(problem.gate)
        problem.compare_values(DEEPSPEED, seen.y, theirs())

    def together(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (call(), dist.barrier())

    timings = interleave({name: together(call) for name, call in calls.items()}, rounds=rounds)
    return timings, int(problem.counts.sum())


def peak_of(name: str, shape: tuple[int, ...], skew: float | None, dtype: torch.dtype) -> int:
    """Bytes that a fresh process takes at most beyond weights and inputs, in a few passes."""

    def made(shape: tuple[int, ...]) -> Callable[[], object]:
        problem = Problem(shape, skew, dtype)
        return {OURS: problem.ours, PEER: problem.peer}[name]()

    made(TINY)()  # whatever is loaded at first use
    call = made(shape)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest memory starts here
    for _ in range(PASSES):
        call()
        dist.barrier()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def section(shape: tuple[int, ...], kind: str, dtype: torch.dtype, rounds: int) -> str:
    """One table: a row per candidate."""
    skew = SKEW[kind]
    results = run_ranks(lambda: measured(shape, skew, dtype, rounds), RANKS, timeout=1800)
    timings, rows = results[0][0], [found for _, found in results]
    peaks = {
        name: max(run_ranks(lambda name=name: peak_of(name, shape, skew, dtype), RANKS, timeout=600))
        for name in (OURS, PEER)
    }
    lines = [
        [
            name,
            timings.time(name).text(scale=1e3, digits=1),
            "1" if name == ALONE else timings.ratio(name, ALONE).text(),
            "1" if name == PEER else timings.ratio(name, PEER).text(),
            f"{peaks[name] / 2**20:.0f}" if name in peaks else "",
        ]
        for name in timings.seconds
    ]
    D, F, E, K, T = shape
    title = f"## D {D}, F {F}, E {E}, K {K}, T {T} per rank, {str(dtype).removeprefix('torch.')}, {kind}"
    said = f"Rows that arrive at each rank: {', '.join(map(str, rows))}."
    found = table(["", "ms", "/ alone", "/ peer", "peak MiB"], lines)
    return f"{title}\n\n{said}\n\n{found}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = arguments.parse_args()
    tune_host()
    torch.set_num_threads(1)  # before ranks are forked
    sections = []
    for shape in (SHAPES[i] for i in options.shapes):
        for dtype in (getattr(torch, name) for name in options.dtypes):
            for kind in SKEW:
                sections.append(section(shape, kind, dtype, options.rounds))
                print(sections[-1], flush=True)
    if not find_spec("deepspeed"):
        sections.append("DeepSpeed is not installed here, so its layer was not timed.")
    command = (
        f"python bench/expert_parallel.py --rounds {options.rounds}"
        f" --shapes {' '.join(map(str, options.shapes))} --dtypes {' '.join(options.dtypes)}"
    )
    write_result("expert_parallel", "One layer of owned experts on two ranks", command, 1, sections)


if __name__ == "__main__":
    main()
