"""Muon: the iteration against singular values, updates against a loop over matrices, experts apart from each other."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from references import largest_error
from torch import Tensor

from moesaic.launch.config import read_run
from moesaic.models.names import expert_matrices, logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe import MoE, TopKRouter
from moesaic.moe.feedforward import FeedForward
from moesaic.train import muon
from moesaic.train.audit import audit
from moesaic.train.muon import QUINTIC, orthogonalise
from moesaic.train.optim import (
    AdamWConfig,
    Cosine,
    GroupRule,
    MuonConfig,
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
    set_learning_rate,
)

CONFIG = Transformer.Config(
    dim=8,
    layers=2,
    heads=2,
    ffn=MoE.Config(num_experts=5, hidden=6, shared_experts=1, router=TopKRouter.Config(k=2)),
    ffn_at={"1": MoE.Config(num_experts=3, hidden=11, expert="gelu", router=TopKRouter.Config(k=2))},
)
SETTING = "optim={kind: muon, lr: 5e-3, schedule: {kind: cosine, warmup: 1}}"
MUON = MuonConfig(lr=0.02, schedule=Cosine(warmup=2))
BANKS = {"banks.layer0.w1", "banks.layer0.w2", "banks.layer1.w1", "banks.layer1.w2"}


def model(dtype: torch.dtype = torch.float64) -> Transformer:
    return Transformer(CONFIG, 16, seed=1).to(dtype)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(net: Transformer, step: int) -> dict[str, Tensor]:
    """Random ones, the same for every model; the experts' differ in size by powers of two."""
    found = {}
    for number, (name, tensor) in enumerate(logical_tensors(net).items()):
        if isinstance(tensor, torch.nn.Parameter):
            found[name] = random(*tensor.shape, seed=1000 * step + number).to(tensor.dtype)
            if name in BANKS:
                sizes = 2.0 ** -torch.arange(len(tensor)).to(tensor.dtype)
                found[name] *= sizes.view(-1, *(1 for _ in tensor.shape[1:]))
    return found


def run(net: Transformer, config: AdamWConfig | MuonConfig, steps: int = 3, **planted: Any) -> Any:
    """Steps with random gradients; `planted` changes them by name."""
    optimizer = build_optimizer(net, config)
    tensors = logical_tensors(net)
    for step in range(steps):
        for name, grad in gradients(net, step).items():
            tensors[name].grad = planted.get("change", lambda _, grad: grad)(name, grad)
        set_learning_rate(optimizer, config.lr * config.schedule.factor(step, 10))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def by_values(matrix: Tensor, steps: int, coefficients: tuple[float, float, float] = QUINTIC) -> Tensor:
    """U p(S) V^T, with the polynomial on numbers."""
    a, b, c = coefficients
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm().clamp_min(1e-7)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1)])
def test_the_iteration_is_a_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    matrices = random(6, *shape) * torch.logspace(-6, 6, 6, dtype=torch.float64)[:, None, None]
    found = orthogonalise(matrices, 5, torch.float64)
    assert found.shape == matrices.shape
    for got, matrix in zip(found, matrices, strict=True):
        assert largest_error(got, by_values(matrix, 5)) < 1e-12
    values = torch.linalg.svdvals(found)
    assert 0.68 < values.min() < values.max() < 1.21


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_coefficients_that_converge_give_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    matrices = random(4, *shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalise(matrices, 30, torch.float64, (15 / 8, -10 / 8, 3 / 8))
    assert largest_error(found, u @ vt) < 1e-12


def test_nothing_stays_nothing() -> None:
    matrices = torch.stack([torch.zeros(3, 5), torch.full((3, 5), 1e-12), torch.eye(3, 5)])
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonalise(matrices, 5, dtype).float()
        assert not found[0].any()
        assert found[1].abs().max() < 0.01  # comes to rest instead of moving at full speed
        assert 0.67 < found[2].norm() / math.sqrt(3) < 1.21
    assert orthogonalise(torch.zeros(0, 3, 5), 5, torch.float32).shape == (0, 3, 5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["match_rms_adamw", "spectral"])
def test_updates_equal_a_loop_over_matrices(scale: Any, nesterov: bool) -> None:
    config = replace(
        MUON,
        scale=scale,
        nesterov=nesterov,
        momentum=0.8,
        ns_steps=4,
        groups=(GroupRule(match="*.w2", lr=0.5, weight_decay=0.3),),
    )
    net, twin = model(), model()
    run(net, config)
    masters = {n: t.detach() for n, t in logical_tensors(twin).items() if n in BANKS}
    means = {name: torch.zeros_like(tensor) for name, tensor in masters.items()}
    for step in range(3):
        for name, grads in gradients(twin, step).items():
            if name not in BANKS:
                continue
            lr = config.lr * config.schedule.factor(step, 10) * (0.5 if name.endswith("w2") else 1)
            decay = 0.3 if name.endswith("w2") else config.weight_decay
            rows, columns = grads.shape[-2:]
            share = 0.2 * max(rows, columns) ** 0.5 if scale != "spectral" else max(1, rows / columns) ** 0.5
            means[name] = 0.8 * means[name] + 0.2 * grads
            for index in torch.cartesian_prod(*(torch.arange(n) for n in grads.shape[:-2])).view(
                -1, grads.ndim - 2
            ):
                at = tuple(index.tolist())
                mean = 0.8 * means[name][at] + 0.2 * grads[at] if nesterov else means[name][at]
                masters[name][at] = masters[name][at] * (1 - lr * decay) - lr * share * by_values(mean, 4)
    for name, tensor in masters.items():
        assert largest_error(logical_tensors(net)[name], tensor) < 1e-12, name


def test_everything_else_is_adamw() -> None:
    net, twin = model(), model()
    mine = run(net, MUON)
    theirs = run(twin, AdamWConfig(lr=MUON.lr, schedule=MUON.schedule))
    want = logical_tensors(twin)
    for name, tensor in logical_tensors(net).items():
        parameter = isinstance(tensor, torch.nn.Parameter)
        assert torch.equal(tensor, want[name]) == (name not in BANKS) or not parameter, name
    state, plain = optimizer_tensors(net, mine), optimizer_tensors(twin, theirs)
    assert {name for name in state if "banks" in name} == {f"optim.momentum.{name}" for name in BANKS}
    assert {name for name in state if "banks" not in name} == {n for n in plain if "banks" not in n}
    assert state["optim.momentum.banks.layer0.w1"].any()
    assert set(optimizer_tensors(model(), build_optimizer(net, MUON))) <= set(state)


def test_each_expert_is_updated_on_its_own() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    plain, other, louder = model(), model(), model()
    with torch.no_grad():
        for name in ("banks.layer0.w1", "banks.layer0.w2"):
            logical_tensors(other)[name].copy_(logical_tensors(plain)[name][order])

    def permuted(name: str, grad: Tensor) -> Tensor:
        return grad[order] if name.startswith("banks.layer0") else grad

    def scaled(name: str, grad: Tensor) -> Tensor:
        if name == "banks.layer0.w1":
            grad[2] *= 1024  # every gate matrix and step alike
        return grad

    run(plain, MUON)
    run(other, MUON, change=permuted)
    run(louder, MUON, change=scaled)
    for name, tensor in logical_tensors(plain).items():
        if name in BANKS:
            want = tensor[order] if name.startswith("banks.layer0") else tensor
            assert largest_error(logical_tensors(other)[name], want) < 1e-14
            assert largest_error(logical_tensors(louder)[name], tensor) < 1e-14


def test_portions_of_any_size_give_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model()
    run(whole, MUON)
    for portion in (1, 200):
        monkeypatch.setattr(muon, "PORTION", portion)
        cut = model()
        run(cut, MUON)
        for name in BANKS:
            assert largest_error(logical_tensors(cut)[name], logical_tensors(whole)[name]) < 1e-14


def test_clipping_scales_no_first_update() -> None:
    """The direction of a matrix does not know its size; what a clip changes is the weight of one step's gradient."""
    plain, clipped = model(), model()

    def clip(name: str, grad: Tensor) -> Tensor:
        holder = torch.nn.Parameter(torch.zeros_like(grad))
        holder.grad = grad
        clip_gradients([holder], float(grad.norm()), 0.125)
        return holder.grad

    run(plain, MUON, steps=1)
    run(clipped, MUON, steps=1, change=clip)
    for name in BANKS:
        assert largest_error(logical_tensors(clipped)[name], logical_tensors(plain)[name]) < 1e-14


@pytest.mark.parametrize(("kind", "limit"), [("fp32", 2e-6), ("bf16", 2e-2)])
def test_types_of_the_iteration(kind: Any, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    true = muon.orthogonalise

    def spying(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
        seen.append(dtype)
        return true(matrices, steps, dtype)

    monkeypatch.setattr(muon, "orthogonalise", spying)
    exact, net = model(), model(torch.float32)
    run(exact, MUON)
    assert set(seen) == {torch.float64}
    seen.clear()
    run(net, replace(MUON, ns_dtype=kind))
    assert set(seen) == {torch.float32 if kind == "fp32" else torch.bfloat16}
    for name in BANKS:
        found = logical_tensors(net)[name]
        assert found.dtype == torch.float32
        assert largest_error(found.double(), logical_tensors(exact)[name]) < limit


def test_matrices_of_a_bank_are_torchs_muon_one_by_one() -> None:
    """As near as its bf16 allows: a few percent of the largest value of an update."""
    net = model(torch.float32)
    before = [matrix.detach().clone() for matrix in logical_tensors(net)["banks.layer1.w2"]]
    run(net, replace(MUON, schedule=Cosine(warmup=0, final=1.0)), steps=1)
    holders = [torch.nn.Parameter(matrix.clone()) for matrix in before]
    for holder, grad in zip(holders, gradients(net, 0)["banks.layer1.w2"], strict=True):
        holder.grad = grad
    torch.optim.Muon(holders, lr=MUON.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    for found, holder, old in zip(logical_tensors(net)["banks.layer1.w2"], holders, before, strict=True):
        assert largest_error(found - old, holder - old) < 0.06


def test_shared_experts_and_attention_are_not_muons() -> None:
    net = model()
    names = {id(tensor): name for name, tensor in logical_tensors(net).items()}
    assert {names[id(parameter)] for parameter in expert_matrices(net)} == BANKS


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_audit_passes_where_experts_have_owners(ranks: int) -> None:
    settings = [SETTING, "optim.ns_dtype=bf16", "parallel.experts.kind=owned", "parallel.experts.rebalance=9"]
    settings += ["train.micro_batch_tokens=256"]
    found = audit(read_run("debug", settings, world_size=None), ranks=ranks)
    assert [finding for finding in found.findings if not finding.passed] == []


def test_matrices_that_are_cut_are_refused() -> None:
    message = r"optim\.kind: muon .*parallel\.experts\.kind: sharded .* over 2 ranks"
    with pytest.raises(ValueError, match=message):
        read_run("debug", [SETTING], world_size=2)
    with pytest.raises(ValueError, match=message):
        audit(read_run("debug", [SETTING], world_size=None), ranks=2)
    whole = read_run("debug", [SETTING, "parallel.dp_replicate=2"], world_size=2)
    found = audit(whole, ranks=2)  # two copies, whole each
    assert found.passed
    dense = Transformer(replace(CONFIG, ffn=FeedForward.Config(hidden=8), ffn_at={}), 16)
    with pytest.raises(ValueError, match=r"optim\.kind: muon .* the model has none"):
        build_optimizer(dense, MUON)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.momentum=1.0", r"optim\.momentum: 1\.0 is not in \[0, 1\)"),
        ("optim.ns_steps=0", r"optim\.ns_steps: 0 is not in 1 to 100"),
        ("optim.scale=none", r"optim\.scale: .* is not a choice"),
        ("optim.lr=-1.0", r"optim\.lr: -1\.0 is not positive"),
    ],
)
def test_settings_that_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run("debug", [SETTING, setting], world_size=1)
