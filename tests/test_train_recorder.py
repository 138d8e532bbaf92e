"""Recorded routing: every step once, whatever ended the run in between; one source per rank."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.launch.config import read_run, run_to_yaml
from moesaic.moe import ReplayRouter, RoutingTrace, load_trace
from moesaic.parallel.ranks import ALONE, ranks_of
from moesaic.parallel.spawn import run_ranks
from moesaic.train import session
from moesaic.train.config import RunConfig
from moesaic.train.recorder import RoutingRecorder
from moesaic.train.step import LayerSums, Sums

CONFIG = """
name: recorded
dir: DIR/runs
seed: 2
model:
  dim: 16
  layers: 3
  heads: 2
  ffn: {kind: moe, num_experts: 4, hidden: 8, router: ROUTER}
  ffn_at: {"1": {kind: dense, hidden: 16}}
data: {kind: text, path: DIR/text, seq_len: 8, tokenizer: {kind: bytes}, eval_fraction: 0.5, workers: 1}
train: {steps: 7, batch_tokens: 64, micro_batch_tokens: 32, precision: fp32, threads: 1}
optim: {kind: adamw, lr: 1e-2, schedule: {kind: cosine, warmup: 1}}
checkpoint: {every: 2}
eval: {every: 0, tokens: 64}
log: {every: 3, tensorboard: false, routing: true}
"""


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "draw_report", lambda *_: None)


def config(folder: Path, router: str = "{kind: topk, k: 2}") -> RunConfig:
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for i in range(8):
        (text / f"{i}.txt").write_text(f"Text number {i}. " * 20)
    path = folder / "config.yaml"
    path.write_text(CONFIG.replace("DIR", str(folder)).replace("ROUTER", router))
    return read_run(path, world_size=None)


def train(run: RunConfig, *, resume: bool = False) -> Path:
    code = session.train(run, run_to_yaml(run), resume=resume, profile=False, command=["test"])
    assert code == 0
    return Path(run.dir) / run.name


def test_a_resumed_run_records_every_step_once(tmp_path: Path):
    folder = train(config(tmp_path))
    whole = load_trace(folder / "routing.npz")
    np.testing.assert_array_equal(whole.steps, range(7))
    np.testing.assert_array_equal(whole.layers, [0, 2])
    assert whole.counts.shape == (7, 2, 1, 4)
    assert whole.k == 2
    assert (whole.counts.sum(-1) == 2 * 64).all()

    shutil.rmtree(folder / "checkpoints" / "step_00000007")  # as after a kill in the seventh step
    (folder / "routing.npz").unlink()
    raw = bytearray((folder / "routing.raw").read_bytes())
    at = raw.index(b"\n") + 1
    record = (len(raw) - at) // 7
    raw[at + 8] += 1  # a count of step 0: it must come back as it is, not be made again
    raw[-1] ^= 1  # one of step 6: it must be made again
    (folder / "routing.raw").write_bytes(raw[: at + 7 * record] + b"torn")
    train(config(tmp_path), resume=True)
    again = load_trace(folder / "routing.npz")
    np.testing.assert_array_equal(again.steps, range(7))
    np.testing.assert_array_equal(again.counts[1:], whole.counts[1:])
    assert (again.counts[0] - whole.counts[0]).sum() == 1


def test_what_is_replayed_is_what_is_recorded(tmp_path: Path):
    random = np.random.default_rng(0)
    halves = random.permuted(np.tile([20, 8, 4, 0], (3, 2, 2, 1)), axis=-1)  # sources of 32 tokens
    trace = RoutingTrace(halves, np.arange(3), np.array([0, 2]), 1)
    trace.save(tmp_path / "t.npz")
    router = f"{{kind: replay, trace: {tmp_path / 't.npz'}}}"
    found = load_trace(train(config(tmp_path, router)) / "routing.npz")
    for step in range(7):
        for row, layer in enumerate((0, 2)):
            np.testing.assert_array_equal(found.counts[step, row, 0], trace.at(step, layer).sum(0))
    assert isinstance(ReplayRouter.Config(trace=str(tmp_path / "t.npz")).k, int)


def sums_of(rank: int, step: int) -> Sums:
    sums = Sums(8, torch.zeros(()))
    for layer in (0, 2):
        counts = torch.tensor([rank, step, layer, 5])
        sums.layers[layer] = LayerSums(counts, torch.zeros(()))
    return sums


def test_every_rank_is_a_source(tmp_path: Path):
    run = config(tmp_path)

    def work() -> str:
        ranks = ranks_of(run.parallel, "cpu")
        for begin, end in ((0, 3), (2, 4)):
            recorder = RoutingRecorder(tmp_path, run.model, ranks, step=begin)
            for step in range(begin, end):
                recorder.append(step, sums_of(ranks.rank, step).over(ranks))
            recorder.sync()
            recorder.close()
        return ""

    run_ranks(work, 2)
    trace = load_trace(tmp_path / "routing.npz")
    np.testing.assert_array_equal(trace.steps, range(4))
    want = [[[[rank, step, layer, 5] for rank in (0, 1)] for layer in (0, 2)] for step in range(4)]
    np.testing.assert_array_equal(trace.counts, want)
    with pytest.raises(
        ValueError, match=r'routing\.raw: was recorded with .*"sources": 2.*log\.routing=false'
    ):
        RoutingRecorder(tmp_path, run.model, ALONE, step=2)
    assert load_trace(tmp_path / "routing.npz").sources == 2
    recorder = RoutingRecorder(tmp_path, run.model, ALONE, step=0)  # from the beginning: nothing to keep
    recorder.append(0, sums_of(3, 0).over(ALONE))
    recorder.close()
    assert load_trace(tmp_path / "routing.npz").counts.shape == (1, 2, 1, 4)
    assert json.loads((tmp_path / "routing.raw").read_bytes().partition(b"\n")[0])["sources"] == 1


def test_layers_that_do_not_fit_in_a_trace_are_refused(tmp_path: Path):
    run = config(tmp_path)
    path = tmp_path / "config.yaml"
    other = "model.ffn_at={'1': {kind: moe, num_experts: 6, hidden: 8, router: {kind: topk, k: 2}}}"
    for change, found in ((other, "2 of 4, 2 of 6"), ("model.ffn={kind: dense, hidden: 8}", "none")):
        with pytest.raises(ValueError, match=f"^log.routing: .*have {found}; make them equal"):
            read_run(path, [change])
    assert run.log.routing
