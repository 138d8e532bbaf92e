"""The estimate of a rank's memory, against a model that is really sharded, over ranks that are not there."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moesaic.data.prepare import vocab_of
from moesaic.launch.config import read_run
from moesaic.models.accounting import meta_model
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.shard import local
from moesaic.train import memory
from moesaic.train.memory import estimate
from moesaic.train.optim import build_optimizer

SIZES = ["train.batch_tokens=262144"]


@pytest.fixture
def pretended(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group whose other ranks are made up."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("pretended", [8, 64], indirect=True)
@pytest.mark.parametrize("name", ["moe_1b", "moe_16b"])
@pytest.mark.parametrize("experts", ["sharded", "owned"])
def test_weights_of_a_rank_of_a_large_model(
    name: str, experts: str, pretended: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_run(name, [f"parallel.experts.kind={experts}"], world_size=pretended)
    vocab = vocab_of(run.data)
    monkeypatch.setattr(memory, "saved_bytes", lambda *_: 0)  # tracing so many layers takes seconds
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: dist.group.WORLD)  # gloo needs real peers
    model = parallelize(
        meta_model(run.model, vocab), run.parallel, ranks_of(run.parallel, "cpu"), dtype=torch.bfloat16
    )
    parameters = sum(local(p.detach()).numel() * p.element_size() for p in model.parameters())
    assert estimate(run, vocab, ranks=pretended)["gradients"] == parameters
    whole = 4 * sum(p.numel() for p in meta_model(run.model, vocab).parameters())
    assert whole / pretended <= parameters < 1.2 * whole / pretended


@pytest.mark.parametrize("pretended", [8, 64], indirect=True)
@pytest.mark.parametrize("name", ["quickstart", "quickstart_dense"])
def test_bytes_of_a_rank(name: str, pretended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(name, [*SIZES, "parallel.dp_replicate=2"], world_size=pretended)
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: dist.group.WORLD)  # gloo needs real peers
    model = parallelize(meta_model(run.model, 4096), run.parallel, ranks_of(run.parallel, "cpu"))
    parameters = sum(local(p.detach()).numel() * p.element_size() for p in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    estimated = estimate(run, 4096, ranks=pretended)
    assert estimated["weights"] == parameters + buffers
    assert estimated["gradients"] == parameters
    assert estimated["optimizer"] == 2 * parameters
    alone = estimate(read_run(name, [*SIZES]), 4096)
    assert estimated["activations"] * pretended == pytest.approx(alone["activations"], rel=0.02)
    assert torch.tensor(estimated["weights"] * pretended / 2) > alone["weights"]


@pytest.mark.parametrize("pretended", [8], indirect=True)
def test_muon_keeps_one_tensor_per_matrix(pretended: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*SIZES, "parallel.experts.kind=owned", "optim={kind: muon, lr: 5e-3}"]
    run = read_run("quickstart", settings, world_size=pretended)
    monkeypatch.setattr(memory, "saved_bytes", lambda *_: 0)
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: dist.group.WORLD)  # gloo needs real peers
    model = parallelize(meta_model(run.model, 4096), run.parallel, ranks_of(run.parallel, "cpu"))
    optimizer = build_optimizer(model, run.optim)
    kept = [t for state in optimizer.state.values() for kind, t in state.items() if kind != "step"]
    estimated = estimate(run, 4096, ranks=pretended)
    assert estimated["optimizer"] == sum(local(t).numel() * t.element_size() for t in kept)
    adam = estimate(replace(run, optim=read_run("quickstart", SIZES, world_size=8).optim), 4096, ranks=8)
    assert estimated["optimizer"] < adam["optimizer"] == 2 * adam["gradients"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("plan.kind=expert_parallel", 0),
        ("plan.kind=replicate_all", 7 * (6 + 2) * 2),
        ("plan.kind=auto", 7 * (6 + 2) * 2),
        ("plan={kind: auto, most_copies: 2}", 2 * (6 + 2) * 2),
        ("plan={kind: hecate, most_copies: 9}", 7 * (6 + 2) * 2),
        ("plan.kind=auto rematerialize=true", 7 * (2 + 2) * 2),
        ("plan.kind=auto rematerialize=true prefetch=0", 7 * (1 + 2) * 2),
        ("plan.kind=auto accumulate=last", 7 * ((6 + 2) * 2 + 6 * (4 + 2))),
        ("plan.kind=auto accumulate=last rematerialize=true", 7 * ((2 + 2) * 2 + 6 * 4)),
    ],
)
def test_copies_may_take_so_much(settings: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 experts of 6 layers on 8 ranks in bf16: in numbers of an expert's bytes."""
    given = [f"parallel.experts.{one}" for one in re.split(r" (?=\w+=)", settings)]
    changes = ["parallel.experts.kind=owned", "model.layers=7", "model.ffn.num_experts=8", *given]
    run = read_run("debug", ["train.micro_batch_tokens=2048", *changes], world_size=8)
    monkeypatch.setattr(memory, "saved_bytes", lambda *_: 0)
    found = estimate(run, 256, ranks=8, dtype=torch.bfloat16)
    assert found.get("copies_up_to", 0) == expected * 3 * 64 * 64
    assert ("copies_up_to" in found) == bool(expected)
    assert "copies_up_to" not in estimate(run, 256)
