"""A run, or several side by side, as one HTML file: numbers, curves, expert loads, texts, configuration, machine.

The page needs nothing beside itself: no network, no scripts. It is made from what the runs' folders hold
(`train/run_log.py`), so it can be drawn again at any time. The layout is in `report_page.html`, where Jinja2 escapes
every text; only the charts come in as markup.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moesaic import __version__
from moesaic.train.charts import (
    DARK,
    LIGHT,
    MOST_WAIT,
    OVER,
    UNDER,
    Curve,
    Series,
    line_chart,
    load_chart,
    smooth,
    wait_chart,
)
from moesaic.train.run_dir import differences
from moesaic.train.run_log import ReportError, RunLog
from moesaic.train.units import count, duration, size, visible

_TEMPLATE = Path(__file__).with_name("report_page.html")
_WINDOWS = 40  # a smoothed curve averages over this part of a run
_EVALUATIONS = 24
_HEALTH: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("max_vio", "MaxVio", "smoothed; 0 is balance", {"unit": "max load / mean load - 1", "from_zero": True}),
    ("load_entropy", "Entropy of the load", "smoothed; 1 is balance", {"unit": "share of the maximum"}),
    (
        "router_entropy",
        "Entropy of the router",
        "smoothed; 0 is a certain choice",
        {"unit": "nats per token"},
    ),
    (
        "dead",
        "Dead experts",
        "smoothed; without a row in a recorded step",
        {"unit": "experts", "from_zero": True},
    ),
)  # name in the records, title, remark, how it is drawn


_CLASSES = {
    "tokens": "rows to experts and back, and their gradients",
    "counts": "how many rows go where",
    "weights": "matrices that are gathered for a block; computed from their sizes",
    "gradients": "sums over ranks; computed from their sizes",
}  # name in the records, what it is


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the page."""

    title: str
    remark: str
    svg: str
    """Markup, which the page takes as it is."""
    legend: Sequence[tuple[str, Curve]] = ()
    scale: Literal["load", "wait"] | None = None
    """What the colours of a map stand for."""


@dataclass(frozen=True)
class Table:
    """Names of columns, and rows that begin with a name of their own."""

    title: str
    remark: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    title: str
    charts: Sequence[Chart]
    table: Table | None = None


@dataclass(frozen=True)
class Fact:
    """A key number with what belongs to it in small print."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Named:
    """A run and what the page calls it: its name, or its folder where two names are equal."""

    label: str
    log: RunLog


def write_report(logs: Sequence[RunLog], path: Path) -> None:
    """Draw one run, or several in the same charts, into `path`. ReportError where the file cannot be written."""
    page = render(logs)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be written ({error.strerror}); give another file with --out"
        ) from None


def render(logs: Sequence[RunLog]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    names = [log.name for log in logs]
    runs = [Named(log.name if names.count(log.name) == 1 else str(log.folder), log) for log in logs]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=" / ".join(run.label for run in runs),
        runs=runs,
        notes=[note for log in logs for note in log.notes],
        alone=runs[0].log if len(runs) == 1 else None,
        facts=_facts(runs[0].log),
        finals=[(run, _finals(run.log)) for run in runs],
        changes=_changes(runs),
        evaluations=_evaluations(runs[0].log),
        sections=[section for section in _sections(runs) if section.charts or section.table],
        tone=tone,
        machine=_machine,
        light=LIGHT,
        dark=DARK,
        under=UNDER,
        over=OVER,
        most_wait=f"{MOST_WAIT:.0%}",
        version=__version__,
        drawn=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    )


def tone(outcome: str) -> str:
    """`good`, `bad` or `open`: how the page colours an outcome."""
    return "good" if outcome == "finished" else "bad" if outcome.startswith("failed") else "open"


def _facts(log: RunLog) -> list[Fact]:
    """The key numbers of one run; what is unknown is left out."""
    facts = []
    if log.parameters is not None:
        facts.append(Fact("parameters", count(log.parameters)))
    if log.parameters and log.active_parameters is not None:
        share = log.active_parameters / log.parameters
        facts.append(Fact("active", count(log.active_parameters), f"{share:.0%} of all, per token"))
    facts.append(Fact("tokens", count(log.tokens), f"{log.step:,} steps"))
    seconds = log.last("time/seconds")
    if seconds is not None:
        facts.append(Fact("time in steps", duration(seconds), f"{count(log.tokens / seconds)} tokens/s"))
    if log.best is not None:
        loss, bits, tokens = log.best
        at = "at the end" if tokens >= log.tokens else f"after {count(tokens)} tokens"
        facts.append(Fact("best held-out loss", f"{loss:.3f}", f"nats per token, {at}"))
        if bits is not None:
            facts.append(Fact("bits per byte", f"{bits:.3f}", "of the same evaluation"))
    memory = log.of("time/memory").finite().values
    if len(memory):
        facts.append(Fact("memory", size(memory.max()), "peak"))
    return facts


def _finals(log: RunLog) -> list[Fact]:
    """The columns of the table that compares runs."""
    best, seconds = log.best, log.last("time/seconds")
    memory = log.of("time/memory").finite().values
    last = log.of("eval/loss").finite().values
    return [
        Fact("outcome", log.outcome),
        Fact("parameters", _or_dash(log.parameters, count)),
        Fact("active", _or_dash(log.active_parameters, count)),
        Fact("steps", f"{log.step:,}"),
        Fact("tokens", count(log.tokens)),
        Fact("held-out loss, last", _or_dash(last[-1] if len(last) else None, "{:.4f}".format)),
        Fact("best", _or_dash(best and best[0], "{:.4f}".format)),
        Fact("bits per byte, best", _or_dash(best and best[1], "{:.4f}".format)),
        Fact("time in steps", _or_dash(seconds, duration)),
        Fact("tokens/s", _or_dash(seconds and log.tokens / seconds, count)),
        Fact("peak memory", _or_dash(memory.max() if len(memory) else None, size)),
        Fact("MaxVio, last", _or_dash(log.last("experts/max_vio"), "{:.2f}".format)),
    ]


def _or_dash(value: Any, text: Callable[[Any], str]) -> str:
    return "-" if value is None else text(value)


def _evaluations(log: RunLog) -> list[tuple[str, str, str]]:
    """Tokens, held-out loss, bits per byte; of many evaluations the newest."""
    loss, bits = log.of("eval/loss"), log.of("eval/bits_per_byte").values
    rows = [
        (count(tokens), f"{value:.4f}", f"{bits[at]:.4f}" if at < len(bits) else "-")
        for at, (tokens, value) in enumerate(zip(loss.tokens, loss.values, strict=True))
    ]
    return rows[-_EVALUATIONS:]


def _changes(runs: Sequence[Named]) -> list[tuple[str, list[str]]]:
    """The keys whose values differ between the runs' configurations, with the value of every run."""
    first, table = runs[0].log.config, {}
    for column, run in enumerate(runs[1:], 1):
        for change in differences(first, run.log.config):
            if change.key != "name":
                table.setdefault(change.key, [change.old] * len(runs))[column] = change.new
    return list(table.items())


def _machine(start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """One entry of environment.json as names and texts."""
    for name, value in start.items():
        if name == "packages" and isinstance(value, dict):
            yield name, ", ".join(f"{key} {version}" for key, version in value.items())
        elif name == "repositories" and isinstance(value, list):
            for one in value:
                changed = f", {one.get('num_changed')} files changed" if one.get("num_changed") else ""
                yield "repository", f"{one.get('root')} at {one.get('commit')} ({one.get('branch')}{changed})"
        elif isinstance(value, list):
            yield name, ", ".join(map(str, value)) or "none"
        else:
            yield name.replace("_", " "), "none" if value is None else str(value)


def _sections(runs: Sequence[Named]) -> list[Section]:
    health = _layer_health(runs[0].log) if len(runs) == 1 else _worst_health(runs)
    return [
        Section(
            "Loss", [*_loss(runs, "loss", "nats per token"), *_loss(runs, "bits_per_byte", "bits per byte")]
        ),
        Section("Experts", [*_load_maps(runs), *health]),
        Section("Ranks", [*_wait_maps(runs), *_rank_rows(runs)], _bytes_sent(runs)),
        Section(
            "Optimisation",
            [
                *_plain(runs, "train/lr", "Learning rate", unit="learning rate"),
                *_plain(
                    runs, "train/grad_norm", "Gradient norm", unit="L2 norm before clipping", settles=True
                ),
            ],
        ),
        Section(
            "Speed and memory",
            [
                *_plain(
                    runs, "time/tokens_per_second", "Throughput", unit="tokens per second", prefixed=True
                ),
                *_plain(runs, "time/memory", "Memory", unit="GiB, peak so far", scale=2**-30, from_zero=True),
            ],
        ),
    ]


def _chart(title: str, remark: str, curves: Sequence[tuple[str, Curve]], **drawing: Any) -> list[Chart]:
    """A chart of labelled curves, or none where no curve has a point. The legend leaves out empty labels."""
    curves = [(label, curve) for label, curve in curves if len(curve.series.finite().values)]
    if not curves:
        return []
    svg = line_chart([curve for _, curve in curves], key=title.replace(" ", "-"), **drawing)
    return [Chart(title=title, remark=remark, svg=svg, legend=[pair for pair in curves if pair[0]])]


def _loss(runs: Sequence[Named], name: str, unit: str) -> list[Chart]:
    """Training and held-out values: in two colours for one run, in one colour per run for several."""
    title = {"loss": "Loss", "bits_per_byte": "Bits per byte"}[name]
    if len(runs) == 1:
        trained, held_out = runs[0].log.of(f"train/{name}"), runs[0].log.of(f"eval/{name}")
        curves = [
            ("", Curve(series=trained, look="faint")),
            ("training, smoothed", Curve(series=_smoothed(trained))),
            ("held-out", Curve(series=held_out, color=1, look="dots")),
        ]
        return _chart(
            title, "each record behind the smoothed curve; lower is better", curves, unit=unit, settles=True
        )
    curves = []
    for index, run in enumerate(runs):
        curves.append(("", Curve(series=_smoothed(run.log.of(f"train/{name}")), color=index, look="faint")))
        curves.append((run.label, Curve(series=run.log.of(f"eval/{name}"), color=index, look="dots")))
    remark = "dots: held-out; thin: training, smoothed; lower is better"
    return _chart(title, remark, curves, unit=unit, settles=True)


def _plain(
    runs: Sequence[Named], name: str, title: str, *, scale: float = 1.0, remark: str = "", **drawing: Any
) -> list[Chart]:
    """One name of the records, smoothed where it is noisy; `remark` goes before what is said of that."""
    noisy = name in ("train/grad_norm", "time/tokens_per_second", "traffic/rows_max_over_mean")
    curves = []
    for index, run in enumerate(runs):
        series = Series(run.log.of(name).tokens, run.log.of(name).values * scale)
        if noisy and len(runs) == 1:
            curves.append(("", Curve(series=series, look="faint")))
        label = run.label if len(runs) > 1 else ""
        curves.append((label, Curve(series=_smoothed(series) if noisy else series, color=index)))
    smoothing = "smoothed" + (", each record behind it" if len(runs) == 1 else "") if noisy else ""
    return _chart(title, "; ".join(filter(None, (remark, smoothing))), curves, **drawing)


def _load_maps(runs: Sequence[Named]) -> list[Chart]:
    """One map per sparse run."""
    charts = []
    for index, run in enumerate(runs):
        if run.log.loads is not None:
            title = "Expert load" if len(runs) == 1 else f"Expert load: {run.label}"
            svg = load_chart(run.log.loads, key=f"load-{index}")
            remark = "rows of an expert over the mean of its layer, a mean over the records of a column"
            charts.append(Chart(title=title, remark=remark, svg=svg, scale="load"))
    return charts


def _wait_maps(runs: Sequence[Named]) -> list[Chart]:
    """One map per run whose ranks own experts."""
    charts = []
    for index, run in enumerate(runs):
        if run.log.waits is not None:
            title = "Waiting" if len(runs) == 1 else f"Waiting: {run.label}"
            svg = wait_chart(run.log.waits, key=f"wait-{index}")
            remark = "time that a rank waited for rows and counts, over the time of the step"
            remark += "; grey: no such rank" if np.isnan(run.log.waits.share).any() else ""
            charts.append(Chart(title=title, remark=remark, svg=svg, scale="wait"))
    return charts


def _rank_rows(runs: Sequence[Named]) -> list[Chart]:
    remark = "rows of a step, all layers together; 1 is balance"
    return _plain(
        runs, "traffic/rows_max_over_mean", "Rows of the busiest rank", remark=remark, unit="max / mean"
    )


def _bytes_sent(runs: Sequence[Named]) -> Table | None:
    """What all ranks send in a step, by class: the mean over the records of each run."""
    sent = {run.label: run.log.sent for run in runs if run.log.sent}
    if not sent:
        return None
    rows = [
        (name, *(_or_dash(of_run.get(name), size) for of_run in sent.values()), what)
        for name, what in _CLASSES.items()
    ]
    rows.append(("all", *(size(sum(of_run.values())) for of_run in sent.values()), ""))
    labels = ["per step"] if len(runs) == 1 else sent
    return Table("Bytes sent", "by all ranks together in a step, a mean", ["class", *labels, "what"], rows)


def _layer_health(log: RunLog) -> list[Chart]:
    """Four charts with a curve per layer."""
    few = len(log.layers) <= len(LIGHT)
    charts = []
    for name, title, remark, drawing in _HEALTH:
        curves = []
        for place, layer in enumerate(log.layers):
            series = _smoothed(log.of(f"layer_{layer:02d}/{name}"))
            named = few or place in (0, len(log.layers) // 2, len(log.layers) - 1)
            shade = None if few else place / (len(log.layers) - 1)
            color = place if few else 0
            curves.append((f"layer {layer}" if named else "", Curve(series=series, color=color, shade=shade)))
        charts += _chart(title, remark, curves, **drawing)
    return charts


def _worst_health(runs: Sequence[Named]) -> list[Chart]:
    """The worst layer of every run."""
    charts = []
    for name, title, remark, drawing in _HEALTH:
        of_runs = [run.log.of(f"experts/{name}") for run in runs]
        curves = [
            (run.label, Curve(series=_smoothed(series), color=index))
            for index, (run, series) in enumerate(zip(runs, of_runs, strict=True))
        ]
        which = "all layers together" if name == "dead" else "worst layer"
        charts += _chart(title, f"{which}; {remark}", curves, **drawing)
    return charts


def _smoothed(series: Series) -> Series:
    return smooth(series, window=len(series.finite().values) // _WINDOWS)
