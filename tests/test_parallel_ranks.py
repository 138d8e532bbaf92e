"""Ranks: how they start, fail, agree, and hold their parts of a model."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moesaic.models.names import logical_tensors
from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter
from moesaic.parallel import spawn
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import ALONE, RankError, Ranks, own_gpu, ranks_of, waiting_for
from moesaic.parallel.shard import local, replicated_parameters, sharded_modules, window
from moesaic.parallel.spawn import RankFailedError, run_ranks

CONFIG = Transformer.Config(
    dim=12, layers=2, heads=2, ffn=MoE.Config(num_experts=3, hidden=8, router=TopKRouter.Config(k=2))
)


def join() -> Ranks:
    return ranks_of(ParallelConfig(), "cpu")


def test_a_process_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_gpu(2) == 1
    with pytest.raises(
        ValueError, match="process 1 of this node sees 1 GPU, and each process needs one of its own"
    ):
        own_gpu(1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_ranks_own_failure_is_not_anothers(error: type[Exception]) -> None:
    with pytest.raises(error), waiting_for("rows"):
        raise error("out of memory")


def test_results_come_in_order_of_rank() -> None:
    assert run_ranks(lambda: (dist.get_rank(), os.environ["WORLD_SIZE"]), 3) == [(0, "3"), (1, "3"), (2, "3")]


def test_a_rank_that_raises_dies_or_hangs_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "LAST_WORDS", 0.5)  # a rank that sleeps has none

    def raises() -> None:
        if dist.get_rank() == 1:
            raise KeyError("planted")
        dist.barrier()

    began = time.monotonic()
    with pytest.raises(RankFailedError, match=r"(?s)rank [01] failed: .*planted|rank 0 failed: .*"):
        run_ranks(raises, 2, timeout=60)
    with pytest.raises(RankFailedError, match="rank 1 died"):
        run_ranks(lambda: os._exit(7) if dist.get_rank() == 1 else time.sleep(60), 2, timeout=60)
    with pytest.raises(RankFailedError, match=r"ranks \[0\] did not finish within 2 s"):
        run_ranks(lambda: time.sleep(60) if dist.get_rank() == 0 else None, 2, timeout=2)
    assert time.monotonic() - began < 40


def test_agreement() -> None:
    def work() -> tuple[float, list[int], int]:
        ranks = join()
        values = torch.tensor([1.0 + ranks.rank])
        made = ranks.shared(lambda: 7 + ranks.rank)
        return (
            ranks.sum(values).item(),
            ranks.gather(ranks.rank),
            made,
        )

    assert run_ranks(work, 2) == [(3.0, [0, 1], 7)] * 2
    assert ALONE.sum(torch.tensor([2])).item() == 2
    assert ALONE.gather("x") == ["x"]


def test_what_the_first_rank_refuses_all_refuse() -> None:
    def refuse() -> None:
        raise ValueError("name: 'x' is taken")

    def work() -> str:
        try:
            join().shared(refuse)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    assert run_ranks(work, 2) == [
        "ValueError: name: 'x' is taken",
        f"{RankError.__name__}: name: 'x' is taken",
    ]


@pytest.mark.parametrize("layout", [{}, {"dp_replicate": 2}, {"dp_replicate": 4}], ids=str)
def test_parts_of_a_fresh_model_are_those_of_a_whole_one(layout: dict[str, int]) -> None:
    config = ParallelConfig(dp_replicate=layout.get("dp_replicate", 1))
    want = {
        name: tensor.detach() for name, tensor in logical_tensors(Transformer(CONFIG, 13, seed=5)).items()
    }

    def work() -> dict[str, torch.Tensor]:
        ranks = ranks_of(config, "cpu")
        with torch.device("meta"):
            model = Transformer(CONFIG, 13)
        parallelize(model, config, ranks)
        model.to_empty(device="cpu")
        for tensor in logical_tensors(model).values():
            local(tensor.detach()).fill_(float("nan"))
        model.initialize(5, window=window)
        assert len(sharded_modules(model)) == 3
        whole = {id(p) for p in replicated_parameters(model)}
        for name, parameter in logical_tensors(model).items():
            sharded = isinstance(parameter, nn.Parameter) and id(parameter) not in whole
            assert isinstance(parameter, DTensor) == sharded, name
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
            for name, tensor in logical_tensors(model).items()
        }

    for found in run_ranks(work, 4):
        assert found.keys() == want.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, want[name]), name


def test_the_gradient_of_a_sum_over_ranks() -> None:
    def work() -> float:
        ranks = join()
        x = torch.tensor(2.0 + ranks.rank, dtype=torch.float64, requires_grad=True)
        total = ranks.sum_with_gradient(x.square())
        (total.square() / ranks.size).backward()  # every rank holds a part of (x0^2 + x1^2)^2
        assert x.grad is not None
        return x.grad.item()

    total = 4 + 9
    assert run_ranks(work, 2) == pytest.approx([2 * total * 2 * 2.0, 2 * total * 2 * 3.0])
