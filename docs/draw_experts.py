"""Draw the pictures of experts_across_ranks.md from the counts of a real run, and print the numbers that it quotes.

    python docs/draw_experts.py runs/trace [FOLDER]

The run has a plan with copies, and checkpoints at most 16 steps apart, all of them kept: each holds the counts of the
steps before it. Times are those of the cost model. Dims: P ranks, E experts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.parallel.auto import AutoConfig
from moesaic.parallel.checkpoint import read_meta
from moesaic.parallel.costs import Costs, layer_time
from moesaic.parallel.fastermoe import FasterMoEConfig
from moesaic.parallel.hecate import HecateConfig
from moesaic.parallel.placement import Counts, Present, Topology, even_owners, no_copies, token_plan
from moesaic.parallel.plans import ExpertParallelConfig, PlanConfig, ReplicateAllConfig, build_planner

PLANS: dict[str, PlanConfig] = {
    "expert_parallel": ExpertParallelConfig(),
    "replicate_all": ReplicateAllConfig(),
    "fastermoe": FasterMoEConfig(),
    "hecate, overlap 4": HecateConfig(overlap=4),
    "auto": AutoConfig(),
}
COLORS = dict(zip(PLANS, ("#0072b2", "#8a8f98", "#b4508a", "#00835f", "#d55e00"), strict=True))
ROW = 1_000_000
"""One microsecond for a row; everything else is told in rows."""
COPIES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Rows that take as long as one copy and the return of its gradient."""
SHOWN, STEP = 1, 40  # the bank, by number, and the step that the first picture shows
SHOWN_PRICE = 128


def main(run: Path, folder: Path) -> None:
    rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "experts", "font.size": 9, "font.family": "sans-serif"}
    )
    banks = counts_of(run)
    name, trace = list(banks.items())[SHOWN]
    ranks, experts = trace[0].shape
    topology = Topology(ranks, ranks)
    owners = even_owners({name: experts}, ranks).owners[name]
    print(
        f"{len(trace)} steps, {ranks} ranks, {experts} experts of {name}, {int(trace[0].sum())} rows a step"
    )
    save(draw_plan(trace, owners, topology), folder / "plan.svg")
    save(draw_balance(trace, owners, topology), folder / "balance.svg")
    save(draw_prices(trace, owners, topology), folder / "prices.svg")
    save(draw_step(), folder / "step.svg")


def counts_of(run: Path) -> dict[str, list[Counts]]:
    """What each bank counted in every step, from the histories that checkpoints hold."""
    found: dict[str, dict[int, Counts]] = {}
    for path in sorted((run / "checkpoints").iterdir()):
        meta = read_meta(path)
        for bank, history in meta["rules"]["plan"]["history"].items():
            first = meta["step"] - len(history)
            found.setdefault(bank, {}).update(
                {first + i: np.array(c, np.int64) for i, c in enumerate(history)}
            )
    return {bank: [of[step] for step in sorted(of)] for bank, of in found.items()}


def prices(copy: int, *, hidden: int = 0) -> Costs:
    """A copy and its gradient cost so many rows, a row's trip a tenth of its arithmetic. `hidden`: rows per pass."""
    half = copy * ROW // 2
    costs = Costs(row=ROW, row_near=ROW // 10, copy_near=half, copy_far=half, grad_near=half, grad_far=half)
    return Costs(**{**vars(costs), "hidden_forward": hidden * ROW, "hidden_backward": hidden * ROW})


def plans_of(
    config: PlanConfig, trace: Sequence[Counts], owners: tuple[int, ...], topology: Topology, costs: Costs
) -> list[Present]:
    """A plan for every step, from the steps before it, and where the planner is exact from its own counts too."""
    planner, found = build_planner(config, costs), []
    for step, counts in enumerate(trace):
        plan = planner.plan(trace[max(0, step - 16) : step], None, owners, topology)
        if planner.exact:
            plan = plan | planner.plan(trace[max(0, step - 16) : step], counts, owners, topology)
        found.append(plan)
    return found


def seconds(
    name: str, trace: Sequence[Counts], owners: tuple[int, ...], topology: Topology, costs: Costs
) -> float:
    """Modelled seconds of the whole run in one bank."""
    total, alone = 0, no_copies(owners, topology.ranks)
    for counts, plan in zip(trace, plans_of(PLANS[name], trace, owners, topology, costs), strict=True):
        planned = alone if name == "fastermoe" else None  # sent when the counts are known, behind nothing
        total += layer_time(counts, plan, owners, topology, costs, planned=planned)
    return total / 1e12


def rows_of(counts: Counts, plan: Present, topology: Topology) -> np.ndarray:
    return token_plan(counts, plan, topology).sum((0, 1))


def draw_plan(trace: Sequence[Counts], owners: tuple[int, ...], topology: Topology) -> Figure:
    """One step: who wants what, who has what, and the rows that follow."""
    counts = trace[STEP]
    plan = plans_of(PLANS["auto"], trace[: STEP + 1], owners, topology, prices(SHOWN_PRICE))[STEP]
    alone = no_copies(owners, topology.ranks)
    figure, axes = panels(3, 2.6, (1.25, 1.25, 1))
    image = axes[0].imshow(counts, cmap="Blues", vmin=0, aspect="auto")
    figure.colorbar(image, ax=axes[0], fraction=0.05, pad=0.02)
    axes[0].set_title("tokens that each rank has for each expert")
    kinds = np.where(alone, 2, np.where(plan, 1, 0))
    axes[1].imshow(np.choose(kinds[..., None], [[255] * 3, [240, 170, 120], [213, 94, 0]]), aspect="auto")
    axes[1].set_title("plan: owners (dark) and copies (light)")
    for ax in axes[:2]:
        ax.set(xlabel="expert", ylabel="rank", yticks=range(topology.ranks), xticks=range(0, len(owners), 3))
        ax.set_xticks(np.arange(-0.5, len(owners)), minor=True)
        ax.set_yticks(np.arange(-0.5, topology.ranks), minor=True)
        ax.grid(which="minor", color="#d5d9de", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    place = np.arange(topology.ranks)
    before, after = (rows_of(counts, one, topology) for one in (alone, plan))
    axes[2].barh(place - 0.2, before, 0.38, color=COLORS["expert_parallel"], label="owners alone")
    axes[2].barh(place + 0.2, after, 0.38, color=COLORS["auto"], label="with the copies")
    axes[2].axvline(before.mean(), color="#5d6875", linewidth=0.8, linestyle="--")
    axes[2].set(xlabel="rows", ylabel="rank", yticks=place, title="rows that come to each rank")
    axes[2].set_ylim(topology.ranks + 0.25, -0.6)
    axes[2].legend(frameon=False, loc="lower right", ncols=2, fontsize=7.5, columnspacing=1)
    print(
        f"step {STEP}: rows {before.tolist()} alone, {after.tolist()} with {int((plan & ~alone).sum())} copies"
    )
    return figure


def draw_balance(trace: Sequence[Counts], owners: tuple[int, ...], topology: Topology) -> Figure:
    """Loads of experts over the run, and the busiest rank under three plans."""
    figure, axes = panels(2, 2.7, (1, 1.1))
    loads = np.array([counts.sum(0) / counts.sum() * counts.shape[1] for counts in trace]).T
    image = axes[0].imshow(loads, cmap="Blues", vmin=0, vmax=4, aspect="auto")
    figure.colorbar(image, ax=axes[0], fraction=0.05, pad=0.02)
    axes[0].set(xlabel="step", ylabel="expert", title="load of each expert over the mean")
    for name in ("expert_parallel", "hecate, overlap 4", "auto"):
        plans = plans_of(PLANS[name], trace, owners, topology, prices(SHOWN_PRICE))
        rows = [rows_of(*pair, topology) for pair in zip(trace, plans, strict=True)]
        peaks = [of.max() / of.mean() for of in rows]
        copies = np.mean([plan.sum() - len(owners) for plan in plans])
        print(f"{name}: busiest rank over the mean {np.mean(peaks):.2f}, copies a step {copies:.1f}")
        axes[1].plot(peaks, color=COLORS[name], linewidth=1.2, label=name)
    lines(axes[1], "step", "busiest rank / mean", "the same tokens under three plans")
    axes[1].set_ylim(0.95)
    return figure


def draw_prices(trace: Sequence[Counts], owners: tuple[int, ...], topology: Topology) -> Figure:
    """Modelled time over that of perfect balance, by the price of a copy; exposed, and half hidden."""
    figure, axes = panels(2, 3.0, (1, 1))
    rows = trace[0].sum() // topology.ranks
    ideal = len(trace) * rows * ROW / 1e12
    for ax, hidden, title in (
        (axes[0], 0, "nothing hides copies"),
        (axes[1], 256, "256 rows' time hides them, per pass"),
    ):
        for name in PLANS:
            costs = [prices(copy, hidden=hidden) for copy in COPIES]
            found = [seconds(name, trace, owners, topology, one) / ideal for one in costs]
            ax.plot(COPIES, found, color=COLORS[name], marker="o", markersize=2.5, linewidth=1.2, label=name)
            print(
                f"{title}, {name}: " + ", ".join(f"{c}: {t:.2f}" for c, t in zip(COPIES, found, strict=True))
            )
        lines(ax, "price of a copy and its gradient, in rows", "modelled time / balanced arithmetic", title)
        ax.set_xscale("log", base=2)
        ax.set_xticks(COPIES, [str(copy) for copy in COPIES])
        ax.set_ylim(1, 3)
    return figure


def draw_step() -> Figure:
    """A layer's forward and backward pass on one rank, in time; a sketch, not a measurement."""
    figure, (axes,) = panels(1, 2.7, (1,))
    lanes = ("compute", "rows travel", "copies travel", "gradients travel")
    own, sent, back, freed = "#cfd6de", COLORS["expert_parallel"], COLORS["auto"], COLORS["hecate, overlap 4"]
    bars = [
        (0, 0.0, 2.0, own, "attention"),
        (0, 2.0, 0.5, own, "route"),
        (0, 3.2, 0.9, own, "shared"),
        (0, 4.1, 1.6, own, "experts"),
        (0, 6.5, 0.6, own, "sum"),
        (1, 2.5, 0.3, sent, ""),
        (1, 2.8, 1.3, sent, "rows"),
        (1, 5.7, 0.8, sent, "back"),
        (2, 0.0, 2.6, back, "SparseAllGather"),
        (0, 8.2, 0.6, own, "sum"),
        (0, 9.7, 2.4, own, "experts"),
        (0, 13.0, 3.0, own, "attention"),
        (1, 8.8, 0.9, sent, "back"),
        (1, 12.1, 0.9, sent, "rows"),
        (2, 7.6, 2.0, back, "again, if freed"),
        (3, 12.1, 3.4, freed, "SparseReduceScatter"),
    ]
    for lane, start, length, color, text in bars:
        axes.barh(lane, length, left=start, height=0.62, color=color, edgecolor="white")
        dark = color == own
        axes.text(
            start + length / 2,
            lane,
            text,
            ha="center",
            va="center",
            color="#1c2430" if dark else "white",
            fontsize=7.5,
        )
    axes.axvline(7.35, color="#5d6875", linewidth=0.8, linestyle="--")
    axes.text(7.25, -0.62, "forward", ha="right", color="#5d6875")
    axes.text(7.45, -0.62, "backward", color="#5d6875")
    axes.annotate(
        "counts: the host waits",
        (2.65, 1.32),
        (3.2, 1.78),
        fontsize=7.5,
        arrowprops={"arrowstyle": "-", "lw": 0.6},
    )
    axes.set(yticks=range(4), yticklabels=lanes, ylim=(3.5, -0.9), xlim=(0, 16.2), xticks=[], xlabel="time")
    return figure


def panels(number: int, height: float, widths: Sequence[float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.5, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, number, width_ratios=widths, squeeze=False)[0].tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def lines(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(color="#e9ecf0", linewidth=0.6)
    axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.title.set_fontsize(9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("experts"))
