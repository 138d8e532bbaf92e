"""The checkpoints of a run: which are made, which stay, and which one is restored, whatever happened before."""

import concurrent.futures
import errno
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.parallel.storage import CheckpointError, DamagedCheckpointError
from moesaic.train.checkpoints import CheckpointConfig, Checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(step: int) -> dict[str, Tensor]:
    return {
        "weights": torch.full((3, 500), float(step)),
        "moments": torch.full((500,), -step, dtype=torch.int64),
    }


def opened(
    folder: Path, config: CheckpointConfig | None = None, said: list[str] | None = None
) -> Checkpoints:
    return Checkpoints(folder, config or CheckpointConfig(), say=(said if said is not None else []).append)


def saved(folder: Path, *steps: int, config: CheckpointConfig | None = None) -> Checkpoints:
    checkpoints = opened(folder, config)
    for step in steps:
        checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()
    return checkpoints


def save_and_wait(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, state(step), {"step": step})
    checkpoints.wait()


def restored(folder: Path, said: list[str] | None = None) -> int:
    """The step of what is restored; everything in it must be of that step."""
    into = state(-1)
    meta = opened(folder, said=said).restore(into)
    assert meta is not None
    for name, tensor in state(meta["step"]).items():
        assert torch.equal(into[name], tensor)
    return meta["step"]


def damage(folder: Path, step: int) -> None:
    with (folder / f"step_{step:08d}" / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "every: -1 is negative; give a number of steps, or 0"),
        ({"keep": 0}, "keep: 0 would delete every checkpoint; give at least 1"),
        ({"milestones": 0}, "milestones: 0 is not positive; give a number of steps, or leave it out"),
    ],
)
def test_config_errors(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        CheckpointConfig(**settings)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("every", "milestones", "due"),
    [
        (4, None, [4, 8, 10]),
        (0, None, [10]),
        (5, None, [5, 10]),
        (4, 3, [3, 4, 6, 8, 9, 10]),
        (0, 6, [6, 10]),
    ],
)
def test_due(tmp_path: Path, every: int, milestones: int | None, due: list[int]) -> None:
    checkpoints = opened(tmp_path, CheckpointConfig(every=every, milestones=milestones))
    assert [step for step in range(11) if checkpoints.due(step, 10)] == due
    assert checkpoints.due(0, 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_the_milestones_stay(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert opened(folder).steps() == []
    two = CheckpointConfig(asynchronous=asynchronous)
    assert saved(folder, 10, 20, 30, config=two).steps() == [20, 30]
    one = CheckpointConfig(keep=1, milestones=20, asynchronous=asynchronous)
    assert saved(folder, 40, 50, 60, config=one).steps() == [20, 40, 60]
    three = CheckpointConfig(keep=3, asynchronous=asynchronous)
    assert saved(folder, 110, 111, 123456789, config=three).steps() == [110, 111, 123456789]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000110",
        "step_00000111",
        "step_123456789",
    ]
    assert restored(folder) == 123456789


def test_nothing_to_restore(tmp_path: Path) -> None:
    into = state(5)
    assert opened(tmp_path / "nothing").restore(into) is None
    (tmp_path / "step_00000010.bak").mkdir()
    (tmp_path / "step_00000020").write_text("a file")
    assert opened(tmp_path).restore(into) is None
    assert torch.equal(into["weights"], state(5)["weights"])


def test_damaged_ones_are_left_out_and_replaced(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30, config=CheckpointConfig(keep=3))
    damage(tmp_path, 30)
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    said: list[str] = []
    assert restored(tmp_path, said) == 10
    assert said == [
        f"the checkpoint of step 30 is damaged and left out: {tmp_path}/step_00000030/rank-00000.safetensors: was "
        "changed after it was written (its checksum differs); use another checkpoint",
        f"the checkpoint of step 20 is damaged and left out: {tmp_path}/step_00000020/manifest.json: missing; "
        "use another checkpoint",
    ]
    assert saved(tmp_path, 20, config=CheckpointConfig(keep=1)).steps() == [
        20
    ]  # and not the damaged one of step 30
    assert restored(tmp_path) == 20


def test_all_damaged(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    damage(tmp_path, 10)
    damage(tmp_path, 20)
    into = state(5)
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged \(steps 10, 20\); put copies back, or"
    ):
        opened(tmp_path).restore(into)
    assert torch.equal(into["weights"], state(5)["weights"])


def test_another_model_is_not_damage(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    said: list[str] = []
    with pytest.raises(
        CheckpointError, match="step_00000020: does not fit: only in the checkpoint: moments;"
    ) as info:
        opened(tmp_path, said=said).restore({"weights": torch.zeros(3, 500)})
    assert not isinstance(info.value, DamagedCheckpointError)
    assert said == []


def test_step_saved_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    checkpoints.save(10, state(11), {"step": 11})
    checkpoints.wait()
    assert restored(tmp_path) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoints = saved(tmp_path, 10, config=CheckpointConfig(keep=1, asynchronous=asynchronous))
    message = (
        r"step_00000020: not saved: No space left on device: 10,000 bytes are needed, [\d,]+ are free in "
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=message):
            save_and_wait(checkpoints, 20)
        if asynchronous:
            checkpoints.save(20, state(20), {"step": 20})
            with pytest.raises(CheckpointError, match="step_00000030: not saved"):
                checkpoints.save(30, state(30), {"step": 30})
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    checkpoints.wait()  # an error is raised once
    checkpoints.save(40, state(40), {"step": 40})
    checkpoints.wait()
    assert checkpoints.steps() == [40]


@pytest.mark.parametrize("room_again", [False, True])
def test_a_failed_save_does_not_take_the_next_one_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_again: bool
) -> None:
    checkpoints = saved(tmp_path, 10)
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        checkpoints.save(20, state(20), {"step": 20})
        concurrent.futures.wait([checkpoints._pending] if checkpoints._pending else [])
        if room_again:
            patch.undo()
        with pytest.raises(CheckpointError, match=f"step_000000{20 if room_again else 30}: not saved"):
            checkpoints.save(30, state(30), {"step": 30})
    assert checkpoints.steps() == ([10, 30] if room_again else [10])


def test_tensors_may_change_after_save(tmp_path: Path) -> None:
    tensors = state(10)
    checkpoints = opened(tmp_path)
    checkpoints.save(10, tensors, {"step": 10})
    for tensor in tensors.values():
        tensor.zero_()
    checkpoints.wait()
    assert restored(tmp_path) == 10


def test_leftovers_are_removed_at_start(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    (tmp_path / "step_00000020.tmp-0123abcd").mkdir()
    (tmp_path / "step_00000010").rename(tmp_path / "step_00000010.replaced")
    assert opened(tmp_path).steps() == [10]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    assert restored(tmp_path) == 10


def test_killed(tmp_path: Path) -> None:
    """Whenever a process is killed, the newest checkpoint that it had saved, or a newer one, is restored."""
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120)


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def killed_everywhere(folder: Path) -> None:
    """Kill a child before its first file operation, the next one before its second, and so on."""
    for asynchronous in (False, True):
        for operation in range(1, 1000):
            run = folder / f"{asynchronous}-{operation}"
            last, killed = child(partial(three_saves, run, asynchronous, operation))
            if last or opened(run).steps():
                assert restored(run) >= last, (operation, last)
                kept = [f"step_{step:08d}" for step in opened(run).steps()]
                assert sorted(path.name for path in run.iterdir()) == kept
            if not killed:
                assert last == 20
                assert operation > 40, "few operations were seen"
                break
        else:
            raise AssertionError("never came to its end")


def three_saves(run: Path, asynchronous: bool, operations: int, report: Callable[[int], object]) -> None:
    """Save two steps, and one of them again; die before so many file operations are done."""

    def count(event: str, arguments: object) -> None:
        nonlocal operations
        if event in FILE_OPERATIONS:
            operations -= 1
            if operations == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    checkpoints = opened(run, CheckpointConfig(keep=1, asynchronous=asynchronous))
    for step in (10, 20, 20):
        checkpoints.save(step, state(step), {"step": step})
        checkpoints.wait()
        report(step)


def killed_anytime(folder: Path) -> None:
    """Kill children at random moments, each continuing what the one before it left."""
    chance, last = random.Random(0), 0
    for _ in range(15):
        reported, killed = child(partial(many_saves, folder, last), seconds=chance.uniform(0.01, 0.2))
        assert killed
        if reported or opened(folder).steps():
            last = restored(folder)
            assert last >= reported
    assert last > 15, "few checkpoints were made"


def many_saves(folder: Path, start: int, report: Callable[[int], object]) -> None:
    """Save one step after the other; report those that are complete."""
    checkpoints = opened(folder)
    for step in range(start + 1, start + 100_000):
        checkpoints.save(step, state(step), {"step": step})
        report(step - 1)


def child(
    work: Callable[[Callable[[int], object]], None], *, seconds: float | None = None
) -> tuple[int, bool]:
    """Do work in a copy of this process, killed after so many seconds.

    Returns the last number that it reported, and whether it was killed.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(lambda number: os.write(writer, number.to_bytes(4, "little")))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    with os.fdopen(reader, "rb") as file:
        reports = file.read()
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return int.from_bytes(reports[-4:], "little"), os.WIFSIGNALED(status)


if __name__ == "__main__":
    assert "torch.distributed.checkpoint" not in sys.modules, "a run's first step waits for this import"
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    saved(home / "warm", 1)  # what is imported late is imported now
    restored(home / "warm")
    killed_everywhere(home / "everywhere")
    killed_anytime(home / "anytime")
