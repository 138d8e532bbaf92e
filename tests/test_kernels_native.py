"""The compiled kernels of the CPU: how they are built, when they serve, and that threads change no bit."""

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moesaic.kernels import native
from moesaic.kernels.activation import activate
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.kernels.expert_mlp import expert_mlp, expert_rows
from moesaic.kernels.plan import plan_choice
from moesaic.kernels.rms_norm import rms_norm
from moesaic.kernels.rotary import normed_rotary
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter

needs_compiler = pytest.mark.skipif(not native.serves(torch.ones(1)), reason=native.status())


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An empty cache, nothing loaded, and one kernel to build: all of them take ten seconds."""
    sources = tmp_path / "cpp"
    sources.mkdir()
    for name in ("common.h", "rms_norm.cpp"):
        (sources / name).write_bytes((native.SOURCES / name).read_bytes())
    monkeypatch.setattr(native, "SOURCES", sources)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_built", functools.cache(native._built.__wrapped__))
    return tmp_path


@needs_compiler
def test_a_second_process_finds_the_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = native.build()
    assert list((fresh / "kernels").iterdir()) == [built]
    stamp = built.stat().st_mtime_ns
    assert native.build() == built
    assert built.stat().st_mtime_ns == stamp


def test_without_a_compiler_torch_computes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not native.serves(torch.ones(1))
    assert native.status() == "torch (no C++ compiler found: no-such-compiler)"


@needs_compiler
def test_a_compiler_that_fails_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.serves(torch.ones(1))
    assert native.status() == "torch (broken-g++ failed: x.cpp:1: error: no such flag)"
    assert not list((fresh / "kernels").iterdir())


def test_a_cache_that_cannot_be_written_is_named(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "kernels").write_text("a file")
    assert not native.serves(torch.ones(1))
    assert str(fresh / "kernels") in native.status() or "no C++ compiler" in native.status()


@needs_compiler
def test_a_damaged_library_is_built_again(fresh: Path) -> None:
    built = native.build()
    built.write_bytes(b"not a library")
    assert native.serves(torch.ones(1)), native.status()
    ctypes.CDLL(str(built))


def test_can_be_switched_off() -> None:
    code = "import torch; from moesaic.kernels import native; print(native.serves(torch.ones(1)), native.status())"
    env = {**os.environ, "MOESAIC_NATIVE": "0"}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert shown.stdout == "False torch (MOESAIC_NATIVE is 0)\n"


@needs_compiler
def test_serves_plain_tensors_of_one_type() -> None:
    one = torch.ones(1)
    assert native.serves(one, None, torch.nn.Parameter(one))
    assert native.serves(one.long())
    assert not native.serves(one.half())
    assert not native.serves(one, one.long())
    assert not native.serves(one.bfloat16())
    assert native.serves_bf16(one.bfloat16()) is not native._computes_bf16()
    assert not native.serves_bf16(one)
    assert not native.serves(one, one.double())
    assert not native.serves(torch.ones(1, device="meta"))
    with FakeTensorMode() as mode:
        assert not native.serves(mode.from_tensor(one))


@needs_compiler
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "gemm_threads", lambda: None)  # else so little work would stay on one thread
    torch.manual_seed(0)
    rows, width = 300, 24
    x = torch.randn(rows, 2 * width)
    counts = torch.tensor([270, 0, 30])
    # with three threads the first is too much for a chain: its weights' gradients are formed at the end, by slices
    few, many = (torch.rand(rows, 1) > 0.9).long(), torch.rand(rows, 7).topk(3).indices
    turns = torch.polar(torch.ones(30, 1, 4), torch.randn(30, 1, 4))

    def mixed(x: torch.Tensor, w: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Seven experts of width 8 whose weights come from w."""
        w1 = w.repeat(7, 3, 1)[:, :16].unflatten(1, (2, 8))
        w1 = w1 * torch.linspace(0.5, 1, 7)[:, None, None, None].to(x.dtype)
        w2 = w1[:, 0].transpose(1, 2).contiguous()
        gates = x[:, : chosen.shape[1]].sigmoid().flatten()
        return expert_mlp(x, gates, w1, w2, plan_choice(chosen, 7), kind="swiglu")

    calls = {
        rms_norm: lambda x, w: rms_norm(x, w[0], 1e-6),
        activate: lambda x, w: activate("swiglu", x),
        normed_rotary: lambda x, w: torch.cat(
            normed_rotary(x.view(10, 30, 6, 8), turns, 2, query_weight=w[0, :8], key_weight=w[1, :8]), 2
        ),
        "few experts": lambda x, w: mixed(x, w, few),
        "many experts": lambda x, w: mixed(x, w, many),
        "in bf16": lambda x, w: mixed(x.bfloat16(), w.bfloat16(), many),
        linear_cross_entropy: lambda x, w: linear_cross_entropy(x, w, torch.arange(rows) % 5, chunk=64),
        expert_rows: lambda x, w: expert_rows(
            x, w.view(3, 1, 2, -1), w.view(3, 2, -1).mT.contiguous(), counts, kind="gelu"
        ),
        "in slices of 64": lambda x, w: expert_rows(
            x.repeat(1, 4),
            w.repeat(120, 1)[:600].view(3, 1, 200, 48).repeat(1, 1, 1, 4),
            w.repeat(100, 1).view(3, 200, 48).mT.repeat(1, 4, 1).contiguous(),
            counts,
            kind="gelu",
        ),
    }
    for op, call in calls.items():
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            leaves = [x.clone().requires_grad_(), torch.linspace(-1, 1, 6 * 48).view(6, 48).requires_grad_()]
            y = call(*leaves)
            y.square().sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for other in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True)), op


@needs_compiler
def test_little_work_stays_on_one_thread_and_torch_keeps_its_threads() -> None:
    """What limits BLAS to the caller's thread is undone afterwards."""
    limit = native.gemm_threads()
    if limit is None:
        pytest.skip("torch's BLAS is not MKL")
    set_local = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(limit.value or 0)
    torch.set_num_threads(2)
    before = set_local(0)
    set_local(before)
    leaves = [torch.randn(shape).requires_grad_() for shape in ((8, 4), (2, 1, 4, 4), (2, 4, 4))]
    expert_rows(leaves[0], leaves[1], leaves[2], torch.tensor([3, 5]), kind="relu2").sum().backward()
    assert set_local(before) == before


@needs_compiler
def test_a_model_computes_the_same_without(monkeypatch: pytest.MonkeyPatch) -> None:
    router = TopKRouter.Config(k=2)
    config = Transformer.Config(
        dim=48, layers=2, heads=4, kv_heads=2, ffn=MoE.Config(num_experts=4, hidden=40, router=router)
    )
    tokens = torch.randint(0, 99, (4, 65), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[torch.Tensor]:
        model = Transformer(config, 99, seed=0).double()
        loss = model(tokens[:, :-1], tokens[:, 1:].contiguous(), mode="train", dtype=torch.float64).loss
        assert loss is not None
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = gradients()
    monkeypatch.setattr(native, "serves", lambda *tensors: False)
    plain = gradients()
    assert len(ours) == len(plain)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)
