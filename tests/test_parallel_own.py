"""What makes ranks disagree about experts is refused on every one of them, at once: unlike models, unlike nodes, and
planners that fail or differ somewhere."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from moesaic.launch.cli import app
from moesaic.launch.config import read_run
from moesaic.moe.feedforward import FeedForward
from moesaic.moe.layer import MoE
from moesaic.moe.topk import TopKRouter
from moesaic.parallel.config import OwnedExperts, ParallelConfig
from moesaic.parallel.costs import Costs
from moesaic.parallel.own import replica_group
from moesaic.parallel.placement import Counts, Present, Topology, no_copies
from moesaic.parallel.plans import CustomPlanConfig
from moesaic.parallel.ranks import ranks_of
from moesaic.parallel.spawn import run_ranks
from moesaic.train import audit as audits
from moesaic.train.config import RunConfig

FREE = Costs(row=0, copy_near=0, copy_far=0, grad_near=0, grad_far=0)


class Faulty:
    """A planner with a fault on one rank, or on all; within a layer where it is `exact`."""

    def __init__(self, *, costs: Costs, fault: str, exact: bool) -> None:
        self.fault, self.exact = fault, exact

    def plan(
        self, history: Sequence[Counts], exact: Counts | None, owners: tuple[int, ...], topology: Topology
    ) -> Present:
        plan = no_copies(owners, topology.ranks)
        if self.exact and exact is None:
            return plan
        if self.fault == "loses an owner":
            plan[:, 1] = False
        if self.fault == "another shape":
            plan = plan[:, 1:]
        if self.fault == "differs" and dist.get_rank() == 1:
            plan[:, 1] = True
        if self.fault == "raises on one rank" and dist.get_rank() == 1:
            raise KeyError("no such expert")
        return plan


def run_with(fault: str, *, exact: bool, name: str = "Faulty") -> RunConfig:
    run = audits.shrunken(read_run("debug", [], world_size=None), 2)
    plan = CustomPlanConfig(planner=f"test_parallel_own:{name}", options={"fault": fault, "exact": exact})
    return replace(run, parallel=replace(run.parallel, experts=OwnedExperts(plan=plan, costs=FREE)))


def outcome(work: Callable[[], object]) -> str:
    """What was raised, and that it came soon: nobody waited in vain."""
    began = time.monotonic()
    try:
        work()
    except ValueError as error:
        took = time.monotonic() - began
        assert took < 60, f"{took:.0f} seconds"
        return f"{type(error).__name__}: {error}"
    return "nothing"


FAILED = "PlanError: parallel.experts.plan: the planner failed on rank "
OUTCOMES = {
    "loses an owner": FAILED
    + "0: bank 'layer1': expert 1 is not on its owner, rank 0; a plan may only add copies",
    "another shape": FAILED
    + "0: bank 'layer1': a plan is a numpy array of bool (2, 8) (ranks, experts), not bool (2, 7)",
    "differs": "PlanError: parallel.experts.plan: bank 'layer1': ranks 0 and 1 made different plans; a planner may "
    "only depend on what it is given, which is the same on every rank",
    "raises on one rank": FAILED + "1: bank 'layer1': KeyError: 'no such expert'",
}


def test_a_planner_with_a_fault_is_refused_on_every_rank() -> None:
    """Before a step and within a layer, where what is returned joins the plan, so that no owner can be lost."""

    def work() -> dict[tuple[str, bool], str]:
        return {
            (fault, exact): outcome(lambda: audits.observe(ranks_of(run.parallel, "cpu"), run, num_steps=1))
            for exact in (False, True)
            for fault in OUTCOMES
            if (run := run_with(fault, exact=exact))
        }

    want = {(fault, exact): text for fault, text in OUTCOMES.items() for exact in (False, True)}
    want["loses an owner", True] = "nothing"
    for found in run_ranks(work, 2, timeout=100):
        assert found == want


def test_a_planner_that_is_missing_on_one_rank_is_refused_on_every_rank() -> None:
    def work() -> str:
        run = run_with("", exact=False, name="Faulty" if dist.get_rank() else "Missing")
        return outcome(lambda: audits.observe(ranks_of(run.parallel, "cpu"), run, num_steps=1))

    missing = "planner: module 'test_parallel_own' has no 'Missing'; give one of its classes"
    assert run_ranks(work, 2) == [f"{FAILED}0: {missing}"] * 2


def test_the_command_line_tells_a_planners_fault_in_one_line(tmp_path: Path) -> None:

    plan = (
        "{kind: custom, planner: 'test_parallel_own:Faulty', options: {fault: loses an owner, exact: false}}"
    )
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number}. " * 20)
    text = f"data={{kind: text, path: '{tmp_path}/*.txt', seq_len: 16, tokenizer: {{kind: bytes}}, eval_fraction: 0.3}}"
    costs = "{row: 0, copy_near: 0, copy_far: 0, grad_near: 0, grad_far: 0}"
    arguments = [
        f"parallel.experts={{kind: owned, plan: {plan}, costs: {costs}}}",
        "train={batch_tokens: 64, micro_batch_tokens: 64, precision: fp32, threads: 1}",
    ]

    def work() -> tuple[int, str]:
        done = CliRunner().invoke(app, ["train", "debug", f"dir={tmp_path}", text, *arguments])
        return done.exit_code, done.stderr

    for code, told in run_ranks(work, 2):
        assert code == 2
        assert told.strip().splitlines()[-1] == "error: " + OUTCOMES["loses an owner"].removeprefix(
            "PlanError: "
        )


@pytest.mark.parametrize(("mine", "words"), [(6, "6 experts of 2 x 20 x 24"), (None, "no such bank")])
def test_unlike_models_are_refused_on_every_rank(mine: int | None, words: str) -> None:
    run = audits.shrunken(read_run("debug", ["parallel.experts.kind=owned"], world_size=None), 2)

    def ffn(of: FeedForward.Config | MoE.Config) -> FeedForward.Config | MoE.Config:
        if not isinstance(of, MoE.Config) or dist.get_rank() != 1:
            return of
        if mine is None:
            return FeedForward.Config(hidden=20)
        return replace(of, num_experts=mine, router=TopKRouter.Config(k=2))

    def work() -> str:
        ffns = {at: ffn(of) for at, of in run.model.ffn_at.items()}
        here = replace(run, model=replace(run.model, ffn_at=ffns))
        return outcome(lambda: audits.observe(ranks_of(run.parallel, "cpu"), here, num_steps=1))

    for found in run_ranks(work, 2):
        assert found == (
            f"ValueError: bank 'layer1': 8 experts of 2 x 20 x 24 on rank 0, but {words} on rank 1; every rank "
            "needs the same model: give all the same config"
        )


def test_rows_have_a_group_of_their_own() -> None:
    """A mesh over all ranks hands out the default group, in which rows would queue behind other weights."""

    def work() -> tuple[bool, list[int]]:
        mesh = ranks_of(ParallelConfig(), "cpu").mesh
        assert mesh is not None
        groups = [replica_group(mesh), replica_group(mesh), mesh.get_group("dp_shard")]
        return len(set(map(id, groups))) == 3, dist.get_process_group_ranks(groups[0])

    assert run_ranks(work, 2) == [(True, [0, 1])] * 2


def test_nodes_of_unequal_sizes() -> None:
    """Two levels are refused; one level takes the largest node for all, so that every rank plans alike."""
    base = audits.shrunken(read_run("debug", ["parallel.experts.kind=owned"], world_size=None), 3)

    def work() -> tuple[str, str]:
        os.environ["LOCAL_WORLD_SIZE"] = "2" if dist.get_rank() < 2 else "1"
        found = []
        for levels in ("one", "two"):
            run = replace(base, parallel=replace(base.parallel, experts=OwnedExperts(levels=levels)))
            found.append(
                outcome(lambda run=run: audits.observe(ranks_of(run.parallel, "cpu"), run, num_steps=1))
            )
        return tuple(found)  # type: ignore[return-value]

    refused = (
        "ValueError: parallel.experts.levels: two levels need nodes with equally many ranks, but there are nodes of 1, "
        "2; use `levels: one`, or start as many processes on every node"
    )
    assert run_ranks(work, 3) == [("nothing", refused)] * 3
