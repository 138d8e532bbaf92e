"""A rank that dies or hangs ends the job soon, with an error that names the rank and what was waited for."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moesaic.models.transformer import Transformer
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter
from moesaic.parallel import all_to_all, spawn
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.parallelize import parallelize
from moesaic.parallel.ranks import RankGoneError, Ranks, joined, ranks_of
from moesaic.parallel.shard import window
from moesaic.parallel.spawn import RankFailedError, run_ranks

FFN = MoE.Config(num_experts=3, hidden=8, router=TopKRouter.Config(k=2))
CONFIG = Transformer.Config(dim=12, layers=2, heads=2, ffn=FFN)
OWNED = ParallelConfig(experts=OwnedExperts(), timeout=3.0)


def strike(number: int, how: signal.Signals) -> None:
    """Have rank 1 signal itself when it would begin its exchange of this number."""
    true, left = all_to_all.Travel.exchange, [number]

    def exchange(self: all_to_all.Travel, *args: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0 and dist.get_rank() == 1:
            os.kill(os.getpid(), how)
        return true(self, *args)  # type: ignore[arg-type]

    all_to_all.Travel.exchange = exchange  # type: ignore[method-assign]  # of this process alone


def one_step(ranks: Ranks) -> None:
    """Forward and backward over two layers: four exchanges each way."""
    model = parallelize(Transformer(CONFIG, 13), OWNED, ranks)
    model.initialize(0, window=window)
    tokens = torch.arange(10).view(1, 10)
    output = model(tokens, tokens, mode="train")
    assert output.loss is not None
    output.loss.backward()


def failure(work: Callable[[], None], ranks: int) -> str:
    began = time.monotonic()
    with pytest.raises(RankFailedError) as caught:
        run_ranks(work, ranks, timeout=60)
    assert time.monotonic() - began < 30
    return str(caught.value)


@pytest.mark.parametrize(
    ("number", "waited"),
    [
        (1, "rows to their experts of blocks.0.ffn"),
        (4, "rows from their experts of blocks.1.ffn"),
        (5, "gradients of rows from their experts of blocks.1.ffn"),
    ],
)
def test_a_killed_rank(number: int, waited: str) -> None:
    def work() -> None:
        strike(number, signal.SIGKILL)
        one_step(ranks_of(OWNED, "cpu"))

    told = failure(work, 2)
    assert f"RankGoneError: waiting for {waited}: rank 1 is gone or stuck (" in told


def test_a_stopped_rank_is_given_up_after_the_configured_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "LAST_WORDS", 0.5)  # a stopped rank has none

    def work() -> None:
        strike(3, signal.SIGSTOP)
        one_step(ranks_of(OWNED, "cpu"))

    told = failure(work, 2)
    assert "RankGoneError: waiting for rows to their experts of blocks.1.ffn: rank 1 is gone or stuck" in told


def test_of_three_ranks_the_one_is_named() -> None:
    def work() -> None:
        strike(2, signal.SIGKILL)
        try:
            one_step(ranks_of(OWNED, "cpu"))
        except RankGoneError as error:
            raise RankGoneError(f"rank {dist.get_rank()} {error}") from None

    told = failure(work, 3)
    assert "waiting for rows from their experts of blocks.0.ffn: rank 1 is gone or stuck" in told


def test_the_cause_is_told_beside_its_consequence() -> None:
    def work() -> None:
        if dist.get_rank() == 0:
            raise RankGoneError("waiting for something: rank 1 is gone or stuck")
        time.sleep(0.5)
        raise KeyError("planted")

    told = failure(work, 2)
    assert told.startswith("rank 0 failed: ")
    assert "KeyError: 'planted'" in told


@pytest.mark.parametrize(("what", "waited"), [("sum", "a sum over ranks"), ("gather", "values of all ranks")])
def test_agreement_without_a_rank(what: str, waited: str) -> None:
    def work() -> None:
        ranks = ranks_of(OWNED, "cpu")
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.sum(torch.ones(1)) if what == "sum" else ranks.gather(1)

    assert f"waiting for {waited}: rank 1 is gone or stuck" in failure(work, 2)


def test_timeouts_that_are_none() -> None:
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"timeout: .* is not between 0 and"):
            ParallelConfig(timeout=seconds)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_under_torchrun(how: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, check=False)
    assert done.returncode == 1
    assert "waiting for rows to their experts of blocks.1.ffn: rank 1 is gone or stuck" in done.stderr


def under_torchrun(how: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run does, which saves first
    torch.set_num_threads(1)
    with joined(OWNED) as ranks:
        strike(3, getattr(signal, how))
        one_step(ranks)


if __name__ == "__main__":
    under_torchrun(sys.argv[1])
