"""What `fssdp.py` found under one skew, as a table and as goals met or missed."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timing import Quartiles, Timings, table

from moesaic.parallel.costs import Costs
from moesaic.parallel.traffic import StepTraffic

ALONE, EVERYWHERE, AUTO, AGAIN, HECATE = (
    "expert_parallel",
    "replicate_all",
    "auto",
    "auto, rematerialize",
    "hecate",
)
BALANCED = "expert_parallel, balanced"
"""A step that no plan could improve, in the same rounds."""
GOALS = {1.0: 0.98, 1.5: 1.35, 1.8: 1.60}
"""How much faster than expert parallelism `auto` should be."""
CLEAR = 0.03
"""Two plans are in an order where their ratio is farther from 1, and so are both its quartiles."""
ABOUT = """Every layer has a bank of its own, and a dense projection before it; a step is forward, backward, AdamW and
the next plan. `speed-up`: expert_parallel's time over the plan's, formed in each round. `by processor`: the same of the
processor time that the busier rank spends in a step, which other processes disturb less; waiting is not in it.
`copies`: of the busiest rank, over all layers. MiB sent are those of all ranks in a step. `experts MiB`: weights,
gradients, optimizer state and copies of experts on one rank at their peak; with rematerialize, copies are
sent for when a layer needs them (`prefetch: 0`). `predicted`: the cost model, with prices measured just before, plus
what a balanced step of expert_parallel, in the same rounds, takes beyond its prediction. Two plans are clearly apart
where the quartiles of their ratio are more than 3 % beyond 1, on one side."""


@dataclass(frozen=True)
class Found:
    """What a rank saw of a candidate under one skew."""

    traffic: StepTraffic
    memory: int
    """Bytes of experts on this rank at most: weights, gradient, optimizer state, and all that is made of them."""
    seconds: list[float]
    busy: list[float]
    predicted: float
    """Seconds of all banks together, by the cost model."""


def section(skew: float, found: Sequence[dict[str, Found]], costs: Costs) -> str:
    """One table: a row per plan."""
    balanced = found[0][BALANCED]
    fixed = statistics.median(balanced.seconds) - balanced.predicted
    found = [{name: one for name, one in of_rank.items() if name != BALANCED} for of_rank in found]
    first = found[0]
    timings = Timings({name: one.seconds for name, one in first.items()}, 1)
    busy = {
        name: statistics.median(map(max, zip(*(of_rank[name].busy for of_rank in found), strict=True)))
        for name in first
    }
    memory = {name: max(of_rank[name].memory for of_rank in found) for name in first}
    lines = []
    for name, one in first.items():
        taken, told = timings.time(name), one.predicted + fixed
        before = max(one.traffic.rows_alone) * len(found) / sum(one.traffic.rows_alone)
        sent = one.traffic.sent
        lines.append(
            [
                name,
                taken.text(scale=1e3, digits=0),
                "1" if name == ALONE else timings.ratio(ALONE, name).text(),
                f"{busy[ALONE] / busy[name]:.2f}",
                f"{before:.2f} -> {one.traffic.max_over_mean:.2f}",
                f"{max(one.traffic.copies)}",
                *(f"{sent[what] / 2**20:.0f}" for what in ("tokens", "copies", "copy_gradients")),
                f"{memory[name] / 2**20:.0f}",
                f"{told * 1e3:.0f} ({100 * (told / taken.median - 1):+.0f} %)",
            ]
        )
    header = ["", "ms", "speed-up", "by processor", "rows max/mean", "copies"]
    header += ["MiB rows", "MiB copies", "MiB gradients", "experts MiB", "predicted ms"]
    prices = (
        f"Prices: a row {costs.row / 1e6:.2f} us, an expert {costs.expert / 1e6:.0f} us, a trip of a row "
        f"{costs.row_near / 1e6:.2f} us, a copy {costs.copy_near / 1e9:.2f} ms, its gradient "
        f"{costs.grad_near / 1e9:.2f} ms, a message {costs.message / 1e6:.0f} us. A balanced step of expert_parallel "
        f"took {1e3 * statistics.median(balanced.seconds):.0f} ms."
    )
    goals = verdict(skew, timings, first, fixed, memory, judged=len(found) == 2)
    text = [f"### max/mean {skew}", prices, table(header, lines), goals]
    return "\n\n".join(text)


def verdict(
    skew: float,
    timings: Timings,
    found: Mapping[str, Found],
    fixed: float,
    memory: Mapping[str, int],
    *,
    judged: bool,
) -> str:
    """What there are goals for; where it is `judged`, with the goal, and whether it is met."""
    gain = timings.ratio(ALONE, AUTO).median
    better = min((ALONE, EVERYWHERE), key=lambda name: timings.time(name).median)
    least = timings.ratio(better, AUTO).median
    more = memory[AGAIN] / memory[ALONE] - 1
    times = {name: timings.time(name).median for name in found}
    errors = [abs((one.predicted + fixed) / times[name] - 1) for name, one in found.items()]
    clear = [pair for pair in itertools.combinations(found, 2) if apart(timings.ratio(*pair))]
    right = sum(
        (times[one] < times[other]) == (found[one].predicted < found[other].predicted) for one, other in clear
    )
    goals = [
        (f"auto is {gain:.2f} times as fast as {ALONE}", f"{GOALS[skew]}", gain >= GOALS[skew]),
        (f"{least:.2f} times as fast as {better}, the better of the two", "0.98", least >= 0.98),
        (f"experts' memory with rematerialize {100 * more:+.0f} %", "at most +15 %", more <= 0.15),
        (
            f"of {len(clear)} pairs of plans clearly apart, {right} in the predicted order",
            "all",
            right == len(clear),
        ),
        (f"largest error of a predicted time {max(errors):.0%}", "15 %", max(errors) <= 0.15),
    ]
    if not judged:
        return "\n".join(f"- {text}." for text, _, _ in goals)
    return "\n".join(f"- {text} (goal: {goal}): {'met' if met else 'missed'}." for text, goal, met in goals)


def apart(ratio: Quartiles) -> bool:
    """Whether all of it lies more than `CLEAR` beyond 1, on one side."""
    return ratio.low > 1 + CLEAR or ratio.high < 1 - CLEAR
