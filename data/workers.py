"""Processes that share the work of preparation.

They are fresh interpreters that know nothing of the script that started them, so that a script needs no
`if __name__ == "__main__"` and may come from a pipe or a notebook. They talk over pipes, so that they end with the
process that started them, even if that was killed. Tasks name functions of importable modules.
"""

import os
import pickle
import selectors
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable
from typing import IO, Any, cast

from moesaic.data.errors import DataError


class Workers:
    """At most `count` processes, started when first needed; with one worker, or one task, no process at all."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """What still works is killed."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()  # closes the pipes and waits
        self._processes.clear()

    def run(
        self, function: Callable[..., object], tasks: list[tuple[Any, ...]], done: Callable[[int], None]
    ) -> None:
        """Call `function(*task)` for all tasks, and `done(index)` here after each. An error ends it."""
        if self.count == 1 or len(tasks) <= 1:
            for i, task in enumerate(tasks):
                function(*task)
                done(i)
            return
        while len(self._processes) < min(self.count, len(tasks)):
            self._processes.append(_start())
        waiting = deque(enumerate(tasks))
        busy: dict[int, int] = {}  # process -> index of its task
        with selectors.DefaultSelector() as selector:
            for p, process in enumerate(self._processes[: len(tasks)]):
                selector.register(cast(IO[bytes], process.stdout), selectors.EVENT_READ, p)
                busy[p], task = waiting.popleft()
                _send(process, (function, task))
            while busy:
                for ready, _ in selector.select():
                    p = ready.data
                    _receive(self._processes[p])
                    done(busy.pop(p))
                    if waiting:
                        busy[p], task = waiting.popleft()
                        _send(self._processes[p], (function, task))


def serve() -> None:
    """What a worker does: calls from standard input, None or the error to standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    calls, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints must not get into the replies
    while True:
        try:
            function, task = pickle.load(calls)
        except EOFError:
            return
        reply: Exception | None = None
        try:
            function(*task)
        except Exception as error:
            error.add_note(traceback.format_exc())
            reply = error
        try:
            pickle.dump(reply, replies)
            replies.flush()
        except BrokenPipeError:  # the parent was killed
            os._exit(1)


def _start() -> "subprocess.Popen[bytes]":
    """-P: the current folder is no place to import from."""
    command = [sys.executable, "-P", "-c", "from moesaic.data.workers import serve; serve()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _send(process: "subprocess.Popen[bytes]", call: tuple[Callable[..., object], tuple[Any, ...]]) -> None:
    pipe = cast(IO[bytes], process.stdin)
    try:
        pickle.dump(call, pipe)
        pipe.flush()
    except BrokenPipeError as error:
        raise _died() from error


def _receive(process: "subprocess.Popen[bytes]") -> None:
    try:
        reply = pickle.load(cast(IO[bytes], process.stdout))
    except (EOFError, pickle.UnpicklingError) as error:
        raise _died() from error
    if reply is not None:
        raise reply


def _died() -> DataError:
    return DataError(
        "data.workers: a process that prepares the corpus died, perhaps for want of memory; "
        "start again, or with data.workers=1"
    )
