"""Timing for machines with few and noisy cores: candidates take turns, and ratios are formed within a round.

A round runs every candidate once, so whatever slows the machine down for seconds slows them all; odd rounds
run in reverse order, so a steady drift favours nobody. What counts is the median ratio, with its quartiles.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Quartiles:
    """First quartile, median and third quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def text(self, *, scale: float = 1.0, digits: int = 2) -> str:
        """`median (low-high)`, each multiplied by `scale`."""
        low, median, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Timings:
    """Seconds per candidate and round. Rounds line up: entry i of every candidate comes from round i."""

    seconds: dict[str, list[float]]
    threads: int

    def time(self, name: str) -> Quartiles:
        """Seconds of one call."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, name: str, to: str) -> Quartiles:
        """Seconds of `name` divided by seconds of `to`, formed round by round; above 1: `name` is slower."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return Quartiles.of([mine / other for mine, other in pairs])


def refuse_other_results(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """ValueError where a result is further off than `tolerance` times the largest value it should have; NaN is."""
    error, largest = (got.double() - want.double()).abs().max().item(), want.double().abs().max().item()
    if not error <= tolerance * largest:
        raise ValueError(f"{name}: differs by {error:.1e} of {largest:.1e}; no times for different functions")


def interleave(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2, threads: int = 1
) -> Timings:
    """Time every call `rounds` times, in turn, on `threads` threads, after `warmup` rounds not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    order = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    try:
        for turn in range(-warmup, rounds):
            for name in reversed(order) if turn % 2 else order:
                taken = _once(calls[name])
                if turn >= 0:
                    seconds[name].append(taken)
    finally:
        torch.set_num_threads(before)
    return Timings(seconds, threads)


def _once(call: Callable[[], object]) -> float:
    _synchronize()
    began = time.perf_counter()
    call()
    _synchronize()
    return time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():  # a GPU returns before its work is done
        torch.cuda.synchronize()


def environment(threads: int, packages: Sequence[str] = ("torch", "transformers", "moesaic")) -> str:
    """One line: date, processor, cores and load, threads, and versions."""
    cores = os.cpu_count()
    parts = [
        date.today().isoformat(),
        f"{_device()}, {cores} {'core' if cores == 1 else 'cores'} (load {os.getloadavg()[0]:.1f})",
        f"{threads} {'thread' if threads == 1 else 'threads'}",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
    ]
    for package in packages:
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"{package} not installed")
    return "; ".join(parts)


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {_processor()}"
    return _processor()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left and the others right."""
    lines = [list(header), *[list(row) for row in rows]]
    if len({len(line) for line in lines}) != 1:
        raise ValueError(f"rows of {sorted({len(line) for line in lines})} cells in one table")
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def comparison(timings: Timings, reference: str, *, amount: float | None = None, unit: str = "tokens") -> str:
    """A table of medians with quartiles: the time of a call and its ratio to that of `reference`.

    Where one call handles `amount` tokens (or another `unit`), the rate at the median time too.
    """
    header = ["", "ms"] + ([f"{unit}/s"] if amount else []) + [f"time / {reference}"]
    rows = []
    for name in timings.seconds:
        taken = timings.time(name)
        rate = [f"{amount / taken.median:,.0f}"] if amount else []
        ratio = "1" if name == reference else timings.ratio(name, reference).text()
        rows.append([name, taken.text(scale=1e3, digits=1), *rate, ratio])
    return table(header, rows)


def write_result(name: str, title: str, command: str, threads: int, sections: Sequence[str]) -> Path:
    """Write bench/results/NAME.md: title, command, environment and the sections. Returns the file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    head = [f"# {title}", f"Command: `{command}`", environment(threads)]
    path.write_text("\n\n".join([*head, *sections]) + "\n", encoding="utf-8")
    return path
