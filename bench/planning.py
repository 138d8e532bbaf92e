"""What planners of copies cost and save: a trace of routing, replayed through every planner and the cost model.

Times of planning are measured, as time of the processor over several replays: on a machine with other work the best of
them tells most. Times of steps are the model's (`parallel/costs.py`), for the machine written below, and no
measurement. Every planner sees the steps before the one it plans, and exact ones the step itself. Results:
bench/results/planning.md.

    python bench/planning.py [--trace FILE] [--ranks-per-node 8] [--steps 12] [--replays 5]

FILE is an npz whose `counts` (steps, layers, sources, experts) says how many rows each rank had for each expert.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timing import Quartiles, table, write_result

from moesaic.parallel.auto import AutoConfig
from moesaic.parallel.costs import Costs, layer_time
from moesaic.parallel.fastermoe import FasterMoEConfig
from moesaic.parallel.hecate import HecateConfig, heterogeneous_owners, hidden_experts
from moesaic.parallel.placement import OwnerMap, Topology, even_owners, no_copies
from moesaic.parallel.plans import ExpertParallelConfig, PlanConfig, ReplicateAllConfig, build_planner

WINDOW = 5
PLANNERS: dict[str, tuple[PlanConfig, bool]] = {
    "expert_parallel": (ExpertParallelConfig(), False),
    "replicate_all": (ReplicateAllConfig(), False),
    "fastermoe": (FasterMoEConfig(), False),
    "hecate": (HecateConfig(window=WINDOW), False),
    "hecate, heterogeneous owners": (HecateConfig(window=WINDOW), True),
    "hecate, calibrated": (HecateConfig(window=WINDOW, calibrate=True), False),
    "hecate, 4 copies": (HecateConfig(window=WINDOW, most_copies=4), False),
    "auto": (AutoConfig(window=WINDOW), False),
    "auto, heterogeneous owners": (AutoConfig(window=WINDOW), True),
    "auto, 4 copies": (AutoConfig(window=WINDOW, most_copies=4), False),
}
"""Name -> config, and whether owners are those of algorithm 2 instead of even runs."""
D, F, DENSE = 2048, 1024, 4
"""Width, hidden width of an expert (three matrices, bf16, gradients in fp32), and how many experts' arithmetic the
other work on a token takes."""
FLOPS, PORT, LINK = 300e12, 300e9, 50e9
"""Of a rank: arithmetic per second in practice, bytes per second within its node; of a node, bytes per second to
others."""
ROWS = Costs(row=1, copy_near=0, copy_far=0, grad_near=0, grad_far=0)
"""With these, a layer's time is the rows of the busiest rank."""


def costs_for(rows: float) -> Costs:
    """Prices of the machine above, where a rank has so many rows and its other work grows with them."""

    def picoseconds(seconds: float) -> int:
        return round(seconds * 1e12)

    forward = 6 * D * F / FLOPS
    weights = 3 * D * F
    return Costs(
        row=picoseconds(3 * forward),
        expert=picoseconds(10e-6),
        row_near=picoseconds(2 * D / PORT),
        row_far=picoseconds(2 * D / LINK),
        copy_near=picoseconds(2 * weights / PORT),
        copy_far=picoseconds(2 * weights / LINK),
        grad_near=picoseconds(4 * weights / PORT),
        grad_far=picoseconds(4 * weights / LINK),
        message=picoseconds(5e-6),
        hidden_forward=picoseconds(DENSE * rows * forward),
        hidden_backward=picoseconds(2 * DENSE * rows * forward),
    )


def generated(steps: int, layers: int, sources: int, experts: int) -> np.ndarray:
    """Popularity that falls by a power of the expert's place, another in each layer, and drifts from step to step; each
    rank draws its rows."""
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(experts) for _ in range(layers)])
    heat = -np.linspace(0.3, 1.0, layers)[:, None] * np.log1p(places)
    counts = np.empty((steps, layers, sources, experts), np.int64)
    for step in range(steps):
        heat = heat + 0.05 * rng.standard_normal(heat.shape)
        popularity = np.exp(heat) / np.exp(heat).sum(1, keepdims=True)
        counts[step] = np.stack([rng.multinomial(8192, each, sources) for each in popularity])
    return counts


@dataclass(frozen=True)
class Replay:
    """What a planner did to a trace."""

    planning: list[float]
    """Seconds for all layers, of each step."""
    time: int
    """Modelled picoseconds, over all steps and layers."""
    busiest: int
    """Rows of the busiest rank, over all steps and layers."""
    copies: int
    """Experts sent, over all steps and layers."""


def replay(
    counts: np.ndarray, config: PlanConfig, owners: OwnerMap, topology: Topology, costs: Costs
) -> Replay:
    """Plan and price every step but the first WINDOW."""
    steps, layers = counts.shape[:2]
    planners = [build_planner(config, costs) for _ in range(layers)]
    seconds, total, busiest, copies = [], 0, 0, 0
    for step in range(WINDOW, steps):
        history = [list(counts[step - WINDOW : step, layer]) for layer in range(layers)]
        began = time.process_time()
        early = [
            planner.plan(history[layer], None, owners.owners[str(layer)], topology)
            for layer, planner in enumerate(planners)
        ]
        plans = [
            early[layer]
            | planner.plan(history[layer], counts[step, layer], owners.owners[str(layer)], topology)
            if planner.exact
            else early[layer]
            for layer, planner in enumerate(planners)
        ]
        seconds.append(time.process_time() - began)
        for layer, (plan, planned) in enumerate(zip(plans, early, strict=True)):
            here, true = owners.owners[str(layer)], counts[step, layer]
            total += layer_time(true, plan, here, topology, costs, planned=planned)
            busiest += layer_time(true, plan, here, topology, ROWS)
            copies += int((plan & ~no_copies(here, topology.ranks)).sum())
    return Replay(seconds, total, busiest, copies)


def section(title: str, counts: np.ndarray, topology: Topology, replays: int) -> str:
    """One table: a row per planner."""
    steps, layers, ranks, experts = counts.shape
    mean = counts[WINDOW:].sum() / ranks
    costs = costs_for(mean / (steps - WINDOW) / layers)
    even = even_owners({str(layer): experts for layer in range(layers)}, ranks)
    hot = min(experts, hidden_experts(costs, topology))
    loads = {str(layer): counts[:WINDOW, layer].sum((0, 1)).tolist() for layer in range(layers)}
    uneven = heterogeneous_owners(loads, hot, topology)
    found = {
        name: [replay(counts, config, uneven if other else even, topology, costs) for _ in range(replays)]
        for name, (config, other) in PLANNERS.items()
    }
    planning = {name: [second for each in those for second in each.planning] for name, those in found.items()}
    alone = found["expert_parallel"][0]
    plans = (steps - WINDOW) * layers
    lines = [
        [
            name,
            f"{1e3 * min(planning[name]):.2f}",
            Quartiles.of(planning[name]).text(scale=1e3),
            f"{each.time / alone.time:.3f}",
            f"{each.busiest / mean:.2f}",
            f"{each.copies / plans / ranks:.2f}",
        ]
        for name, (each, *_) in found.items()
    ]
    header = [
        "",
        "ms to plan all layers, best",
        "median (quartiles)",
        "modelled time / expert_parallel",
        "rows max/mean",
        "copies per rank",
    ]
    return (
        f"## {title}\n\n{steps - WINDOW} steps of {layers} layers, {experts} experts, {ranks} ranks, "
        f"{topology.ranks_per_node} on a node; other work hides {hot} experts copied everywhere."
        f"\n\n{table(header, lines)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument(
        "--steps", type=int, default=12, help=f"of the trace, spread over it; {WINDOW} are history"
    )
    parser.add_argument("--replays", type=int, default=5)
    args = parser.parse_args()
    if args.replays < 1:
        parser.error(f"--replays: {args.replays} is not positive")
    if args.steps <= WINDOW:
        parser.error(f"--steps: {args.steps} leaves none after the first {WINDOW}")
    command = f"python bench/planning.py --steps {args.steps} --ranks-per-node {args.ranks_per_node}"
    command += f" --replays {args.replays}"
    if args.trace:
        with np.load(args.trace) as stored:
            counts = stored["counts"]
        counts = counts[np.linspace(0, len(counts) - 1, min(args.steps, len(counts))).astype(int)].astype(
            np.int64
        )
        title, command = f"Trace {args.trace.name}", f"{command} --trace {args.trace.name}"
    else:
        counts, title = generated(args.steps, 24, 64, 128), "Generated: power laws of 0.3 to 1.0, drifting"
    text = section(title, counts, Topology(counts.shape[2], args.ranks_per_node), args.replays)
    machine = (
        f"The step's time is modelled, for D {D}, F {F}, {FLOPS / 1e12:.0f} TFLOP/s and {PORT / 1e9:.0f} GB/s per "
        f"rank, {LINK / 1e9:.0f} GB/s per node; nothing of it was measured. It is that of the experts' layers alone, "
        "with copies that other work hides. Rows and copies are means over steps and layers; planning is the "
        f"best and the median, with quartiles, over the steps of {args.replays} replays, on one core."
    )
    print(text)
    write_result("planning", "Planners of copies", command, 1, [machine, text])


if __name__ == "__main__":
    main()
