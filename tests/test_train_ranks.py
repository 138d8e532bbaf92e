"""Whole runs over several ranks: the same numbers as one process, and resumed on any number of ranks."""

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.data.loader import Loader
from moesaic.launch.config import read_run, run_to_yaml
from moesaic.models.names import logical_tensors
from moesaic.parallel import replan as replans
from moesaic.parallel.checkpoint import read_meta, read_tensors
from moesaic.parallel.costs import Costs
from moesaic.parallel.ranks import ALONE, Ranks, ranks_of
from moesaic.parallel.replan import Replan
from moesaic.parallel.shard import replicated_parameters, slot_tables
from moesaic.parallel.spawn import run_ranks
from moesaic.train import generate as generation
from moesaic.train import session
from moesaic.train.assemble import Trainee
from moesaic.train.audit import build_model_wide, full
from moesaic.train.checkpoints import CheckpointConfig, Checkpoints
from moesaic.train.config import RunConfig
from moesaic.train.device import Device
from moesaic.train.loop import Loop
from moesaic.train.nonfinite import bad_gradient, bad_weight
from moesaic.train.optim import build_optimizer
from moesaic.train.rules import restore_rules, rules_of, states_of
from moesaic.train.step import Compute, accumulate, update
from moesaic.train.words import costs_in_words, costs_to_paste, layout_in_words

VOCAB = 61


@pytest.fixture(autouse=True)
def no_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing takes a second and there are many runs here; one test looks at it."""
    if request.function is not test_ranks_that_own_experts_tell_what_travelled:
        monkeypatch.setattr(session, "draw_report", lambda *_: None)


def tiny(tmp_path: Path, *overrides: str) -> RunConfig:
    """A run of 12 steps on a few files."""
    text = tmp_path / "text"
    if not text.exists():
        text.mkdir()
        for number in range(8):
            words = " ".join(f"fox {number * index % 17}" for index in range(150 + 9 * number))
            (text / f"{number}.txt").write_text(f"file {number}: {words}")
    settings = [
        f"data={{kind: text, path: '{text}/*.txt', seq_len: 32, tokenizer: {{kind: bytes}}, eval_fraction: 0.2}}",
        f"dir={tmp_path / 'runs'}",
        "train={steps: 12, batch_tokens: 384, micro_batch_tokens: 192, precision: fp32, threads: 1}",
        "optim.schedule={kind: wsd, warmup: 4, decay: 0.2}",
        "checkpoint={every: 0}",
        "eval={every: 6, tokens: 700, prompts: ['file'], sample_tokens: 8}",
        "log={every: 1, tensorboard: false}",
    ]
    return read_run("debug", [*settings, *overrides], world_size=None)


def train(run: RunConfig, ranks: int, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train on so many ranks; the records of the run."""
    text = run_to_yaml(run)

    def work() -> int:
        return session.train(run, text, resume=resume, profile=False, command=["test"])

    codes = [work()] if ranks == 1 else run_ranks(work, ranks)
    assert codes == [0] * ranks
    lines = (Path(run.dir) / run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def column(found: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in found if key in record}


OWNED = ["parallel.experts.kind=owned", "parallel.experts.max_rows=100", "parallel.experts.rebalance=2"]
LAYOUTS = [pytest.param([], marks=pytest.mark.slow), OWNED]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_run_resumed_on_other_numbers_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: list[str]
) -> None:
    run = tiny(tmp_path, *layout)
    whole = train(replace(run, name="whole"), 1)
    true = Loop.agree
    for ranks, last in ((1, 3), (2, 6), (4, 9), (1, 12)):
        monkeypatch.setattr(
            Loop, "agree", lambda self, *args, last=last: (true(self, *args)[0], self.tally.step == last)
        )
        found = train(run, ranks, resume=True)
        assert list(column(found, "train/loss")) == list(range(1, last + 1))
    for key in ("train/loss", "train/grad_norm", "eval/loss", "eval/bits_per_byte", "train/bits_per_byte"):
        want, got = column(whole, key), column(found, key)
        assert want.keys() == got.keys()
        assert all(got[step] == pytest.approx(want[step], rel=1e-4) for step in want), key
        for first in (4, 7, 10):
            if first in want:
                assert got[first] == pytest.approx(want[first], rel=1e-5)
    folder = Path(run.dir) / run.name
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts) == 4
    assert (folder / "samples.txt").read_text().count("=== step 12") == 1


def test_a_run_whose_experts_move_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners, and the rows counted since they were last looked at, come back with the checkpoint."""
    run = tiny(
        tmp_path,
        "parallel.experts.kind=owned",
        "parallel.experts.rebalance=3",
        "train.steps=8",
        "eval.prompts=[]",
    )
    whole = train(replace(run, name="whole"), 2)
    moved = column(whole, "owners/moved")
    assert list(moved) == list(range(3, 9))
    assert sum(moved.values()) > 0
    true = Loop.agree
    for last in (5, 8):
        monkeypatch.setattr(
            Loop, "agree", lambda self, *args, last=last: (true(self, *args)[0], self.tally.step == last)
        )
        found = train(run, 2, resume=True)
        if last == 5:
            rules = read_meta(Path(run.dir) / run.name / "checkpoints" / "step_00000005")["rules"]
            assert rules["rebalance"]["owners"].keys() == {"layer1", "layer2"}
            assert any(sorted(owners) != owners for owners in rules["rebalance"]["owners"].values())
            assert all(sum(rows) for rows in rules["rebalance"]["rows"].values())
    for mine, other in zip(found, whole, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in other.items() if not k.startswith("time/")
        }
    last_checkpoint = Path("checkpoints") / "step_00000008"
    want = read_tensors(Path(run.dir) / "whole" / last_checkpoint)
    for name, tensor in read_tensors(Path(run.dir) / run.name / last_checkpoint).items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("given", [True, False])
def test_a_run_with_copies_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """Plans of every step are as before: counts of earlier steps and costs come back with the checkpoint, also costs
    that were measured. On another number of ranks the history begins anew."""
    prices = {"row": 1000, "row_near": 1000, "row_far": 1000, "copy_near": 5000, "copy_far": 5000}
    costs = Costs(**prices, grad_near=5000, grad_far=5000)
    plan = "parallel.experts={kind: owned, plan: {kind: auto, window: 3}}"
    run = tiny(tmp_path, plan, "train.steps=4", "eval.prompts=[]", "optim.schedule.warmup=2")
    measured = iter([costs, replace(costs, row=1)])  # a second measurement would plan otherwise
    monkeypatch.setattr(replans, "measure_costs", lambda *_, **__: {f"layer{n}": now for n in (1, 2)})
    if given:
        owned = replace(run.parallel.experts, costs=costs)  # type: ignore[type-var]
        run = replace(run, parallel=replace(run.parallel, experts=owned))
    now = next(measured)
    whole = train(replace(run, name="whole"), 2)
    assert sum(column(whole, "plan/copies").values()) > 0
    true, plan_of = Loop.agree, Replan.step
    for last in (2, 4):
        monkeypatch.setattr(
            Loop, "agree", lambda self, *args, last=last: (true(self, *args)[0], self.tally.step == last)
        )
        found = train(run, 2, resume=True)
        now = next(measured, now)
    for mine, other in zip(found, whole, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in other.items() if not k.startswith("time/")
        }
    last_checkpoint = Path("checkpoints") / "step_00000004"
    want = read_tensors(Path(run.dir) / "whole" / last_checkpoint)
    for name, tensor in read_tensors(Path(run.dir) / run.name / last_checkpoint).items():
        assert torch.equal(tensor, want[name]), name
    if not given:
        return
    histories: list[int] = []

    def step(self: Replan) -> dict[str, float]:
        histories.extend(len(bank.history) for bank in self.slots.banks.values())
        return plan_of(self)

    monkeypatch.setattr(Loop, "agree", true)
    monkeypatch.setattr(Replan, "step", step)
    text = replace(run, train=replace(run.train, steps=5))

    def work() -> list[int]:
        session.train(text, run_to_yaml(text), resume=True, profile=False, command=["test"])
        return histories

    assert run_ranks(work, 3) == [[0, 0]] * 3
    rules = read_meta(Path(run.dir) / run.name / "checkpoints" / "step_00000005")["rules"]
    assert rules["plan"]["ranks"] == 3
    assert [len(of) for of in rules["plan"]["history"].values()] == [1, 1]


def test_four_ranks_show_and_write_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny(tmp_path, "parallel.dp_replicate=2", "train.steps=8")
    found = train(run, 4)
    assert list(column(found, "train/loss")) == list(range(1, 9))
    shown = capfd.readouterr().out
    assert shown.count("4 processes: dp_replicate 2 x dp_shard 2,") == 1
    assert not [key for record in found for key in record if key.startswith("traffic/")]
    folder = Path(run.dir) / run.name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000008"]
    alone = train(replace(run, name="alone", parallel=replace(run.parallel, dp_replicate=1)), 1)
    assert column(found, "train/loss") == pytest.approx(column(alone, "train/loss"), rel=1e-5)
    counts = [key for key in alone[0] if key.endswith("/load")]
    assert counts
    for mine, other in zip(found, alone, strict=True):
        assert [mine[key] for key in counts if key in mine] == [other[key] for key in counts if key in other]


class Travelled(TorchDispatchMode):
    """Adds up what collectives of sharded matrices send from this rank to others."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_allgather_base_":
            self.gathered += args[0].nbytes - args[1].nbytes
        if name == "_reduce_scatter_base_":
            self.scattered += args[1].nbytes - args[0].nbytes
        return func(*args, **(kwargs or {}))


def test_ranks_that_own_experts_tell_what_travelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("parallel.experts.kind=owned", "parallel.recompute=block", "train.steps=6", "log.every=2")
    run = tiny(tmp_path, *settings, "eval={every: 3, tokens: 700, prompts: ['file'], sample_tokens: 8}")
    true = Loop.step

    def step(self: Loop, batch: Any) -> Any:
        if self.tally.step != 1:
            return true(self, batch)
        with Travelled() as travelled:
            found = true(self, batch)
        small = sum(parameter.nbytes for parameter in replicated_parameters(self.trainee.model))
        assert self.meter.dense == {
            "weights": 2 * travelled.gathered,
            "gradients": 2 * travelled.scattered + 2 * small,
        }
        assert travelled.gathered > 0
        assert travelled.scattered > 0
        return found

    monkeypatch.setattr(Loop, "step", step)
    runs = [run, replace(run, name="again")]

    def work() -> list[int]:
        return [
            session.train(one, run_to_yaml(one), resume=False, profile=False, command=["test"])
            for one in runs
        ]

    assert run_ranks(work, 2) == [[0, 0], [0, 0]]
    found, again = (
        [json.loads(line) for line in (Path(run.dir) / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("debug", "again")
    )
    steps = [record for record in found if "train/loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 6]
    for record in steps:  # before step 4 came an evaluation
        rows = record["traffic/rows"]
        assert len(rows) == len(record["time/waited"]) == 2
        assert sum(rows) == 384 * 2 * 2  # tokens, experts of each, layers
        assert record["traffic/rows_max_over_mean"] == max(rows) / (384 * 2)
        # ranks, experts of 8 bytes, layers, micro-batches, and each computed twice
        assert record["traffic/bytes_counts"] == 2 * (8 * 8) * 2 * 2 * 2
        assert record["traffic/bytes_tokens"] > 0
        assert sum(record["time/waited"]) > 0

    def lasting(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]

    assert lasting(found) == lasting(again)
    folder = Path(run.dir) / run.name
    assert "<h2>Ranks</h2>" in (folder / "report.html").read_text()
    log = (folder / "log.txt").read_text()
    assert "dp_shard 2, experts owned (4 each), " in log
    assert f"rank load {steps[-1]['traffic/rows_max_over_mean']:.2f}" in log


def test_layouts_in_words(tmp_path: Path) -> None:
    def words(ranks: int, *settings: str) -> str:
        return layout_in_words(tiny(tmp_path, *settings), ranks)

    owned = "parallel.experts.kind=owned"
    assert words(1, owned) == "1 process"
    assert words(2) == "2 processes: dp_replicate 1 x dp_shard 2"
    assert words(2, owned, "model.ffn={kind: dense, hidden: 8}") == words(2)
    assert words(2, owned) == words(2) + ", experts owned (4 each)"
    assert words(3, owned).endswith(" x dp_shard 3, experts owned (2 to 3 each)")
    assert words(4, owned, "parallel.dp_replicate=2", "parallel.experts.max_rows=1000") == (
        "4 processes: dp_replicate 2 x dp_shard 2, experts owned (4 each) in rounds of up to 1,000 rows"
    )
    auto = "parallel.experts.plan={kind: auto, most_copies: 2}"
    assert words(2, owned, auto) == words(2, owned) + ", copies by auto (up to 2 a rank)"
    assert words(2, owned, "parallel.experts.rematerialize=true") == words(2, owned)
    mine = "parallel.experts.plan={kind: custom, planner: 'my.plans:Two'}"
    freed = words(2, owned, mine, "parallel.experts.rematerialize=true", "parallel.experts.max_rows=9")
    assert freed == words(2, owned) + ", copies by my.plans:Two, freed after use in rounds of up to 9 rows"


def test_a_run_tells_what_copies_cost_and_how_many_there_are(tmp_path: Path) -> None:
    auto = ("parallel.experts.kind=owned", "parallel.experts.plan.kind=auto", "train.steps=6", "log.every=2")
    run = tiny(tmp_path, *auto, "eval.every=0", "checkpoint.every=0")
    given = replace(
        run.parallel.experts, costs=Costs(row=10**6, copy_near=1, copy_far=1, grad_near=1, grad_far=1)
    )
    runs = [run, replace(run, name="given", parallel=replace(run.parallel, experts=given))]

    def work() -> list[int]:
        return [
            session.train(one, run_to_yaml(one), resume=False, profile=False, command=["test"])
            for one in runs
        ]

    assert run_ranks(work, 2) == [[0, 0], [0, 0]]
    measured, told = ((Path(one.dir) / one.name / "log.txt").read_text() for one in runs)
    assert ", copies by auto" in measured
    assert "costs      layer" in measured
    assert len(re.findall(r"costs of layer.*: \{row: \d+, .*\}; as parallel.experts.costs", measured)) == 1
    assert "costs of" not in told
    assert re.search(r"step 6/6 .*  copies [1-9]", told)


def test_costs_in_words_and_as_a_config() -> None:
    near = Costs(
        row=1_234_000, row_near=5000, copy_near=7_000_000, copy_far=0, grad_near=80_000_000, grad_far=0
    )
    far = replace(
        near,
        expert=3_000_000,
        message=4_000_000,
        row_near=0,
        row_far=20_000,
        copy_near=0,
        copy_far=9_000_000,
        micro_batches=2,
    )
    found = {"layer1": near, "layer2": far, "layer3": near}
    assert costs_in_words(found) == [
        "layer1 to layer3 (2 banks): a row 1.23 us, its trip 0.005 us, an expert with rows 0 us, "
        "a message 0 us, a copy 7 us, its gradient 80 us",
        "layer2: a row 1.23 us, its trip 0.02 us between nodes, an expert with rows 3 us, "
        "a message 4 us, a copy 9 us between nodes, its gradient 80 us",
    ]
    pasted = [line.partition(": ") for line in costs_to_paste(found)]
    assert [name for name, _, _ in pasted] == ["costs of layer1 to layer3 (2 banks)", "costs of layer2"]
    assert [Costs(**yaml.safe_load(text)) for _, _, text in pasted] == [near, far]


def test_an_existing_run_is_refused_on_every_rank(tmp_path: Path) -> None:
    run = tiny(tmp_path, "train.steps=5")
    train(run, 1)
    text = run_to_yaml(run)

    def work() -> str:
        with pytest.raises(ValueError, match="exists already") as caught:
            session.train(run, text, resume=False, profile=False, command=["test"])
        return type(caught.value).__name__

    assert run_ranks(work, 2) == ["ValueError", "RankError"]


def test_a_signal_to_one_rank_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny(tmp_path)
    true = Loop.step

    def step(self: Loop, batch: Any) -> Any:
        if self.tally.step == 3 and self.trainee.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(self, batch)

    monkeypatch.setattr(Loop, "step", step)
    assert list(column(train(run, 2), "train/loss")) == [1, 2, 3, 4]
    log = (Path(run.dir) / run.name / "log.txt").read_text()
    assert "stopped by a signal to another rank" in log
    monkeypatch.undo()
    assert len(column(train(run, 2, resume=True), "train/loss")) == 12


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_nan_on_one_rank_stops_all_with_its_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: list[str]
) -> None:
    run = tiny(tmp_path, *layout)
    true = Compute.forward

    def forward(self: Compute, model: Any, batch: Any, **named: Any) -> Any:
        output = true(self, model, batch, **named)
        if named.get("step") == 2 and named["mode"] == "train" and dist.get_rank() == 1:
            assert output.loss is not None
            output = replace(output, loss=output.loss * float("nan"))
        return output

    monkeypatch.setattr(Compute, "forward", forward)
    text = run_to_yaml(run)
    codes = run_ranks(lambda: session.train(run, text, resume=False, profile=False, command=["test"]), 2)
    assert codes == [1, 1]
    folder = Path(run.dir) / run.name
    assert sorted(path.name for path in folder.glob("nonfinite*")) == [
        f"nonfinite_step_00000002_rank_{rank}.safetensors" for rank in (0, 1)
    ]
    assert "(rank 1)" in (folder / "log.txt").read_text()


def test_the_gradient_of_owned_experts_is_searched_for_nan(tmp_path: Path) -> None:
    run = tiny(tmp_path, "parallel.experts.kind=owned")

    def work() -> list[str | None]:
        ranks = ranks_of(run.parallel, "cpu")
        model = build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ranks, VOCAB)
        (table,) = slot_tables(model)
        table.master.grad = torch.zeros_like(table.master)
        found = [bad_gradient(model)]
        table.master.grad[0, 0] = torch.nan
        with torch.no_grad():
            table.master[-1, -1] = torch.inf
        return [*found, bad_gradient(model), bad_weight(model)]

    for found in run_ranks(work, 2):
        assert found == [
            None,
            "the forward pass is finite; the gradient of banks.layer1.w1 is not",
            "weight banks.layer2.w2 is not finite before the step",
        ]


def test_ranks_that_differ_in_the_last_bit_write_one_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one could end its text while another waits for it in a layer."""
    run = tiny(tmp_path, "parallel.experts.kind=owned")
    monkeypatch.setattr(generation, "sample", lambda *_, **__: 1 - dist.get_rank())  # 0 ends the text

    def work() -> str:
        ranks = ranks_of(run.parallel, "cpu")
        model = build_model_wide(run, Device(torch.device("cpu"), torch.float64, 1, "", ""), ranks, VOCAB)
        return generation.generate(model, Digits(), "12", max_tokens=3, dtype=torch.float64, ranks=ranks)  # type: ignore[arg-type]

    assert run_ranks(work, 2, timeout=60) == ["111", "111"]


class Digits:
    """A tokenizer of digits."""

    mark = 0

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(c) for c in text])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(map(str, ids))


MUON = ["optim={kind: muon, lr: 5e-3, schedule: {kind: wsd, warmup: 4, decay: 0.2}}"]


@pytest.mark.parametrize("layout", [[], pytest.param(OWNED + MUON, marks=pytest.mark.slow)], ids=str)
def test_twenty_steps_in_float64_over_changing_ranks(tmp_path: Path, layout: list[str]) -> None:
    run = tiny(tmp_path, "train.steps=20", *layout)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 3000).astype(np.uint32)

    def go(ranks: Ranks, first: int, last: int) -> tuple[dict[str, torch.Tensor], list[int]]:
        device = Device(torch.device("cpu"), torch.float64, 1, "", "")
        model = build_model_wide(run, device, ranks, VOCAB)
        compute = Compute(device.device, device.dtype, seed=run.seed)
        optimizer = build_optimizer(model, run.optim)
        rules = rules_of(model, optimizer, owned=run.parallel.owned)
        trainee = Trainee(model, optimizer, rules, compute, ranks)
        checkpoints = Checkpoints(tmp_path / "wide", CheckpointConfig(), say=print)
        meta = checkpoints.restore(trainee.tensors()) if first else None
        assert (meta or {"done": 0})["done"] == first
        restore_rules(rules, model, (meta or {}).get("rules", {}))
        micro = run.train.micro_batches
        loader = Loader(
            tokens,
            mark=0,
            seq_len=32,
            sequences=12,
            seed=run.seed,
            rank=ranks.rank,
            ranks=ranks.size,
            micro_batches=micro,
        )
        samples = []
        for step in range(first, last):
            batch = loader.batch(step)
            samples += batch.samples.tolist()
            sums = accumulate(model, batch, compute, micro_batches=micro, step=step, ranks=ranks)
            update(
                model,
                trainee.optimizer,
                sums,
                config=run.optim,
                step=step,
                steps=20,
                rules=trainee.rules,
                ranks=ranks,
            )
        if last < 20:
            checkpoints.save(last, trainee.tensors(), {"done": last, "rules": states_of(rules, model)})
        checkpoints.wait()
        return {name: full(t.detach(), ranks).clone() for name, t in logical_tensors(model).items()}, samples

    want, order = go(ALONE, 0, 20)
    for path in (tmp_path / "wide").glob("*"):
        path.rename(tmp_path / "elsewhere")
    seen: list[int] = []
    for ranks, first, last in ((1, 0, 5), (2, 5, 10), (4, 10, 15), (1, 15, 20)):
        if ranks == 1:
            found = [go(ALONE, first, last)]
        else:
            found = run_ranks(
                lambda first=first, last=last: go(ranks_of(run.parallel, "cpu"), first, last), ranks
            )
        seen += [sample for _, samples in found for sample in samples]
    assert sorted(seen) == sorted(order)
    for name, tensor in found[0][0].items():
        assert (tensor - want[name]).abs().max() <= 1e-9 * want[name].abs().max(), name
