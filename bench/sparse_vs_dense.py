"""Held-out loss of the quickstart against a dense model of the same arithmetic per token and the same tokens.

Three learning rates each with one seed, then two more seeds at each one's best. Runs are ordinary `moesaic train` runs
on one thread, as many at a time as --jobs; finished ones are kept, so the script can be stopped and started again.
Results: bench/results/sparse_vs_dense.md and .png.

    python bench/sparse_vs_dense.py --dir runs/sparse_vs_dense [--jobs 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from timing import table, write_result

from moesaic.launch.config import read_run
from moesaic.models.accounting import account

CONFIGS = ("quickstart", "quickstart_dense")
RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (1, 2, 3)
MOESAIC = Path(sys.executable).with_name("moesaic")


@dataclass(frozen=True)
class Job:
    """One run."""

    config: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.config}-lr{self.lr:g}-seed{self.seed}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dir", type=Path, required=True)
    arguments.add_argument("--jobs", type=int, default=2)
    options = arguments.parse_args()

    def run_all(jobs: list[Job]) -> dict[Job, list[tuple[int, float, float]]]:
        with ThreadPoolExecutor(options.jobs) as pool:
            return dict(zip(jobs, pool.map(lambda job: curve(job, options.dir), jobs), strict=True))

    curves = run_all([Job(config, lr, SEEDS[0]) for lr in RATES for config in CONFIGS])
    best = {config: min(RATES, key=lambda lr: last(curves[Job(config, lr, SEEDS[0])])) for config in CONFIGS}
    curves |= run_all([Job(config, best[config], seed) for seed in SEEDS[1:] for config in CONFIGS])
    report(curves, best)


def curve(job: Job, folder: Path) -> list[tuple[int, float, float]]:
    """Train the job where it is not trained yet; (tokens, nats, bits per byte) of its evaluations."""
    path = folder / job.name
    done = path / "samples.txt"
    if not done.exists():
        settings = [f"name={job.name}", f"dir={folder}", f"seed={job.seed}", f"optim.lr={job.lr}"]
        settings += ["train.threads=1", "eval.every=100", "eval.tokens=65536", "checkpoint.every=0"]
        command = [MOESAIC, "train", job.config, *settings, "--resume"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    tokens = read_run(job.config).train.batch_tokens
    return [
        (r["step"] * tokens, r["eval/loss"], r["eval/bits_per_byte"]) for r in records if "eval/loss" in r
    ]


def last(points: list[tuple[int, float, float]]) -> float:
    """Held-out nats at the end."""
    return points[-1][1]


def report(curves: dict[Job, list[tuple[int, float, float]]], best: dict[str, float]) -> None:
    """Tables, the crossing, and a plot."""
    sweep = []
    for config in CONFIGS:
        losses = [f"{last(curves[Job(config, lr, SEEDS[0])]):.4f}" for lr in RATES]
        sweep.append([config, *losses])
    finals, sizes = [], []
    for config in CONFIGS:
        ends = [curves[Job(config, best[config], seed)][-1] for seed in SEEDS]
        nats, bits = [e[1] for e in ends], [e[2] for e in ends]
        finals.append(
            [
                config,
                f"{best[config]:g}",
                f"{statistics.mean(nats):.4f}",
                f"{min(nats):.4f} to {max(nats):.4f}",
                f"{statistics.stdev(nats):.4f}",
                f"{statistics.mean(bits):.4f}",
            ]
        )
        run = read_run(config)
        counted = account(run.model, 4096, seq_len=run.data.seq_len)
        flops = f"{counted.train_flops_per_token / 1e6:.2f}"
        sizes.append([config, f"{counted.parameters:,}", f"{counted.active_parameters:,}", flops])
    mean = {
        config: [
            (at[0][0], statistics.mean(point[1] for point in at))
            for at in zip(*(curves[Job(config, best[config], seed)] for seed in SEEDS), strict=True)
        ]
        for config in CONFIGS
    }
    lead = [(tokens, dense - sparse) for (tokens, sparse), (_, dense) in zip(*mean.values(), strict=True)]
    rows = [[f"{tokens:,}", f"{gap:+.4f}"] for tokens, gap in lead]
    plot(mean)
    sections = [
        "Same tokens in the same order, same arithmetic per token, held-out loss on 65,536 tokens. One thread a run.",
        table(["", "parameters", "active", "training MFLOP per token"], sizes),
        "## Held-out nats per token at the end, seed 1, by learning rate\n\n"
        + table(["", *(f"{lr:g}" for lr in RATES)], sweep),
        "## At each one's best learning rate, three seeds\n\n"
        + table(["", "lr", "mean nats", "range", "deviation", "mean bits/byte"], finals),
        "## Dense minus sparse (mean nats), along training; positive: sparse is ahead\n\n"
        + table(["tokens", "difference"], rows),
        "![Held-out loss over tokens](sparse_vs_dense.png)",
    ]
    path = write_result(
        "sparse_vs_dense", "Sparse against dense", "python bench/sparse_vs_dense.py --dir DIR", 1, sections
    )
    print(path.read_text())


def plot(mean: dict[str, list[tuple[int, float]]]) -> None:
    """Loss over tokens, mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=120, layout="constrained")
    for config, points in mean.items():
        axes.plot(
            [tokens / 1e6 for tokens, _ in points], [loss for _, loss in points], label=config, marker="."
        )
    axes.set(xlabel="million tokens", ylabel="held-out nats per token (mean of 3 seeds)", yscale="log")
    axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(Path(__file__).parent / "results" / "sparse_vs_dense.png")


if __name__ == "__main__":
    main()
