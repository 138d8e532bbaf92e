"""Balanced assignment against scipy, which gets a column for every place of every expert: times and totals.

python bench/auction.py [--rounds 3] [--threads 1]
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import Quartiles, interleave, table
from torch import Tensor

from moesaic.kernels.auction import balanced_assignment, quotas

WIDTH = 512
"""D: features per token."""
COMPARED = (4096, 64)
ALONE = (16384, 128)
"""T, E. At the second, scipy would need 2 GiB and minutes."""
OFFSETS = {"Gaussian features": 0.0, "features with a shared offset": 1.0}
"""Standard deviation of what all tokens have in common; that of what they do not is 1."""


def features_times_centroids(tokens: int, experts: int, offset: float) -> Tensor:
    """Scores: Gaussian features times orthogonal centroids of gain 0.1. Source: BASE layers, arXiv:2103.16716."""
    torch.manual_seed(0)
    centroids = torch.nn.init.orthogonal_(torch.empty(experts, WIDTH), gain=0.1)
    return (torch.randn(tokens, WIDTH) + offset * torch.randn(WIDTH)) @ centroids.T


def by_scipy(places: np.ndarray) -> np.ndarray:
    """The column of each token."""
    return linear_sum_assignment(places, maximize=True)[1]


def auction_section(rounds: int = 3, threads: int = 1) -> str:
    """One table: our time, scipy's, and how far our total is from the optimum. Quotas are checked first."""
    rows = []
    for (tokens, experts), compared in ((COMPARED, True), (ALONE, False)):
        for name, offset in OFFSETS.items():
            scores = features_times_centroids(tokens, experts, offset)
            quota = quotas(tokens, experts)
            chosen = balanced_assignment(scores)
            if chosen.bincount(minlength=experts).tolist() != quota:
                raise ValueError(f"{name}: quotas are not exact; no times for that")
            greedy = scores.argmax(1).bincount(minlength=experts).max().item() / (tokens / experts)
            calls: dict[str, Callable[[], object]] = {"moesaic": partial(balanced_assignment, scores)}
            cells = ["", "", "", ""]
            if compared:
                places = np.repeat(scores.double().numpy(), quota, axis=1)
                best = places[np.arange(tokens), by_scipy(places)].sum()
                missing = best - scores.double().gather(1, chosen[:, None]).sum().item()
                calls["scipy"] = partial(by_scipy, places)
                cells[2:] = [f"{missing / abs(best):.1e}", f"{missing / tokens:.1e}"]
            timings = interleave(calls, rounds=rounds, warmup=0, threads=threads)  # both have run before
            if compared:
                cells[:2] = [
                    timings.time("scipy").text(scale=1e3, digits=0),
                    inverse(timings.ratio("moesaic", "scipy")),
                ]
            ours = timings.time("moesaic").text(scale=1e3, digits=1)
            rows.append([f"T {tokens}, E {experts}, {name}", f"{greedy:.1f}", ours, *cells])
    header = [
        "",
        "greedy load / quota",
        "ms",
        "scipy, ms",
        "scipy / ours",
        "total missing, relative",
        "per token",
    ]
    return f"## Balanced assignment, {threads} thr.\n\n{table(header, rows)}"


def inverse(ratio: Quartiles) -> str:
    """How many times faster, for ratios far below 1."""
    return Quartiles(1 / ratio.high, 1 / ratio.median, 1 / ratio.low).text(digits=0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    print(auction_section(options.rounds, options.threads))


if __name__ == "__main__":
    main()
