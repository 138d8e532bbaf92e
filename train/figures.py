"""What the sections of a report are made of: charts, tables, runs by name, and curves of one number per run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moesaic.train.charts import Curve, Series, line_chart, smooth
from moesaic.train.run_log import RunLog

_WINDOWS = 40  # a smoothed curve averages over this part of a run


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the page."""

    title: str
    remark: str
    svg: str
    """Markup, which the page takes as it is."""
    legend: Sequence[tuple[str, Curve]] = ()
    scale: Literal["load", "rows", "wait"] | None = None
    """What the colours of a map stand for."""


@dataclass(frozen=True)
class Table:
    """Names of columns, and rows that begin with a name of their own."""

    title: str
    remark: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Named:
    """A run and what the page calls it: its name, or its folder where two names are equal."""

    label: str
    log: RunLog


def or_dash(value: Any, text: Callable[[Any], str]) -> str:
    """The text of a value, where there is one."""
    return "-" if value is None else text(value)


def chart(title: str, remark: str, curves: Sequence[tuple[str, Curve]], **drawing: Any) -> list[Chart]:
    """A chart of labelled curves, or none where no curve has a point. The legend leaves out empty labels."""
    curves = [(label, curve) for label, curve in curves if len(curve.series.finite().values)]
    if not curves:
        return []
    svg = line_chart([curve for _, curve in curves], key=title.replace(" ", "-"), **drawing)
    return [Chart(title=title, remark=remark, svg=svg, legend=[pair for pair in curves if pair[0]])]


NOISY = (
    "train/grad_norm",
    "time/tokens_per_second",
    "traffic/rows_max_over_mean",
    "traffic/copies_used",
    "plan/changed",
)


def plain(
    runs: Sequence[Named], name: str, title: str, *, scale: float = 1.0, remark: str = "", **drawing: Any
) -> list[Chart]:
    """One name of the records, smoothed where it is noisy; `remark` goes before what is said of that."""
    noisy = name in NOISY
    curves = []
    for index, run in enumerate(runs):
        series = Series(run.log.of(name).tokens, run.log.of(name).values * scale)
        if noisy and len(runs) == 1:
            curves.append(("", Curve(series=series, look="faint")))
        label = run.label if len(runs) > 1 else ""
        curves.append((label, Curve(series=smoothed(series) if noisy else series, color=index)))
    smoothing = "smoothed" + (", each record behind it" if len(runs) == 1 else "") if noisy else ""
    return chart(title, "; ".join(filter(None, (remark, smoothing))), curves, **drawing)


def smoothed(series: Series) -> Series:
    """Without what changes from record to record."""
    return smooth(series, window=len(series.finite().values) // _WINDOWS)
