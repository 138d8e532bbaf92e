"""What a run says while it runs: a table, a live bar and blocks on a terminal, plain lines elsewhere, and the log.

`Display` owns the screen and the clock; how things look is in `train/views.py`. Showing never stops a run: when the
other end of a pipe goes away, the run goes on in silence.
"""

import io
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from moesaic.train.facts import Closing, Evaluation, Progress, Start
from moesaic.train.health import LayerLoad
from moesaic.train.units import visible
from moesaic.train.views import (
    WIDTH,
    closing_view,
    evaluation_view,
    health_view,
    preparation_view,
    progress_line,
    progress_view,
    start_view,
)

REFRESH = 0.25
"""Seconds between two drawings of the live part: its cost stays far below 1 % of the time."""


class Screen(Console):
    """A console whose reader may leave."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        self.file = io.StringIO()


class Display:
    """Shows one run. A context manager: leaving it restores the terminal.

    steps: of the whole run. every: steps between plain lines, in the log and where there is no terminal. log: gets
    all texts without colours (such as `RunDir.say`); None keeps no log. console: None for standard output.
    """

    def __init__(
        self,
        *,
        steps: int,
        every: int,
        log: Callable[[str], None] | None = None,
        console: Console | None = None,
    ) -> None:
        self.steps = steps
        self.every = every
        self.console = console or Screen()
        self.live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._log = log
        self._live: Live | None = None
        self._drawn = 0.0
        self._times: deque[tuple[float, int]] = deque(maxlen=200)
        self._stage = ""

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pause()

    def say(self, message: str) -> None:
        """One message, above the live part and in the log."""
        self._print(Text(visible(message)))
        self._write(message)

    def warn(self, message: str) -> None:
        """One message that must not be missed."""
        self._print(Text.assemble(("warning: ", "bold yellow"), visible(message)))
        self._write("warning: " + message)

    def log_to(self, log: Callable[[str], None]) -> None:
        """Send texts to `log` from now on: before the run has a folder there is nothing to write to."""
        self._log = log

    def preparing(self, stage: str, done: int, total: int) -> None:
        """Progress of the corpus; fits `data.prepare(report=...)`. Without a terminal: one line per stage."""
        if self.live:
            self._draw(preparation_view(stage, done, total), force=done >= total)
        elif stage != self._stage:
            self._print(Text(f"preparing the corpus: {visible(stage)}"))
        self._stage = stage

    def start(self, start: Start) -> None:
        """The start-up table."""
        self._pause()
        self._block(start_view(start))

    def step(self, progress: Progress) -> None:
        """Move the bar, and write a plain line at every `every`-th and the last step. Costs about 10 us per step."""
        now = time.monotonic()
        self._times.append((now, progress.step))
        if self.live and (self._live is None or now - self._drawn >= REFRESH or progress.step == self.steps):
            self._draw(progress_view(progress, total=self.steps, eta=self.eta()), force=True)
        if progress.step % self.every == 0 or progress.step == self.steps:
            line = progress_line(progress, total=self.steps, eta=self.eta())
            if not self.live:
                self._print(Text(line, no_wrap=True, overflow="ignore"))
            self._write(line)

    def evaluation(self, evaluation: Evaluation, loads: Sequence[LayerLoad] = ()) -> None:
        """One evaluation, and the health of the routers where `loads` is given."""
        text = evaluation_view(evaluation)
        self._print(text)
        self._write(text.plain)
        if loads:
            self._block(health_view(loads))

    def close(self, closing: Closing) -> None:
        """The closing block; the live part ends."""
        self._pause()
        self._block(closing_view(closing))

    def eta(self) -> float | None:
        """Seconds left, from the last 200 steps shown, evaluations and savings included. None before the second."""
        if len(self._times) < 2 or self._times[-1][1] <= self._times[0][1]:
            return None
        (start, first), (end, last) = self._times[0], self._times[-1]
        return (end - start) / (last - first) * (self.steps - last)

    def _pause(self) -> None:
        """Take the live part off the screen; the next drawing brings it back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, view: RenderableType, *, force: bool) -> None:
        now = time.monotonic()
        if not force and now - self._drawn < REFRESH:
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(view, refresh=True)
        self._drawn = now

    def _print(self, view: RenderableType) -> None:
        self.console.print(view, highlight=False, markup=False, soft_wrap=not self.live)

    def _block(self, view: RenderableType) -> None:
        self.console.print(view)
        if self._log is not None:
            plain = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False)
            with plain.capture() as captured:
                plain.print(view)
            self._write(captured.get().rstrip("\n"))

    def _write(self, text: str) -> None:
        if self._log is not None:
            self._log(text)
