"""Replayed routing: the trace's shares, exactly, on any cut; gradients like those of any router."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.moe import MoE, ReplayRouter, RouterInput, RoutingTrace
from moesaic.moe.apportion import apportion
from moesaic.moe.replay import golden_stride, replayed


def trace_of(
    shape: tuple[int, ...] = (3, 2, 4, 8), k: int = 2, tokens: int = 48, seed: int = 0
) -> RoutingTrace:
    """Every source has `tokens` tokens; some experts get none, others every token."""
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(shape[3], 0.3), shape[:3]).reshape(-1, shape[3])
    rows = len(weights)
    counts = apportion(weights, np.full(rows, tokens * k), np.array(tokens))
    return RoutingTrace(counts.reshape(shape), np.arange(shape[0]), np.arange(shape[1]), k)


def counts_of(experts: torch.Tensor, num_experts: int) -> np.ndarray:
    return torch.bincount(experts.flatten(), minlength=num_experts).numpy()


def test_apportion_is_exact_fair_and_bounded():
    random = np.random.default_rng(1)
    for _ in range(200):
        rows, entries, k = (int(random.integers(1, top)) for top in (5, 9, 4))
        k = min(k, entries)
        sizes = random.integers(0, 50, rows)
        weights = random.integers(0, 5, (rows, entries)) ** 3
        found = apportion(weights, sizes * k, sizes[:, None])
        assert (found.sum(1) == sizes * k).all()
        assert ((found >= 0) & (found <= sizes[:, None])).all()
        quotas = weights * (sizes * k / np.maximum(weights.sum(1), 1))[:, None]
        fits = (quotas.max(1) <= sizes) & (weights.sum(1) > 0)
        assert (np.abs(found - quotas)[fits] < 1).all()
    whole = random.integers(0, 1 << 25, (4, 6))
    np.testing.assert_array_equal(apportion(whole, whole.sum(1), whole.max(1)[:, None]), whole)
    np.testing.assert_array_equal(apportion(np.array([[1, 1, 1]]), np.array([4]), np.array(9)), [[2, 1, 1]])
    np.testing.assert_array_equal(apportion(np.array([[9, 0, 0]]), np.array([6]), np.array(2)), [[2, 2, 2]])
    with pytest.raises(ValueError, match="7 do not fit into entries of up to 2"):
        apportion(np.ones((1, 3)), np.array([7]), np.array(2))


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_counts_are_those_of_the_trace(k: int):
    trace = trace_of(k=k)
    for step in range(5):
        for layer in range(3):
            experts = replayed(trace, torch.arange(192), step=step, layer=layer, total=192)
            assert experts.shape == (192, k)
            assert all(len(set(row)) == k for row in experts.tolist())
            for source, of_source in enumerate(experts.split(48)):
                want = trace.at(step, layer)[source]
                np.testing.assert_array_equal(counts_of(of_source, 8), want)


def test_other_batches_have_the_same_shares():
    trace = trace_of()
    for total in (1, 7, 190, 4096, 19200):
        experts = replayed(trace, torch.arange(total), step=1, layer=0, total=total)
        assert all(len(set(row)) == 2 for row in experts.tolist())
        shares = counts_of(experts, 8) / (2 * total)
        want = trace.at(1, 0).sum(0) / trace.at(1, 0).sum()
        assert np.abs(shares - want).max() <= 4 / total  # rounding in each of four sources


def test_every_stretch_has_nearly_the_shares_of_its_source():
    trace = trace_of((1, 1, 1, 8), tokens=4096)
    experts = replayed(trace, torch.arange(4096), step=0, layer=0, total=4096)
    want = trace.counts[0, 0, 0] / 4096
    for length in (64, 256):
        for stretch in experts.split(length):
            assert np.abs(counts_of(stretch, 8) - want * length).max() <= 6


def test_strides_visit_every_place():
    for size in range(1, 300):
        assert sorted(i * golden_stride(size) % size for i in range(size)) == list(range(size))


def test_layers_and_steps_place_tokens_differently():
    trace = RoutingTrace(np.full((2, 2, 1, 4), 32), np.arange(2), np.arange(2), 1)
    places = [
        replayed(trace, torch.arange(128), step=step, layer=layer, total=128)
        for step in (0, 1)
        for layer in (0, 1)
    ]
    for i, a in enumerate(places):
        for b in places[:i]:
            assert (a != b).float().mean() > 0.2
    again = replayed(trace, torch.arange(128), step=2, layer=0, total=128)
    assert torch.equal(again, places[0])


def layer_of(tmp_path: Path, k: int) -> MoE:
    trace_of(k=k).save(tmp_path / "t.npz")
    torch.manual_seed(0)
    config = MoE.Config(num_experts=8, hidden=6, router=ReplayRouter.Config(trace=str(tmp_path / "t.npz")))
    return MoE(config, 5).double()


def test_any_cut_routes_alike(tmp_path: Path):
    layer = layer_of(tmp_path, 2)
    x = torch.randn(192, 5, dtype=torch.float64)
    whole = layer.route(RouterInput(tokens=x, mode="train", step=4, layer=1))
    order = torch.randperm(192)
    for part in order.split(50):
        inputs = RouterInput(tokens=x[part], mode="train", indices=part, step_tokens=192, step=4, layer=1)
        routing = layer.route(inputs)
        assert torch.equal(routing.experts.view(-1, 2), whole.experts.view(-1, 2)[part])
        torch.testing.assert_close(routing.weights.view(-1, 2), whole.weights.view(-1, 2)[part])
    assert layer.route(RouterInput(tokens=x[:0], mode="train", layer=1)).experts.numel() == 0


@pytest.mark.parametrize("k", [1, 2])
def test_weights_and_gradients(tmp_path: Path, k: int):
    layer = layer_of(tmp_path, k)
    x = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)

    routing = layer.route(RouterInput(tokens=x, mode="train"))
    logits = x @ layer.router.gate.T
    picked = logits.gather(1, routing.experts.view(12, k))
    want = picked.softmax(-1) if k > 1 else picked.sub(logits.logsumexp(-1, keepdim=True)).exp()
    torch.testing.assert_close(routing.weights.view(12, k), want)
    torch.testing.assert_close(routing.probabilities, logits.softmax(-1))

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer(x, layer.route(RouterInput(tokens=x, mode="train")))

    assert torch.autograd.gradcheck(run, (x,), check_undefined_grad=False)
    layer(x, routing).square().sum().backward()
    assert layer.router.gate.grad is not None
    assert layer.router.gate.grad.abs().sum() > 0


def test_what_cannot_be_replayed_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^trace: .*none\.npz: cannot be read"):
        ReplayRouter.Config(trace=str(tmp_path / "none.npz"))
    trace_of().save(tmp_path / "t.npz")
    router = ReplayRouter.Config(trace=str(tmp_path / "t.npz"))
    assert router.k == 2
    with pytest.raises(ValueError, match=r"^router\.trace: .* has 8 experts, the layer num_experts = 6"):
        MoE.Config(num_experts=6, hidden=4, router=router)
