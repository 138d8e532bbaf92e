"""Experts that move between steps: no value of a run depends on who owns what."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from references import largest_error
from torch import Tensor

from moesaic.launch.config import read_run
from moesaic.models.names import logical_tensors
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.reshard import reshard
from moesaic.parallel.slots import slots_of
from moesaic.parallel.spawn import run_ranks
from moesaic.train import audit as audits
from moesaic.train.audit import Audit, audit, by_kind, full, global_batch, my_batch
from moesaic.train.config import RunConfig
from moesaic.train.device import Device
from moesaic.train.optim import build_optimizer, optimizer_tensors
from moesaic.train.rules import Rebalance, rules_of
from moesaic.train.step import Compute, accumulate, update

STEPS = 3
OWNED = ["parallel.experts.kind=owned", "train.micro_batch_tokens=256"]


def small(ranks: int, *overrides: str) -> RunConfig:
    return audits.shrunken(read_run("debug", [*OWNED, *overrides], world_size=None), ranks)


def go(ranks: Ranks, run: RunConfig, *, seed: int | None) -> dict[str, Tensor]:
    """A few steps; with a seed, experts get random owners after each. Weights and optimizer state, whole."""
    model = audits.build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ranks)
    optimizer = build_optimizer(model, run.optim)
    compute = Compute(torch.device("cpu"), torch.float64, seed=run.seed)
    micro, rng = run.train.micro_batches, np.random.default_rng(seed)
    for step in range(STEPS):
        batch = my_batch(global_batch(run, step), ranks, micro)
        sums = accumulate(model, batch, compute, micro_batches=micro, step=step, ranks=ranks)
        settings: dict[str, Any] = {"config": run.optim, "step": step, "steps": STEPS + 1, "ranks": ranks}
        update(model, optimizer, sums, rules=rules_of(model), **settings)
        slots = slots_of(model)
        if slots is not None and seed is not None:
            size = slots.owners.ranks
            owners = {
                bank: tuple(rng.integers(0, size, len(old)).tolist())
                for bank, old in slots.owners.owners.items()
            }
            reshard(model, optimizer, OwnerMap(size, owners), slab=1 << (step * 10))
    tensors = logical_tensors(model) | optimizer_tensors(model, optimizer)
    return {name: full(tensor.detach(), ranks).clone() for name, tensor in tensors.items()}


MUON = [
    "optim={kind: muon, lr: 5e-3, clip: 0.01, schedule: {kind: cosine, warmup: 2}}"
]  # gradients have norms of about 1
CASES = {
    2: ([], ["model.ffn.bank=shared"], ["parallel.experts.max_rows=40"], MUON),
    3: (MUON,),
    4: (
        [],
        ["parallel.dp_replicate=2"],
        [
            "model.ffn_at={'1': {kind: moe, num_experts: 5, hidden: 9, expert: relu2, router: {kind: topk, k: 2}}}"
        ],
    ),
}


@pytest.mark.parametrize("ranks", CASES)
def test_moving_at_random_changes_no_value(ranks: int) -> None:
    runs = [small(ranks, *overrides) for overrides in CASES[ranks]]
    alone = [go(ALONE, replace(run, parallel=ParallelConfig()), seed=None) for run in runs]
    seen = run_ranks(
        lambda: [go(ranks_of(run.parallel, "cpu"), run, seed=n) for n, run in enumerate(runs)], ranks
    )
    for number, want in enumerate(alone):
        for of_rank in seen:
            found = of_rank[number]
            assert found.keys() == want.keys()
            for name, exact in want.items():
                assert largest_error(found[name], exact) < 1e-12, (CASES[ranks][number], name)


def failed(found: Audit) -> set[str]:
    return {what for what, finding in by_kind(found.findings).items() if not finding.passed}


def test_the_audit_moves_experts_at_each_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run("debug", [*OWNED, "parallel.experts.rebalance=50"], world_size=None)
    found = audit(run, ranks=2)
    assert "that move" in found.layout
    assert failed(found) == set()
    true = Rebalance.move

    def forgetful(self: Rebalance, model: Any) -> dict[str, float]:
        """Moves weights without their moments."""
        self.optimizer = torch.optim.SGD(model.parameters())
        return true(self, model)

    monkeypatch.setattr(Rebalance, "move", forgetful)
    assert "after step banks.w1" in failed(audit(run, ranks=2))


def test_owners_follow_the_rows() -> None:
    run = small(2, "parallel.experts.rebalance=2")

    def work() -> list[dict[str, float]]:
        ranks = ranks_of(run.parallel, "cpu")
        model = audits.build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ranks)
        optimizer = build_optimizer(model, run.optim)
        rule = Rebalance(2, optimizer)
        slots = slots_of(model)
        assert slots is not None
        seen = []
        for step, heavy in enumerate(([0, 1], [0, 1], [0, 1], [0, 3])):
            counts = torch.ones(len(next(iter(slots.owners.owners.values()))), dtype=torch.int64)
            counts[heavy] = 9
            layers = [n for n, block in enumerate(model.blocks) if hasattr(block.ffn, "router")]
            seen.append(rule(model, audits.steps.StepState(step, dict.fromkeys(layers, counts))))
            for owners in slots.owners.owners.values():
                apart = owners[0] != owners[1]
                assert apart == (step > 0)
            assert bool(rule.rows) == (step % 2 == 0)
        return seen

    for seen in run_ranks(work, 2):
        assert seen[0] == {}
        assert seen[1]["owners/moved"] > 0
        assert seen[1]["owners/peak_after"] < seen[1]["owners/peak_before"]
        assert seen[2] == seen[1]


def test_copied_experts_do_not_count_for_heterogeneous_owners() -> None:
    """Experts 0 and 1 are hot and copied everywhere; of the others, 2 and 3 are the heaviest."""
    run = small(2, "parallel.experts.rebalance=1", "parallel.experts.owners=heterogeneous")

    def work() -> list[tuple[int, ...]]:
        ranks = ranks_of(run.parallel, "cpu")
        model = audits.build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ranks)
        slots = slots_of(model)
        assert slots is not None
        for bank in slots.banks.values():
            bank.present = bank.alone.copy()
            bank.present[:, [0, 1]] = True
        rules = rules_of(model, build_optimizer(model, run.optim), owned=run.parallel.owned)
        (rule,) = (rule for rule in rules if isinstance(rule, Rebalance))
        layers = [n for n, block in enumerate(model.blocks) if hasattr(block.ffn, "router")]
        rows = torch.ones(len(next(iter(slots.owners.owners.values()))), dtype=torch.int64)
        rows[:4] = torch.tensor([900, 800, 50, 40])
        rule(model, audits.steps.StepState(0, dict.fromkeys(layers, rows)))
        return list(slots.owners.owners.values())

    for owners in run_ranks(work, 2)[0]:
        assert owners[2] != owners[3], "the heaviest that are not copied are apart"
        assert owners[0] != owners[1], "so are the owners that send copies"


def test_a_negative_number_of_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.experts\.rebalance: -1 is negative"):
        read_run("debug", [*OWNED, "parallel.experts.rebalance=-1"], world_size=None)


def test_one_process_has_nothing_to_move() -> None:
    run = small(1, "parallel.experts.rebalance=1")
    model = audits.build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ALONE)
    rules = rules_of(model, build_optimizer(model, run.optim), owned=run.parallel.owned)
    assert not any(isinstance(rule, Rebalance) for rule in rules)
    with pytest.raises(ValueError, match="have no owners"):
        reshard(model, None, OwnerMap(1, {}))
