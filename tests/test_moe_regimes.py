"""Made-up traces have the statistics that they promise."""

from itertools import pairwise

import numpy as np
import pytest

from moesaic.moe.regimes import Shape, generate, skewed, zipf
from moesaic.moe.trace import RoutingTrace, TraceError
from moesaic.moe.trace_stats import max_over_mean, trace_stats, zipf_exponent
from moesaic.parallel.placement import even_owners


def owners(experts: int, ranks: int) -> np.ndarray:
    return np.array(even_owners({"bank": experts}, ranks).owners["bank"])


def loads_of(trace: RoutingTrace) -> np.ndarray:
    return trace.counts.sum(2, dtype=np.int64)


def moved(trace: RoutingTrace) -> np.ndarray:
    shares = loads_of(trace) / loads_of(trace).sum(-1, keepdims=True)
    return np.abs(np.diff(shares, axis=0)).sum(-1) / 2


def on_ranks(trace: RoutingTrace, ranks: int) -> np.ndarray:
    return loads_of(trace).reshape(*trace.counts.shape[:2], ranks, -1).sum(-1)


def check_rows(trace: RoutingTrace, shape: Shape) -> None:
    assert (trace.counts.sum(-1) == shape.tokens * shape.k).all()
    assert trace.counts.max() <= shape.tokens


def test_early_training():
    shape = Shape(steps=520, layers=2, sources=4, experts=32, tokens=8192, k=1)
    trace = generate("R1", shape, seed=1)
    check_rows(trace, shape)
    exponents = zipf_exponent(loads_of(trace))
    np.testing.assert_allclose(exponents[0], 1.7, atol=0.02)
    np.testing.assert_allclose(exponents[250], 1.4, atol=0.02)
    np.testing.assert_allclose(exponents[500:], 1.1, atol=0.02)
    assert np.quantile(moved(trace), 0.02) >= 0.1
    assert moved(trace).max() <= 0.31


def test_no_balancing():
    shape = Shape(steps=60, layers=40, sources=8, experts=16, tokens=8192, k=2)
    trace = generate("R2", shape, seed=2)
    check_rows(trace, shape)
    peaks = max_over_mean(on_ranks(trace, 8))
    assert peaks.min() > 1.48
    assert peaks.max() < 2.52
    assert np.ptp(np.median(peaks, 0)) > 0.5  # layers differ
    usual = [layer for layer in range(40) if layer not in (19, 39)]
    assert 0.045 <= np.median(moved(trace)[:, usual]) <= 0.08
    assert np.quantile(moved(trace)[:, usual], 0.95) <= 0.085
    assert np.median(moved(trace)[:, [19, 39]]) > 0.12


def test_balanced_on_average():
    shape = Shape(steps=80, layers=6, sources=8, experts=128, tokens=8192, k=8)
    trace = generate("R3", shape, seed=3)
    check_rows(trace, shape)
    exponents = zipf_exponent(loads_of(trace))
    assert exponents.min() >= 0.27
    assert exponents.max() <= 0.93
    peaks = max_over_mean(on_ranks(trace, 64))
    assert 1.25 < np.median(peaks) < 4
    shares = loads_of(trace) - loads_of(trace).mean(-1, keepdims=True)
    memory = [np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairwise(of)]) for of in shares.transpose(1, 0, 2)]
    assert 0.4 < min(memory) < max(memory) < 0.95
    assert max(memory) - min(memory) > 0.1


def test_one_domain():
    shape = Shape(steps=40, layers=4, sources=4, experts=64, tokens=16384, k=4)
    trace = generate("R4", shape, seed=4)
    exponents = zipf_exponent(loads_of(trace))
    assert exponents.min() >= 0.68
    assert exponents.max() <= 0.97
    assert moved(trace).max() < 0.03
    clustered = max_over_mean(on_ranks(trace, 8)).mean()
    random = np.random.default_rng(0).permutation(64)
    scattered = RoutingTrace(trace.counts[..., random], trace.steps, trace.layers, 4)
    assert clustered > max_over_mean(on_ranks(scattered, 8)).mean() * 1.3


def test_uniform():
    shape = Shape(steps=2, layers=2, sources=2, experts=8, tokens=100, k=2)
    assert (generate("R5", shape).counts == 25).all()


def test_seeds_and_sizes():
    small = Shape(steps=4, layers=2, sources=2, experts=16, tokens=64, k=2)
    large = Shape(steps=9, layers=3, sources=2, experts=16, tokens=64, k=2)
    for regime in ("R1", "R2", "R3", "R4"):
        one, again = generate(regime, small, seed=5).counts, generate(regime, small, seed=5).counts
        np.testing.assert_array_equal(one, again)
        assert (generate(regime, small, seed=6).counts != one).any()
        check_rows(generate(regime, small, seed=5), small)
        begun = generate(regime, large, seed=5).counts[:4, :2]
        np.testing.assert_array_equal(begun, one)


@pytest.mark.parametrize("peak", [1.0, 1.5, 1.8])
@pytest.mark.parametrize(("ranks", "experts", "k"), [(2, 16, 2), (4, 32, 4), (2, 8, 1)])
def test_skew_is_what_was_asked(peak: float, ranks: int, experts: int, k: int):
    shape = Shape(steps=2, layers=2, sources=2, experts=experts, tokens=5000, k=k)
    trace = skewed(shape, ranks=ranks, peak=peak)
    check_rows(trace, shape)
    found = trace_stats(trace, owners(experts, ranks))
    assert found["rank_max_over_mean"]["median"] == pytest.approx(peak, abs=1e-3)
    assert found["expert_max_over_mean"]["median"] > peak * 1.2  # within a rank experts differ too
    np.testing.assert_array_equal(max_over_mean(on_ranks(trace, ranks)).argmax(-1), 0)


def test_what_cannot_be_is_refused():
    good = {"steps": 2, "layers": 2, "sources": 2, "experts": 4, "tokens": 8, "k": 2}
    for change, message in (
        ({"k": 5}, "k: 5 is more than experts = 4"),
        ({"steps": 0}, "steps: 0 is not positive"),
        ({"steps": 1 << 30}, r"above 2\^31 numbers"),
        ({"tokens": 1 << 31}, "tokens: "),
    ):
        with pytest.raises(TraceError, match=message):
            Shape(**(good | change))
    shape = Shape(**good)
    for options, message in (
        ({"ranks": 3, "peak": 1.0}, "ranks: 3 does not divide experts = 4"),
        ({"ranks": 2, "peak": 2.5}, "peak: 2.5 is not in 1 to 2"),
        ({"ranks": 4, "peak": 2.5}, "peak: 2.5 is not in 1 to 2, what 1 experts"),
        ({"ranks": 2, "peak": 1.5, "ratio": 0.0}, "ratio: 0.0"),
    ):
        with pytest.raises(TraceError, match=message):
            skewed(shape, **options)
    with pytest.raises(TraceError, match="regime: 'R0' is not one of R1, R2"):
        generate("R0", shape)  # type: ignore[arg-type]


def test_statistics_of_known_loads():
    for exponent in (0.0, 0.5, 1.1, 2.3):
        assert zipf_exponent(zipf(exponent, 24)[::-1].copy()) == pytest.approx(exponent, abs=1e-4)
    assert zipf_exponent(np.zeros(4)) == 0
    counts = np.zeros((2, 1, 1, 8), np.int64)
    counts[0, 0, 0, :2] = 30, 10
    counts[1, 0, 0, :2] = 10, 30
    found = trace_stats(RoutingTrace(counts, np.array([3, 9]), np.array([5]), 1), owners(8, 4))
    assert found["expert_max_over_mean"] == {"median": 6.0, "p95": 6.0}
    assert found["rank_max_over_mean"]["median"] == 4.0
    assert found["top4_share"]["median"] == 1.0
    assert found["moved"]["median"] == 0.5
    assert (found["tokens"]["median"], found["first_step"], found["last_step"]) == (40.0, 3, 9)
    alone = trace_stats(RoutingTrace(counts[:1], np.array([3]), np.array([5]), 1), owners(8, 1))
    assert alone["moved"] is None
