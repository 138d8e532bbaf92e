"""Run folders: never overwritten, one process at a time, resumed only as the same run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moesaic.train.run_dir import RunDir, differences

RUN = {
    "name": "tiny",
    "seed": 0,
    "model": {"dim": 64, "ffn": {"kind": "moe", "k": 2}},
    "train": {"steps": 10, "threads": None},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "checkpoint": {"every": 200},
}


def text(**changes: object) -> str:
    return yaml.safe_dump({**RUN, **changes}, sort_keys=False)


def test_create_writes_the_config_and_resume_continues(tmp_path: Path):
    path = tmp_path / "runs" / "tiny"
    run = RunDir.create(path, text())
    run.say("hello\nworld")
    run.close()
    again = RunDir.resume(path, text())
    again.say("back")
    again.close()
    assert again.changes == ()
    assert yaml.safe_load(run.config.read_text()) == RUN
    lines = run.log.read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["hello", "world", "back"]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  ", line) for line in lines)
    assert sorted(entry.name for entry in path.iterdir()) == [".lock", "config.yaml", "log.txt"]


def test_an_existing_run_is_never_overwritten(tmp_path: Path):
    RunDir.create(tmp_path / "tiny", text()).close()
    with pytest.raises(ValueError, match=r"tiny: exists already.*--resume.*name="):
        RunDir.create(tmp_path / "tiny", text(seed=1))
    assert yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text()) == RUN


@pytest.mark.parametrize("name", ["thesis.tex", "config.yaml.bak"])
def test_any_filled_folder_counts_as_existing(tmp_path: Path, name: str):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        RunDir.create(tmp_path / "tiny", text())
    assert [entry.name for entry in (tmp_path / "tiny").iterdir() if entry.name != ".lock"] == [name]


@pytest.mark.parametrize("name", ["config.yaml.tmp", "config.yaml.123.tmp"])
def test_a_start_killed_before_its_config_can_be_started_again(tmp_path: Path, name: str):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / ".lock").write_text("process 1 on nowhere\n")
    (tmp_path / "tiny" / name).write_text("name: ti")
    with pytest.raises(ValueError, match="holds no run to continue; start it without --resume"):
        RunDir.resume(tmp_path / "tiny", text())
    RunDir.create(tmp_path / "tiny", text()).close()


def test_nothing_to_resume(tmp_path: Path):
    with pytest.raises(ValueError, match="tiny: holds no run to continue"):
        RunDir.resume(tmp_path / "tiny", text())
    assert not (tmp_path / "tiny").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/tiny: cannot make the run's folder \(Not a directory\)"):
        RunDir.create(tmp_path / "file" / "tiny", text())


def test_one_process_at_a_time_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    path = tmp_path / "tiny"
    code = (
        "import sys, time, pathlib; from moesaic.train.run_dir import RunDir\n"
        "run = RunDir.create(pathlib.Path(sys.argv[1]), sys.argv[2]); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path), text()], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(
            ValueError, match=rf"another process trains this run \(process {other.pid} on .*\)"
        ):
            RunDir.resume(path, text())
        other.kill()
    RunDir.resume(path, text()).close()


def test_resume_refuses_what_makes_it_another_run(tmp_path: Path):
    path = tmp_path / "tiny"
    RunDir.create(path, text()).close()
    changed = text(
        seed=1, model={"dim": 64, "ffn": {"kind": "moe", "k": 4}}, train={"steps": 20, "threads": 1}
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is examined below
        RunDir.resume(path, changed)
    message = str(caught.value)
    assert "seed: 0 -> 1" in message
    assert "model.ffn.k: 2 -> 4" in message
    assert "train.steps: 10 -> 20" not in message
    assert "accepts changes of name, dir, train.steps" in message
    assert yaml.safe_load((path / "config.yaml").read_text()) == RUN
    RunDir.resume(path, text()).close()  # the refusal released the lock


def test_resume_accepts_the_rest_and_keeps_every_config(tmp_path: Path):
    path = tmp_path / "tiny"
    RunDir.create(path, text()).close()
    for steps in (20, 30):
        run = RunDir.resume(path, text(train={"steps": steps, "threads": None}, checkpoint={"every": steps}))
        run.close()
    assert [str(change) for change in run.changes] == ["train.steps: 20 -> 30", "checkpoint.every: 20 -> 30"]
    steps = [
        yaml.safe_load((path / name).read_text())["train"]["steps"]
        for name in ("config.1.yaml", "config.2.yaml", "config.yaml")
    ]
    assert steps == [10, 20, 30]


def test_a_damaged_config_is_named(tmp_path: Path):
    path = tmp_path / "tiny"
    RunDir.create(path, text()).close()
    for damage in (b"a: [1", b"\xff\xfe", b"12"):
        (path / "config.yaml").write_bytes(damage)
        with pytest.raises(ValueError, match=r"config.yaml: .*the run cannot be continued"):
            RunDir.resume(path, text())


def test_differences_know_absent_keys_and_sections_that_change_their_kind():
    old = {"a": 1, "b": {"kind": "x", "n": None}, "c": [1, 2]}
    new = {"b": {"kind": "y"}, "c": [1, 3], "d": 0.5, "checkpointing": 1}
    assert [str(change) for change in differences(old, new)] == [
        "a: 1 -> (not set)",
        "b.kind: 'x' -> 'y'",
        "b.n: None -> (not set)",
        "c: [1, 2] -> [1, 3]",
        "d: (not set) -> 0.5",
        "checkpointing: (not set) -> 1",
    ]
    assert not any(change.allowed for change in differences(old, new))


def test_every_start_is_recorded(tmp_path: Path):
    run = RunDir.create(tmp_path / "tiny", text())
    run.record_start({"host": "a"})
    run.record_start({"host": "b"})
    assert json.loads(run.environment.read_text()) == [{"host": "a"}, {"host": "b"}]
    run.record_end("finished")
    first, last = json.loads(run.environment.read_text())
    assert first == {"host": "a"}
    assert last.keys() == {"host", "ended", "outcome"}
    assert last["outcome"] == "finished"
    run.close()


def test_samples_are_appended_whole(tmp_path: Path):
    run = RunDir.create(tmp_path / "tiny", text())
    run.write_samples(5, [("def ", "f():\n    pass")])
    run.write_samples(9, [("A", "b"), ("\udcff", "c")])
    run.close()
    assert run.samples.read_text() == (
        "=== step 5, sample 1\ndef f():\n    pass\n\n=== step 9, sample 1\nAb\n\n=== step 9, sample 2\n\\udcffc\n\n"
    )
