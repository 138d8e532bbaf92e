"""The audit passes every shipped config, and catches planted bugs of the kinds that others have shipped."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from references import bias_of
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typer.testing import CliRunner

from moesaic.data.loader import Batch
from moesaic.launch.cli import app
from moesaic.launch.config import read_run
from moesaic.models.block import Block
from moesaic.moe.layer import MoE
from moesaic.parallel import all_to_all, banks
from moesaic.parallel import shard as shards
from moesaic.parallel.collectives import Arrived, Transfer, Wanted
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.materialize import Materialized
from moesaic.parallel.placement import OwnerMap, even_owners
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.reshard import reshard
from moesaic.parallel.shard import slot_tables
from moesaic.parallel.slots import slots_of
from moesaic.parallel.spawn import RankFailedError, run_ranks
from moesaic.train import audit as audits
from moesaic.train import step as steps
from moesaic.train.assemble import Trainee
from moesaic.train.audit import Audit, audit, by_kind, kind

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
SETTINGS = ["train.micro_batch_tokens=256", "parallel.recompute=block"]


def run_audit(*overrides: str, ranks: int = 2) -> Audit:
    return audit(read_run("debug", [*SETTINGS, *overrides], world_size=None), ranks=ranks)


def failed(found: Audit) -> dict[str, float]:
    """Kinds that failed, with their factors."""
    return {what: finding.scale for what, finding in by_kind(found.findings).items() if not finding.passed}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_pass(name: str) -> None:
    found = audit(read_run(name, world_size=None), ranks=2)
    assert failed(found) == {}
    assert {"loss", "grad embedding", "gradient norm", "held-out loss", "after step embedding"} <= {
        finding.what for finding in found.findings
    }


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["kernels=triton"]),
        (3, ["parallel.recompute=none", "model.ffn.aux=[{kind: balance, coef: 0.1, scope: micro_batch}]"]),
        (4, ["parallel.dp_replicate=2"]),
        (2, ["parallel.dp_replicate=2", "train.micro_batch_tokens=null"]),
        (2, ["model.ffn.bank=shared", "model.tied=false", "model.norm=peri", "model.qk_norm=false"]),
    ],
    ids=str,
)
def test_layouts_pass(ranks: int, overrides: list[str]) -> None:
    assert failed(run_audit(*overrides, ranks=ranks)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["parallel.recompute=none", "parallel.dp_replicate=2"]], ids=str)
def test_compiled_regions_pass(overrides: list[str]) -> None:
    assert failed(run_audit("parallel.compile=true", *overrides, ranks=2)) == {}


@pytest.mark.parametrize("overrides", [[], ["parallel.dp_replicate=2"]], ids=str)
def test_bf16_over_ranks_is_bf16_of_one_process(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks compute and matrices travel in bf16; sums over ranks do not. Tokens are rounded alike on any layout, so
    the losses agree closely; a matrix's gradient is rounded once per rank, and no gradient is scaled."""
    run = read_run("debug", [*SETTINGS, *overrides], world_size=None)
    small = audits.shrunken(run, 2)
    seen_types = []
    forward = Block.forward

    def spying(self: Block, *args: Any, **named: Any) -> Any:
        seen_types.append(self.attention.qkv.dtype)
        return forward(self, *args, **named)

    monkeypatch.setattr(Block, "forward", spying)

    def on_a_rank() -> tuple[list[dict[str, torch.Tensor]], set[torch.dtype]]:
        values = audits.observe(ranks_of(small.parallel, "cpu"), small, dtype=torch.bfloat16, num_steps=1)
        return values, set(seen_types)

    plain = replace(small, parallel=ParallelConfig())
    want = audits.observe(ALONE, plain, dtype=torch.bfloat16, num_steps=1)
    results = run_ranks(on_a_rank, 2)
    assert all(torch.bfloat16 in types for _, types in results)
    for found in audits.compare(want, [values for values, _ in results]):
        assert found.scale == pytest.approx(1, abs=5e-3), found
        assert found.error < (1e-4 if found.what in ("loss", "held-out loss") else 2e-2), found


def on_ranks(planted: Callable[..., Any], true: Callable[..., Any]) -> Callable[..., Any]:
    """The bug on ranks, the truth in the reference."""
    return lambda *args, **named: (planted if dist.is_initialized() else true)(*args, **named)


def test_unscaled_reduction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    audited = run_audit()
    first = {finding.what: finding for finding in audited.findings if finding.step == 0}
    assert first["grad attention_norm.weight"].passed  # replicated: not FSDP's to reduce
    found = {what: finding.scale for what, finding in first.items() if not finding.passed}
    assert found["grad attention.qkv"] == pytest.approx(0.5)


def test_gradients_doubled_by_ranks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = steps.sum_replicated

    def twice(model: torch.nn.Module, ranks: Ranks) -> None:
        true(model, ranks)
        true(model, ranks)

    monkeypatch.setattr(steps, "sum_replicated", on_ranks(twice, true))
    assert failed(run_audit())["grad attention_norm.weight"] == pytest.approx(2.0)


def test_division_that_counts_padding_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Batch.num_targets.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Batch, "num_targets", property(on_ranks(lambda self: self.targets.numel(), true)))  # type: ignore[arg-type]
    found = failed(run_audit())
    assert {"loss", "grad embedding", "gradient norm"} <= found.keys()
    assert found["grad embedding"] < 1


def test_unequal_tokens_per_rank_ignored_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Ranks.sum

    def local(self: Ranks, values: torch.Tensor) -> torch.Tensor:
        return values.double() * self.size if not values.is_floating_point() else true(self, values)

    monkeypatch.setattr(Ranks, "sum", on_ranks(local, true))
    assert {"loss", "grad embedding"} <= failed(run_audit()).keys()


def test_an_aux_term_counted_twice_under_recomputation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Block.forward

    def twice(self: Block, *args: Any, **named: Any) -> Any:
        y, stats = true(self, *args, **named)
        if stats is not None and self.recompute:
            aux = tuple((term, tuple(2 * part for part in sums)) for term, sums in stats.aux)
            stats = replace(stats, aux=aux)
        return y, stats

    monkeypatch.setattr(Block, "forward", twice)
    found = failed(run_audit())
    assert found["aux balance"] == pytest.approx(2.0, rel=1e-3)
    assert "grad ffn.router.gate" in found
    assert failed(run_audit("parallel.recompute=none")) == {}


def test_counts_from_evaluation_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = audits.evaluate

    def leaking(model: Any, *args: Any) -> Any:
        for block in model.blocks:
            if isinstance(block.ffn, MoE):
                bias_of(block.ffn).add_(1e-3 * torch.arange(block.ffn.router.num_experts))
        return true(model, *args)

    monkeypatch.setattr(audits, "evaluate", on_ranks(leaking, true))
    assert "after step ffn.router.bias" in failed(run_audit())


def test_clipping_by_the_local_norm_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = steps.gradient_norm

    def local(parameters: list[torch.Tensor], ranks: Ranks, owned: object) -> float:
        return true(parameters, Ranks()) if ranks.size == 1 else 0.7 * true(parameters, ranks)

    monkeypatch.setattr(steps, "gradient_norm", local)
    # AdamW forgets the scale of its first gradient, but not the ratio of two
    assert "after step embedding" in failed(run_audit())


def test_a_stale_buffer_on_one_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = audits.build_rules
    monkeypatch.setattr(
        audits,
        "build_rules",
        lambda *args: [] if dist.is_initialized() and dist.get_rank() == 1 else true(*args),
    )
    found = by_kind(run_audit().findings)["after step ffn.router.bias"]
    assert not found.passed
    assert found.where.startswith("rank 1")


def owned(*overrides: str, ranks: int = 2) -> dict[str, float]:
    """What fails of a run with owned experts."""
    return failed(run_audit("parallel.experts.kind=owned", *overrides, ranks=ranks))


def test_owned_experts_pass() -> None:
    assert owned() == {}
    assert owned("parallel.dp_replicate=2", ranks=4) == {}


def test_owned_gradients_divided_by_ranks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if they were averaged like those of data parallelism, although their owner has all tokens."""
    true = steps.sum_replicated

    def averaged(model: torch.nn.Module, ranks: Ranks) -> None:
        true(model, ranks)
        for table in slot_tables(model):
            assert table.master.grad is not None
            table.master.grad /= ranks.size

    monkeypatch.setattr(steps, "sum_replicated", averaged)
    found = owned()
    assert found["grad banks.w1"] == pytest.approx(0.5, rel=1e-3)
    assert found["grad banks.w2"] == pytest.approx(0.5, rel=1e-3)


def test_a_copy_left_out_of_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts learn from the tokens of their own replica of the model only."""
    true = shards.sum_replicated

    def forgetful(model: torch.nn.Module, ranks: Ranks) -> None:
        before = [table.master.grad.clone() for table in slot_tables(model)]  # type: ignore[union-attr]
        true(model, ranks)
        for table, grad in zip(slot_tables(model), before, strict=True):
            table.master.grad = grad

    monkeypatch.setattr(steps, "sum_replicated", on_ranks(forgetful, true))
    found = owned("parallel.dp_replicate=2", ranks=4)
    assert {"grad banks.w1", "grad banks.w2", "after step banks.w1"} <= found.keys()
    assert found["grad banks.w1"] < 0.9
    assert owned() == {}  # there is but one copy


def test_optimizer_state_left_behind_by_its_experts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of an expert that moved would be another's: the next step shows it."""

    def reversed_owners(trainee: Trainee, step: int, *, with_state: bool) -> None:
        tables = slot_tables(trainee.model)
        if step == 1 and tables:
            experts = {part.bank: part.num_experts for table in tables for part in table.owned.values()}
            new = {bank: owners[::-1] for bank, owners in even_owners(experts, 2).owners.items()}
            reshard(trainee.model, trainee.optimizer if with_state else None, OwnerMap(2, new))

    run = audits.shrunken(read_run("debug", [*SETTINGS, "parallel.experts.kind=owned"], world_size=None), 2)
    reference = audits.observe(ALONE, replace(run, parallel=ParallelConfig()))
    for with_state in (True, False):
        before = partial(reversed_owners, with_state=with_state)
        seen = run_ranks(
            lambda before=before: audits.observe(ranks_of(run.parallel, "cpu"), run, before=before), 2
        )
        wrong = {found.what for found in audits.compare(reference, seen) if not found.passed}
        assert wrong == (set() if with_state else {"after step banks.w1", "after step banks.w2"})


def test_rows_in_another_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came back is taken for what was sent, but for two rows."""
    true = all_to_all.Travel.finish

    def swapped(self: all_to_all.Travel, arriving: torch.Tensor) -> torch.Tensor:
        rows = true(self, arriving)
        return rows[[1, 0, *range(2, len(rows))]] if self.what.startswith("rows from") else rows

    monkeypatch.setattr(all_to_all.Travel, "finish", swapped)
    assert {"loss", "held-out loss", "grad banks.w1", "grad ffn.router.gate"} <= owned().keys()


def test_gates_that_see_no_travelled_rows_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate's gradient needs the rows that its token's experts sent back, not those on the way there."""
    true = all_to_all.combine_rows

    def cut(rows: torch.Tensor, gates: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        return true(rows, gates.detach(), *args, **named)

    monkeypatch.setattr(all_to_all, "combine_rows", cut)
    first = run_audit("parallel.experts.kind=owned")
    assert {finding.what for finding in first.findings if finding.step == 0 and not finding.passed} >= {
        "grad ffn.router.gate",
        "gradient norm",
    }
    assert by_kind(tuple(f for f in first.findings if f.step == 0))["loss"].passed


def test_local_rows_in_the_gradient_of_gates_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates multiply what came back, but their gradient is taken with what this rank's own experts computed."""
    true = all_to_all.combine_rows

    def mixed(rows: torch.Tensor, gates: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        half = len(rows) // 2
        others = torch.cat([rows[:half], rows[half:].detach() * 0])
        y = true(rows, gates.detach(), *args, **named)
        z = true(others.detach(), gates, *args, **named)
        return y + z - z.detach()

    monkeypatch.setattr(all_to_all, "combine_rows", mixed)
    assert "grad ffn.router.gate" in owned()


EVERYWHERE = "parallel.experts.plan.kind=replicate_all"


def test_copies_pass() -> None:
    found = run_audit("parallel.experts.kind=owned", EVERYWHERE, "parallel.experts.accumulate=last")
    assert failed(found) == {}
    assert "owned experts, copies by replicate_all" in found.layout
    assert owned(EVERYWHERE, "parallel.experts.rematerialize=true", ranks=3) == {}


def test_planners_copy_some_experts_of_shrunken_models() -> None:
    """Else an audit with a planner would say nothing about copies."""
    plans = ("auto", "hecate")

    def copies(plan: str) -> list[int]:
        overrides = ["parallel.experts.kind=owned", f"parallel.experts.plan.kind={plan}"]
        small = audits.shrunken(read_run("debug", [*SETTINGS, *overrides], world_size=None), 2)
        found = []

        def count(trainee: Trainee, step: int) -> None:
            slots = slots_of(trainee.model)
            assert slots is not None
            found.extend(int((bank.present & ~bank.alone).sum()) for bank in slots.banks.values() if step)

        audits.observe(ranks_of(small.parallel, "cpu"), small, before=count)
        return found

    for of_rank in run_ranks(lambda: [copies(plan) for plan in plans], 2):
        for found in of_rank:
            assert 0 < sum(found) < 8 * len(found)


@pytest.mark.parametrize("times", [0, 2])
def test_gradients_of_copies_that_are_not_returned_once_are_caught(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    true = banks.OwnedBank.send

    def wrong(self: banks.OwnedBank, *args: Any) -> None:
        for _ in range(times):
            true(self, *args)

    monkeypatch.setattr(banks.OwnedBank, "send", wrong)
    found = run_audit("parallel.experts.kind=owned", EVERYWHERE).findings
    first = {finding.what: finding.scale for finding in found if finding.step == 0 and not finding.passed}
    assert {"grad banks.w1", "grad banks.w2", "gradient norm", "after step banks.w1"} <= first.keys()
    assert (first["grad banks.w1"] - 1) * (times - 1) > 0  # too short or too long
    assert "grad ffn.router.gate" not in first


class Kept:
    """What a bank keeps, and does not let go of."""

    def __get__(self, bank: banks.OwnedBank | None, _: object) -> Any:
        return vars(bank).get("_kept")

    def __set__(self, bank: banks.OwnedBank, gather: banks.Gather | None) -> None:
        if gather is not None:
            vars(bank)["_kept"] = gather


def test_copies_of_stale_weights_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that were kept beyond their step are those of the weights before it; fused optimizers leave no trace in
    tensors."""
    monkeypatch.setattr(banks.Gather, "serves", lambda self, dtype: self.dtype == dtype)
    monkeypatch.setattr(banks.OwnedBank, "kept", Kept(), raising=False)
    settings = ["parallel.experts.kind=owned", EVERYWHERE, "parallel.experts.accumulate=last"]
    found = run_audit(*settings).findings
    assert all(finding.passed for finding in found if finding.step == 0)
    assert {"loss", "grad banks.w1"} <= {finding.what for finding in found if not finding.passed}


def test_copies_in_another_order_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of one expert are taken for another's."""
    true = Transfer.finish

    def reversed_experts(self: Transfer) -> Arrived:
        arrived = true(self)
        if self.what != "copies of experts":
            return arrived
        return Arrived(list(arrived.experts)[::-1], arrived.rows)

    monkeypatch.setattr(Transfer, "finish", reversed_experts)
    assert {"loss", "held-out loss", "grad banks.w1", "grad ffn.router.gate"} <= owned(EVERYWHERE).keys()


def test_matrices_that_are_read_after_they_were_freed_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be gathered again for the backward pass."""
    true = Materialized.fill

    def once(self: Materialized) -> None:
        if not self.filled and not hasattr(self, "had"):
            true(self)
            self.had = True  # type: ignore[attr-defined]

    monkeypatch.setattr(Materialized, "fill", once)
    with pytest.raises(RankFailedError, match="experts are read before they are here"):
        owned(EVERYWHERE, "parallel.experts.rematerialize=true", "parallel.recompute=none")


def test_copies_made_within_the_layer_without_a_gradient_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank returns gradients of the copies that were planned before the step only."""
    costs = "{row: 1000, row_near: 1000, copy_near: 1, copy_far: 1, grad_near: 1, grad_far: 1}"
    plan = "{kind: hecate, overlap: 3, most_copies: 3, calibrate: true}"
    calibrated = [f"parallel.experts.plan={plan}", f"parallel.experts.costs={costs}"]
    assert owned(*calibrated) == {}
    true = banks.OwnedBank.give_back

    def forgetful(self: banks.OwnedBank, copied: Sequence[int], gradients: Tensor, wanted: Wanted) -> None:
        if self.rank == 1:
            gradients[[place for place, expert in enumerate(copied) if not self.present[1, expert]]] = 0
        true(self, copied, gradients, wanted)

    monkeypatch.setattr(banks.OwnedBank, "give_back", forgetful)
    found = owned(*calibrated)
    assert {"grad banks.w1", "grad banks.w2", "gradient norm", "after step banks.w1"} <= found.keys()


@pytest.mark.parametrize("local", [False, True])
def test_a_norm_without_all_owned_experts_is_caught(monkeypatch: pytest.MonkeyPatch, local: bool) -> None:
    """Left out, or only those of each rank itself, which then clips by a number of its own."""

    def wrong(parameters: list[torch.Tensor], ranks: Ranks, owned: Collection[torch.Tensor]) -> float:
        left = [p for p in parameters if local or all(p is not master for master in owned)]
        return shards.gradient_norm(left, ranks)

    monkeypatch.setattr(audits, "gradient_norm", wrong)
    assert 0 < owned()["gradient norm"] < 1
    monkeypatch.undo()
    monkeypatch.setattr(steps, "gradient_norm", wrong)
    assert "after step embedding" in owned()  # clipped to another length


def test_kinds_leave_out_the_layer() -> None:
    assert kind("grad blocks.3.attention.qkv") == "grad attention.qkv"
    assert kind("after step banks.layer2.w1") == "after step banks.w1"
    assert kind("counts layer2") == "counts"
    assert kind("loss") == "loss"


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["audit", "quickstart_dense", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["ranks"], told["passed"]) == (2, True)
    monkeypatch.setattr(FSDPModule, "set_gradient_divide_factor", lambda self, factor: None)
    done = CliRunner().invoke(app, ["audit", "quickstart_dense"])
    assert done.exit_code == 1
    assert "FAILED" in done.stdout
    assert "0.500" in done.stdout
