"""SIGINT and SIGTERM ask a run to stop after the step it is in; a second SIGINT stops it at once."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """A context manager; inside it, `signal` names the signal that asked for a stop, if one did."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
