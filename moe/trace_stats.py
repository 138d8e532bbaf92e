"""How uneven a routing trace is, and how fast it moves. Numpy only.

Dims: N steps, L layers, S sources, E experts, P ranks.
"""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Shaped

from moesaic.moe.trace import RoutingTrace

EXPONENTS = np.linspace(0, 8, 8001)


def trace_stats(trace: RoutingTrace, owners: Int[np.ndarray, " E"]) -> dict[str, Any]:
    """The trace in numbers, medians and 95th percentiles over steps and layers. `owners`: the rank of each expert."""
    loads = trace.counts.sum(2, dtype=np.int64)  # (N, L, E)
    ranks = int(owners.max()) + 1
    of_ranks = np.stack([loads[..., owners == rank].sum(-1) for rank in range(ranks)], -1)
    shares = loads / np.maximum(1, loads.sum(-1, keepdims=True))
    moved = np.abs(np.diff(shares, axis=0)).sum(-1) / 2
    found: dict[str, Any] = {
        "steps": len(trace.steps),
        "first_step": int(trace.steps[0]),
        "last_step": int(trace.steps[-1]),
        "layers": len(trace.layers),
        "sources": trace.sources,
        "experts": trace.experts,
        "k": trace.k,
        "ranks": ranks,
    }
    series = {
        "tokens": loads.sum(-1) / trace.k,
        "expert_max_over_mean": max_over_mean(loads),
        "rank_max_over_mean": max_over_mean(of_ranks),
        "top4_share": np.sort(shares, -1)[..., -4:].sum(-1),
        "moved": moved,
        "zipf_exponent": zipf_exponent(loads),
    }
    for name, values in series.items():
        none = values.size == 0
        found[name] = (
            None if none else {"median": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}
        )
    return found


def max_over_mean(loads: Shaped[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """The largest of each row over its mean; 1 is balance, and also what a row of zeros has."""
    total = loads.sum(-1)
    return np.where(total > 0, loads.max(-1) * loads.shape[-1] / np.maximum(total, 1e-300), 1.0)


def zipf_exponent(loads: Shaped[np.ndarray, "*rows E"]) -> Float64[np.ndarray, "*rows"]:
    """The exponent z of the likeliest law share ~ 1 / place^z for each row's loads in descending order, up to 8.

    The likelihood is largest where the mean of log(place) is that of the law, which falls with z.
    """
    logs = np.log(np.arange(1, loads.shape[-1] + 1))
    laws = np.exp(-EXPONENTS[:, None] * logs)
    expected = laws @ logs / laws.sum(-1)
    ordered = -np.sort(-loads, -1)
    total = ordered.sum(-1)
    mean = np.where(total > 0, ordered @ logs / np.maximum(total, 1e-300), expected[0])
    return np.interp(mean, expected[::-1], EXPONENTS[::-1])
