"""The audit passes every shipped config, and catches planted bugs of the kinds that others have shipped."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from typer.testing import CliRunner

from moesaic.data.loader import Batch
from moesaic.launch.cli import app
from moesaic.launch.config import read_run
from moesaic.models.block import Block
from moesaic.moe.layer import MoE
from moesaic.parallel.config import ParallelConfig
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.spawn import run_ranks
from moesaic.train import audit as audits
from moesaic.train import step as steps
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
        (1, []),
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
        values = audits.observe(ranks_of(small.parallel, "cpu"), small, dtype=torch.bfloat16)
        return values, set(seen_types)

    plain = replace(small, parallel=ParallelConfig())
    want = audits.observe(ALONE, plain, dtype=torch.bfloat16)[:1]
    results = run_ranks(on_a_rank, 2)
    assert all(torch.bfloat16 in types for _, types in results)
    for found in audits.compare(want, [values[:1] for values, _ in results]):
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
                block.ffn.router.bias.add_(1e-3 * torch.arange(block.ffn.router.num_experts))
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
    true = audits.rules_of
    monkeypatch.setattr(
        audits,
        "rules_of",
        lambda model, *_, **__: [] if dist.is_initialized() and dist.get_rank() == 1 else true(model),
    )
    found = by_kind(run_audit().findings)["after step ffn.router.bias"]
    assert not found.passed
    assert found.where.startswith("rank 1")


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
