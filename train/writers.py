"""Numbers of a run, for programs: `metrics.jsonl`, and TensorBoard's event files.

A record is a flat mapping with the integer key `step`; every other key is a slash name such as `train/loss` or
`layer_03/max_vio`. A list of numbers is a distribution over its index, such as an expert load. What is not finite is
written as `null`, because JSON has no NaN.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.kernels.files import Replaced

_FLUSH = 5.0


class NoMetrics:
    """Takes records and keeps none: for ranks that do not write."""

    def append(self, record: Mapping[str, Any]) -> None:
        pass

    def rewind(self, step: int) -> int:
        return 0

    def close(self) -> None:
        pass


class MetricsWriter:
    """Appends records to a JSON lines file, and to TensorBoard where a folder is given.

    tensorboardX is imported with the first record, not at start.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None) -> None:
        self.path = path
        self.tensorboard = tensorboard
        self._file = path.open("a", encoding="utf-8")
        self._events: _Events | None = None
        self._purge: int | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns. ValueError where the disk is full."""
        line = json.dumps(_finite(dict(record)), allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({error.strerror}); free some space and continue with --resume"
            ) from None
        if self.tensorboard is not None:
            if self._events is None:
                self._events = _Events(self.tensorboard, purge=self._purge)
            self._events.append(record)

    def rewind(self, step: int) -> int:
        """Drop every record after `step`, before a resumed run writes them again. Returns how many.

        A run that continues from its very beginning rewinds to -1. Dropped records move to `metrics.dropped.jsonl`;
        a line that a kill left unfinished is discarded. TensorBoard is told to hide the dropped steps.
        """
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept, dropped, torn = [], [], 0
        for line in lines:
            at = _step_of(line)
            if at is None:
                torn += 1
            elif at > step:
                dropped.append(line)
            else:
                kept.append(line)
        self._purge = step + 1
        if dropped or torn:
            with self.path.with_suffix(".dropped.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(dropped)
            with Replaced(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")
                self._file.close()
            self._file = self.path.open("a", encoding="utf-8")
        return len(dropped) + torn

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None


def each_record(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a `metrics.jsonl`, in order and one at a time; None for a line that is torn or no record."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield _record_of(line)


def _step_of(line: str) -> int | None:
    """Step of one line; None where the line is torn."""
    record = _record_of(line)
    return None if record is None else record["step"]


def _record_of(line: str) -> dict[str, Any] | None:
    """One line; None where it is torn."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


class _Events:
    """TensorBoard's event file, one event per record.

    tensorboardX's SummaryWriter writes one event per value through a queue and two threads: five times the cost.
    Its flush is an fsync of milliseconds, so it happens every `_FLUSH` seconds; `metrics.jsonl` is never behind.
    """

    def __init__(self, folder: Path, *, purge: int | None) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._event: Any = event_pb2
        self._summary: Any = summary_pb2
        self._file = EventsWriter(str(folder / "events"))
        self._flushed = 0.0
        if purge is not None:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._write(self._event.Event(step=purge, session_log=start))

    def append(self, record: Mapping[str, Any]) -> None:
        values = []
        for name, value in record.items():
            if isinstance(value, list | tuple):
                if value and all(_plottable(item) for item in value):
                    values.append(self._summary.Summary.Value(tag=name, histo=self._distribution(value)))
            elif name != "step" and _plottable(value):
                values.append(self._summary.Summary.Value(tag=name, simple_value=value))
        if values:
            self._write(self._event.Event(step=record["step"], summary=self._summary.Summary(value=values)))

    def close(self) -> None:
        self._file.close()

    def _distribution(self, heights: Sequence[float]) -> Any:
        """A histogram with one bucket per index, whose height is the value."""
        return self._summary.HistogramProto(
            min=0,
            max=len(heights),
            num=sum(heights),
            sum=sum(index * height for index, height in enumerate(heights)),
            sum_squares=sum(index * index * height for index, height in enumerate(heights)),
            bucket_limit=range(1, len(heights) + 1),
            bucket=heights,
        )

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.write_event(event)
        if event.wall_time - self._flushed >= _FLUSH:
            self._file.flush()
            self._flushed = event.wall_time


def _plottable(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
