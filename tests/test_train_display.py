"""The display: live on a terminal, plain elsewhere, always in the log, and never in the way of the run."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from moesaic.train import display as module
from moesaic.train.display import Display
from moesaic.train.facts import Closing, Evaluation, Progress
from moesaic.train.health import LayerLoad

CLOSING = Closing(
    outcome="finished", step=6, steps=6, tokens=64, seconds=1.0, tokens_per_second=64.0, peak_memory=1
)


def plain() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=80, force_terminal=True, legacy_windows=False, _environ={})


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def progress(step: int) -> Progress:
    return Progress(
        step=step, loss=3.0, bits_per_byte=1.5, tokens_per_second=1000.0, imbalance=1.2, memory=1 << 30
    )


@pytest.mark.parametrize("make", [plain, terminal])
def test_log_gets_everything_in_plain_text(make):
    log: list[str] = []
    with Display(steps=6, every=4, log=log.append, console=make()) as display:
        for step in range(1, 7):
            display.step(progress(step))
        display.evaluation(
            Evaluation(step=6, loss=2.0, bits_per_byte=1.0, seconds=1.0, best=True),
            [LayerLoad(layer=1, counts=torch.tensor([3, 1]), tokens=4)],
        )
        display.say("a [bold]note")
        display.warn("careful")
        display.close(CLOSING)
    assert [line.split("  ")[0] for line in log[:2]] == ["step 4/6", "step 6/6"]
    assert log[2].startswith("step 6: held-out loss 2.0000 nats")
    assert "MaxVio" in log[3]
    assert log[4:6] == ["a [bold]note", "warning: careful"]
    assert "64 tokens in 6 of 6 steps" in log[6]
    assert not any("\x1b" in text for text in log)


def test_plain_output_is_one_line_per_logged_step():
    console = plain()
    with Display(steps=6, every=4, console=console) as display:
        display.preparing("tokenizing", 0, 2)
        display.preparing("tokenizing", 1, 2)
        display.preparing("packing", 0, 2)
        for step in range(1, 7):
            display.step(progress(step))
        display.say("x" * 200)
    lines = output(console).splitlines()
    assert lines[:2] == ["preparing the corpus: tokenizing", "preparing the corpus: packing"]
    assert [line[:8] for line in lines[2:4]] == ["step 4/6", "step 6/6"]
    assert lines[4:] == ["x" * 200]  # not wrapped: programs read this
    assert "\x1b" not in output(console)


def test_terminal_draws_and_cleans_up():
    console = terminal()
    with Display(steps=6, every=4, console=console) as display:
        display.step(progress(1))
        assert "1/6" in output(console)
        display.say("above the bar")
    text = output(console)
    assert "above the bar" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back


def test_cursor_is_back_after_an_error():
    console = terminal()
    display = Display(steps=6, every=4, console=console)

    def fail() -> None:
        with display:
            display.step(progress(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert output(console).count("\x1b[?25h") == 1


def test_drawing_is_throttled_and_the_last_step_is_shown(monkeypatch: pytest.MonkeyPatch):
    console, clock = terminal(), Clock(monkeypatch)
    with Display(steps=100, every=1000, console=console) as display:
        for step in range(1, 101):
            clock.now += 1 / 64
            display.step(progress(step))
    drawn = [step for step in range(1, 101) if f"  {step}/100  " in output(console)]
    assert drawn == [*range(1, 101, 16), 100]


def test_eta_is_measured_over_recent_steps(monkeypatch: pytest.MonkeyPatch):
    clock = Clock(monkeypatch)
    display = Display(steps=1000, every=10, console=plain())
    assert display.eta() is None
    for step in range(401, 701):  # slow at first, then 0.5 s a step
        clock.now += 10.0 if step < 450 else 0.5
        display.step(progress(step))
    assert display.eta() == pytest.approx(300 * 0.5)


def test_the_reader_of_a_pipe_may_leave():
    code = (
        "from moesaic.train.display import Display\n"
        "from moesaic.train.facts import Progress\n"
        "display = Display(steps=3000, every=1, log=None)\n"
        "for step in range(1, 3001): display.step(Progress(step=step, loss=1.0))\n"
        "open(3, 'w').write('went on to the end')\n"
    )
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({write}, 3)\n" + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=[write],
    ) as child:
        os.close(write)
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        with os.fdopen(read) as result:
            assert result.read() == "went on to the end"
        assert child.wait() == 0
        assert child.stderr.read() == b""


@pytest.mark.parametrize("make", [plain, terminal])
def test_a_step_costs_far_less_than_a_millisecond(make):
    log: list[str] = []
    with Display(steps=10_000, every=10, log=log.append, console=make()) as display:
        display.step(progress(1))
        with cpu_seconds() as spent:
            for step in range(2, 1002):
                display.step(progress(step))
    assert spent[0] / 1000 < 0.5e-3


def test_one_drawing_costs_a_small_share_of_its_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REFRESH", 0.0)
    with Display(steps=10_000, every=10_000, console=terminal()) as display:
        display.step(progress(1))
        with cpu_seconds() as spent:
            for step in range(2, 52):
                display.step(progress(step))
    assert spent[0] / 50 < 0.02


class Clock:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(module, "time", self)

    def monotonic(self) -> float:
        return self.now


@contextmanager
def cpu_seconds() -> Iterator[list[float]]:
    spent = [0.0]
    start = time.process_time()
    yield spent
    spent[0] = time.process_time() - start
