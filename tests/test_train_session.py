"""Whole runs: what they leave behind, that resuming repeats every bit, and that nothing a run wrote is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moesaic.data.config import (
    BpeTokenizer,
    ByteTokenizer,
    MixtureData,
    Part,
    TextCorpus,
    TextData,
    TokensCorpus,
    TokensData,
)
from moesaic.data.prepare import prepare
from moesaic.launch.config import run_to_yaml
from moesaic.models.transformer import Transformer
from moesaic.moe import BalanceLoss, MoE, TopKRouter
from moesaic.parallel.checkpoint import read_meta, read_tensors
from moesaic.train import session
from moesaic.train.checkpoints import CheckpointConfig
from moesaic.train.config import EvalConfig, LogConfig, RunConfig, TrainConfig
from moesaic.train.evaluate import evaluate_run
from moesaic.train.generate import generate_run
from moesaic.train.optim import AdamWConfig, Cosine

MODEL = Transformer.Config(
    dim=16,
    layers=2,
    heads=2,
    ffn=MoE.Config(
        num_experts=4,
        hidden=8,
        router=TopKRouter.Config(k=2, bias_rate=0.01, jitter=0.05),
        aux=(BalanceLoss(coef=0.01),),
    ),
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawing takes a second and there are many runs here; tests/test_train_report.py looks at it."""
    monkeypatch.setattr(session, "draw_report", lambda *_: None)


def write_text(folder: Path) -> None:
    folder.mkdir()
    for number in range(40):
        lines = [f"line {line} of file {number}: {line * number % 97}\n" for line in range(30)]
        (folder / f"{number}.txt").write_text("".join(lines))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path / "text"


def config_in(folder: Path, text: Path) -> RunConfig:
    return RunConfig(
        name="run",
        dir=str(folder / "runs"),
        model=MODEL,
        data=TextData(path=str(text), seq_len=32, tokenizer=ByteTokenizer(), eval_fraction=0.1, workers=1),
        train=TrainConfig(steps=20, batch_tokens=256, micro_batch_tokens=128, threads=1, precision="fp32"),
        optim=AdamWConfig(lr=0.01, schedule=Cosine(warmup=3)),
        checkpoint=CheckpointConfig(every=5, keep=3),
        eval=EvalConfig(every=10, tokens=512, prompts=("line",), sample_tokens=8),
        log=LogConfig(every=1, tensorboard=False),
    )


@pytest.fixture
def run(tmp_path: Path, text: Path) -> RunConfig:
    return config_in(tmp_path, text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """`run`, elsewhere, from its first step to its last: what others that were stopped must come to. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    write_text(folder / "text")
    whole = replace(config_in(folder, folder / "text"), name="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "draw_report", lambda *_: None)
        assert train(whole) == 0
    return whole


def train(run: RunConfig, *, resume: bool = False) -> int:
    return session.train(run, run_to_yaml(run), resume=resume, profile=False, command=["test"])


def folder_of(run: RunConfig) -> Path:
    return Path(run.dir) / run.name


def records(run: RunConfig) -> list[dict[str, Any]]:
    """All metrics but the timings."""
    lines = (folder_of(run) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def final(run: RunConfig) -> dict[str, Tensor]:
    return read_tensors(folder_of(run) / "checkpoints" / f"step_{run.train.steps:08d}")


def assert_equal_runs(run: RunConfig, other: RunConfig) -> None:
    """Weights, router state, optimizer and every logged number, bit for bit."""
    assert records(run) == records(other)
    ours, theirs = final(run), final(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_leaves_everything_behind(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = replace(run, log=LogConfig(every=5, tensorboard=True))
    assert train(run) == 0
    folder = folder_of(run)
    shown = capsys.readouterr().out
    assert "held-out" in shown
    assert "finished" in shown
    assert (folder / "log.txt").read_text().count("step ") > 4
    assert "line" in (folder / "samples.txt").read_text()
    assert list((folder / "tensorboard").glob("events*"))
    manifest = json.loads((folder / "data.json").read_text())
    assert len(manifest["files"]) == 40
    steps = [r["step"] for r in records(run) if "train/loss" in r]
    assert steps == [5, 10, 15, 20]
    first, last = (r for r in records(run) if "eval/loss" in r)
    assert last["eval/loss"] < first["eval/loss"] < 5.6
    load = records(run)[0]["layer_00/load"]
    assert len(load) == 4
    assert sum(load) == pytest.approx(1)
    assert read_meta(folder / "checkpoints" / "step_00000020")["step"] == 20
    assert json.loads((folder / "environment.json").read_text())[0]["command"]

    result = evaluate_run(run, folder, step=None, tokens=512)
    assert result["loss"] == last["eval/loss"]
    assert evaluate_run(run, folder, step=10, tokens=512)["loss"] == first["eval/loss"]
    settings: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "top_p": 0.95, "step": None}
    assert (
        generate_run(run, folder, ["line"], seed=run.seed, **settings)[0]
        in (folder / "samples.txt").read_text()
    )
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; there are 10, 15, 20"):
        evaluate_run(run, folder, step=7, tokens=None)


def test_two_runs_of_one_seed_are_equal(run: RunConfig, whole: RunConfig) -> None:
    assert train(run) == 0
    assert_equal_runs(run, whole)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, how: Callable[[], None]) -> None:
    """Call `how` when a step begins."""
    original = session.Loop.step

    def patched(self: Any, batch: Any) -> Any:
        if self.tally.step == step:
            how()
        return original(self, batch)

    monkeypatch.setattr(session.Loop, "step", patched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues(
    run: RunConfig, whole: RunConfig, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 8, lambda: os.kill(os.getpid(), number))
        assert train(run) == 0
    assert records(run)[-1]["step"] == 9
    assert train(run, resume=True) == 0
    assert_equal_runs(run, whole)


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    run: RunConfig, whole: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:

    def crash() -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        stop_after(patch, 13, crash)
        with pytest.raises(RuntimeError, match="lost"):
            train(run)
    assert records(run)[-1]["step"] == 13
    assert train(run, resume=True) == 0
    assert_equal_runs(run, whole)
    assert "will be computed again" in (folder_of(run) / "log.txt").read_text()


def test_a_run_that_never_saved_resumes_from_the_start(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        stop_after(patch, 4, crash)
        with pytest.raises(RuntimeError, match="lost"):
            train(run)
    assert train(run, resume=True) == 0
    assert [r["step"] for r in records(run) if "train/loss" in r] == list(range(1, 21))


def test_an_existing_run_is_never_overwritten(run: RunConfig) -> None:
    short = replace(run, train=replace(run.train, steps=10))
    assert train(short) == 0
    before = (folder_of(run) / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"exists already.*--resume.*name="):
        train(short)
    assert (folder_of(run) / "metrics.jsonl").read_bytes() == before
    assert train(short, resume=True) == 0  # a finished run has nothing left to do
    assert (folder_of(run) / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"cannot change .*model\.dim: 16 -> 32"):
        train(replace(short, model=replace(MODEL, dim=32)), resume=True)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run: RunConfig, whole: RunConfig) -> None:
    assert train(run) == 0
    newest = folder_of(run) / "checkpoints" / "step_00000020"
    file = next(newest.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train(run, resume=True) == 0
    log = (folder_of(run) / "log.txt").read_text()
    assert "step 20 is damaged" in log
    assert file.name in log
    assert_equal_runs(run, whole)


def test_another_tokenizer_is_refused(run: RunConfig, text: Path) -> None:
    run = replace(
        run, data=replace(run.data, tokenizer=BpeTokenizer(vocab=280)), train=replace(run.train, steps=10)
    )
    assert train(run) == 0
    (text / "new.txt").write_text("words words words words " * 500)
    longer = replace(run, train=replace(run.train, steps=20))
    with pytest.raises(ValueError, match="begun with another tokenizer"):
        train(longer, resume=True)


def test_other_text_is_refused(run: RunConfig, text: Path) -> None:
    run = replace(run, train=replace(run.train, steps=10))
    assert train(run) == 0
    (text / "new.txt").write_text("more " * 100)
    with pytest.raises(ValueError, match="training text or its order changed"):
        train(replace(run, train=replace(run.train, steps=20)), resume=True)


def test_text_of_the_same_length_but_other_content_is_refused(run: RunConfig, text: Path) -> None:
    run = replace(run, train=replace(run.train, steps=10))
    assert train(run) == 0
    for file in text.iterdir():
        file.write_text(file.read_text().replace("line", "LINE"))
    with pytest.raises(ValueError, match="training text or its order changed"):
        train(replace(run, train=replace(run.train, steps=20)), resume=True)
    with pytest.raises(ValueError, match="other held-out text"):
        evaluate_run(run, folder_of(run), step=None, tokens=None)


def test_a_full_disk_stops_the_run_and_keeps_the_previous_checkpoint(
    run: RunConfig, whole: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesaic.parallel import storage

    original, saves = storage.write_tensors, []

    def full(*args: Any, **named: Any) -> Any:
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.parallel.checkpoint.write_tensors", full)
        with pytest.raises(ValueError, match="No space left on device"):
            train(run)
    # what could not be written in the background stops the run at the next save, which finds room again
    names = [p.name for p in sorted((folder_of(run) / "checkpoints").iterdir())]
    assert names == ["step_00000005", "step_00000015"]
    assert train(run, resume=True) == 0
    assert_equal_runs(run, whole)


def test_a_nan_stops_with_step_layer_and_batch(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    original = session.Loop.step

    def poisoned(self: Any, batch: Any) -> Any:
        if self.tally.step == 12:
            with torch.no_grad():
                self.trainee.model.blocks[1].ffn.bank.w1[2] *= 1e30
        return original(self, batch)

    monkeypatch.setattr(session.Loop, "step", poisoned)
    assert train(run) == session.FAILED
    log = (folder_of(run) / "log.txt").read_text()
    assert "step 12" in log
    assert "layer 1" in log
    kept = load_file(folder_of(run) / "nonfinite_step_00000012.safetensors")
    assert kept["tokens"].shape == (8, 32)
    checkpoints = sorted(p.name for p in (folder_of(run) / "checkpoints").iterdir())
    assert checkpoints == ["step_00000005", "step_00000010"]


def test_profile_leaves_a_trace_and_a_table(run: RunConfig) -> None:
    run = replace(run, train=replace(run.train, steps=12))
    assert session.train(run, run_to_yaml(run), resume=False, profile=True, command=["test"]) == 0
    trace = json.loads((folder_of(run) / "profile" / "trace.json").read_text())
    assert any("expert_mlp" in str(event.get("name")) for event in trace["traceEvents"])
    assert "aten::mm" in (folder_of(run) / "profile" / "table.txt").read_text()


KILLED = """
import os, signal, sys
from moesaic.launch.config import read_run, run_to_yaml
from moesaic.parallel import checkpoint
from moesaic.train import session

if __name__ == "__main__":
    original, count = checkpoint.write_tensors, [0]

    def dying(*args, **named):
        result = original(*args, **named)
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # the files are written, the checkpoint is not in its place yet
        return result

    checkpoint.write_tensors = dying
    run = read_run(sys.argv[1], sys.argv[2:])
    session.train(run, run_to_yaml(run), resume=False, profile=False, command=["test"])
"""


def test_kill_9_during_a_save_loses_nothing(run: RunConfig, whole: RunConfig, tmp_path: Path) -> None:
    """20 steps = 10 steps, killed in the middle of writing the checkpoint of step 15, resumed from 10, 10 more."""
    script, config = tmp_path / "killed.py", tmp_path / "run.yaml"
    script.write_text(KILLED)
    config.write_text(run_to_yaml(run))
    died = subprocess.run([sys.executable, script, config], capture_output=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    names = [p.name for p in (folder_of(run) / "checkpoints").iterdir()]
    assert any("tmp" in name for name in names)
    assert "step_00000010" in names
    assert "step_00000015" not in names
    assert train(run, resume=True) == 0
    assert_equal_runs(run, whole)
    assert not any("tmp" in p.name for p in (folder_of(run) / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_first_step_comes_within_ten_seconds(run: RunConfig, tmp_path: Path) -> None:
    """With a prepared corpus. Best of three: the machine may be busy."""
    prepare(run.data)
    config = tmp_path / "run.yaml"
    best = 1e9
    for attempt in range(3):
        config.write_text(run_to_yaml(replace(run, name=f"fast{attempt}")))
        started = time.perf_counter()
        command = [Path(sys.executable).with_name("moesaic"), "train", config]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("step") and "1/20" in line:
                    best = min(best, time.perf_counter() - started)
                    break
            process.kill()
        if best < 10:
            break
    assert best < 10


def test_a_mixture_resumes_bit_for_bit_and_is_evaluated_by_part(
    run: RunConfig, text: Path, tmp_path: Path
) -> None:
    ids = [np.r_[256, np.frombuffer(path.read_bytes(), np.uint8).astype(int)] for path in text.iterdir()]
    np.concatenate(ids).astype(np.uint16).tofile(tmp_path / "ids.bin")
    data = MixtureData(
        parts={
            "lines": Part(weight=0.7, data=TextCorpus(path=str(text))),
            "ids": Part(weight=0.3, data=TokensCorpus(path=str(tmp_path / "ids.bin"), mark=256)),
        },
        seq_len=32,
        tokenizer=ByteTokenizer(),
        eval_fraction=0.1,
        workers=1,
    )
    steps = replace(run.train, steps=12)
    whole = replace(run, data=data, train=steps, checkpoint=CheckpointConfig(every=5))
    assert train(whole) == 0
    stopped = replace(whole, name="stopped")
    assert train(stopped) == 0
    shutil.rmtree(folder_of(stopped) / "checkpoints" / "step_00000012")  # as a kill after step 5 leaves it
    shutil.rmtree(folder_of(stopped) / "checkpoints" / "step_00000010")
    assert train(stopped, resume=True) == 0
    assert_equal_runs(whole, stopped)
    last = records(whole)[-1]
    assert last["eval/loss"] == pytest.approx(0.7 * last["eval/lines/loss"] + 0.3 * last["eval/ids/loss"])
    assert evaluate_run(whole, folder_of(whole), step=None, tokens=512)["parts"].keys() == {"ids", "lines"}


def test_tokens_without_a_tokenizer(run: RunConfig, tmp_path: Path) -> None:
    ids = np.tile(np.arange(50), 200).astype(np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    data = TokensData(
        path=str(tmp_path / "ids.bin"), mark=0, vocab=50, seq_len=32, eval_fraction=0.1, workers=1
    )
    run = replace(run, data=data, train=replace(run.train, steps=6), checkpoint=CheckpointConfig(every=0))
    with pytest.raises(ValueError, match=r"eval\.prompts: are text, and data has no tokenizer"):
        run.check()
    run = replace(run, eval=replace(run.eval, prompts=()))
    assert train(run) == 0
    assert not any("bits_per_byte" in name for record in records(run) for name in record)
    result = evaluate_run(run, folder_of(run), step=None, tokens=None)
    assert result["bits_per_byte"] is None
    with pytest.raises(ValueError, match=r"data\.tokenizer: missing"):
        generate_run(run, folder_of(run), ["a"], max_tokens=2, temperature=0, top_p=1, seed=0, step=None)
