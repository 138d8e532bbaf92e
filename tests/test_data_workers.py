"""Tasks call functions of the library and of Python: workers cannot import a test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.data.corpora import Source
from moesaic.data.errors import DataError
from moesaic.data.shards import read_shard
from moesaic.data.workers import Workers


def children(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def test_one_worker_is_this_process() -> None:
    done: list[int] = []
    called: list[int] = []
    with Workers(1) as workers:
        workers.run(called.append, [(5,), (6,), (7,)], done.append)
    assert (done, called) == ([0, 1, 2], [5, 6, 7])


def test_several_workers_do_every_task_once(tmp_path: Path) -> None:
    before = children(os.getpid())
    done: list[int] = []
    with Workers(2) as workers:
        workers.run(os.mkdir, [(tmp_path / str(n),) for n in range(9)], done.append)
        assert sorted(done) == list(range(9))
        assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(9)]
        workers.run(os.rmdir, [(tmp_path / str(n),) for n in range(9)], done.append)
        assert not list(tmp_path.iterdir())
        assert len(children(os.getpid()) - before) == 2  # the same two
    assert children(os.getpid()) == before


def test_errors_come_back_with_where_they_happened(tmp_path: Path) -> None:
    source = Source("x", str(tmp_path / "x"), "jsonl", stop=9)
    with Workers(2) as workers, pytest.raises(FileNotFoundError, match="x") as caught:
        workers.run(read_shard, [(tmp_path, n, [source], True) for n in range(2)], lambda _: None)
    assert caught.value.filename == str(tmp_path / "x")
    assert "in read_shard" in caught.value.__notes__[0]


def test_prints_do_not_disturb(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(2) as workers:
        workers.run(print, [("hello",), ("hello",)], lambda _: None)
    assert capfd.readouterr().out == ""


def test_a_worker_that_dies(tmp_path: Path) -> None:
    with Workers(2) as workers, pytest.raises(DataError, match=r"corpus died.*with data\.workers=1"):
        workers.run(os._exit, [(3,), (3,), (3,)], lambda _: None)


def test_workers_end_with_a_killed_parent_and_need_no_main(tmp_path: Path) -> None:
    """The script comes through a pipe: there is no file that a worker could import again."""
    code = (
        "import os, time\nfrom moesaic.data.workers import Workers\n"
        "with Workers(2) as workers:\n"
        f"    workers.run(os.mkdir, [({str(tmp_path / 'a')!r},), ({str(tmp_path / 'b')!r},)], lambda _: None)\n"
        "    print('done', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(code)
        process.stdin.close()
        assert process.stdout.readline() == "done\n"
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    end = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.02)
