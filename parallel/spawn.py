"""Ranks as forked processes of this machine: what the audit and the tests run on. They start in tenths of a second."""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moesaic.parallel.ranks import RankGoneError

T = TypeVar("T")

LAST_WORDS = 5.0
"""Seconds that ranks have to say where another's death has left them."""


class RankFailedError(RuntimeError):
    """A rank raised, died or did not finish; the message says which and why."""


def run_ranks(work: Callable[[], T], size: int, *, timeout: float = 120.0) -> list[T]:
    """Call `work` on `size` ranks with a gloo process group, one thread each; their results in order of rank.

    The processes are forks: `work` may be a closure, and sees everything that this process has loaded. The first rank
    that fails ends the others. Raises RankFailedError, also after `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes, results = [], []
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(work, rank, size, store, timeout, sender), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            results.append(receiver)
        try:
            return _collect(results, processes, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(results: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    found: dict[int, Any] = {}
    ends = time.monotonic() + timeout
    while len(found) < len(results):
        waiting = [receiver for rank, receiver in enumerate(results) if rank not in found]
        ready = wait(waiting, max(0.0, ends - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(results)) if rank not in found]
            raise RankFailedError(f"ranks {missing} did not finish within {timeout:.0f} s")
        for receiver in ready:
            rank = results.index(receiver)  # type: ignore[arg-type]
            try:
                failure, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(5)
                failure, value, what = "", None, f"died (exit code {processes[rank].exitcode})"
            else:
                what = f"failed: {failure}"
            if failure is not None:
                others = [r for number, r in enumerate(results) if number != rank and number not in found]
                known = failure and RankGoneError.__name__ not in failure
                raise RankFailedError(f"rank {rank} {what}{'' if known else _last_words(results, others)}")
            found[rank] = value
    return [found[rank] for rank in range(len(results))]


def _last_words(results: list[Connection], others: list[Connection]) -> str:
    """What other ranks have to say of a death: where they waited in vain, or what they died of."""
    said = ""
    for receiver in wait(others, LAST_WORDS) if others else ():
        with suppress(EOFError):
            failure, _ = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
            if failure is not None:
                told = failure.strip()
                told = told.splitlines()[-1] if RankGoneError.__name__ in told else told
                said += f"; rank {results.index(receiver)}: {told}"  # type: ignore[arg-type]
    return said


def _rank(
    work: Callable[[], Any], rank: int, size: int, store: Path, timeout: float, sender: Connection
) -> None:
    torch.set_num_threads(1)  # first of all: threads of the parent do not exist here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    try:
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit
        )
        dist.barrier()  # a rank with nothing to do would be gone before a slow one has connected to it
        sender.send_bytes(pickle.dumps((None, work())))  # by value: shared memory would end with this process
        with suppress(RuntimeError):
            dist.destroy_process_group()
    except BaseException:
        with suppress(OSError):
            sender.send_bytes(pickle.dumps((traceback.format_exc(), None)))
    finally:
        sender.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # exit handlers belong to the parent
