"""A run, or several side by side, as one HTML file: numbers, curves, expert loads, texts, configuration, machine.

The page needs nothing beside itself: no network, no scripts. It is made from what the runs' folders hold
(`train/run_log.py`), so it can be drawn again at any time. The layout is in `report_page.html`, where Jinja2 escapes
every text; only the charts come in as markup.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from moesaic import __version__
from moesaic.kernels.files import Replaced
from moesaic.train.charts import Curve, load_chart
from moesaic.train.figures import Chart, Named, Table, chart, or_dash, plain, smoothed
from moesaic.train.rank_charts import MOST_WAIT
from moesaic.train.report_ranks import bytes_sent, rank_charts
from moesaic.train.run_dir import differences
from moesaic.train.run_log import ReportError, RunLog
from moesaic.train.svg import DARK, LIGHT, OVER, UNDER
from moesaic.train.units import count, duration, size, visible

_TEMPLATE = Path(__file__).with_name("report_page.html")
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


def write_report(logs: Sequence[RunLog], path: Path) -> None:
    """Draw one run, or several in the same charts, into `path`. ReportError where the file cannot be written."""
    page = render(logs)
    try:
        with Replaced(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
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
        Fact("parameters", or_dash(log.parameters, count)),
        Fact("active", or_dash(log.active_parameters, count)),
        Fact("steps", f"{log.step:,}"),
        Fact("tokens", count(log.tokens)),
        Fact("held-out loss, last", or_dash(last[-1] if len(last) else None, "{:.4f}".format)),
        Fact("best", or_dash(best and best[0], "{:.4f}".format)),
        Fact("bits per byte, best", or_dash(best and best[1], "{:.4f}".format)),
        Fact("time in steps", or_dash(seconds, duration)),
        Fact("tokens/s", or_dash(seconds and log.tokens / seconds, count)),
        Fact("peak memory", or_dash(memory.max() if len(memory) else None, size)),
        Fact("MaxVio, last", or_dash(log.last("experts/max_vio"), "{:.2f}".format)),
    ]


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
        Section("Ranks", rank_charts(runs), bytes_sent(runs)),
        Section(
            "Optimisation",
            [
                *plain(runs, "train/lr", "Learning rate", unit="learning rate"),
                *plain(
                    runs, "train/grad_norm", "Gradient norm", unit="L2 norm before clipping", settles=True
                ),
            ],
        ),
        Section(
            "Speed and memory",
            [
                *plain(runs, "time/tokens_per_second", "Throughput", unit="tokens per second", prefixed=True),
                *plain(runs, "time/memory", "Memory", unit="GiB, peak so far", scale=2**-30, from_zero=True),
            ],
        ),
    ]


def _loss(runs: Sequence[Named], name: str, unit: str) -> list[Chart]:
    """Training and held-out values: in two colours for one run, in one colour per run for several."""
    title = {"loss": "Loss", "bits_per_byte": "Bits per byte"}[name]
    if len(runs) == 1:
        trained, held_out = runs[0].log.of(f"train/{name}"), runs[0].log.of(f"eval/{name}")
        curves = [
            ("", Curve(series=trained, look="faint")),
            ("training, smoothed", Curve(series=smoothed(trained))),
            ("held-out", Curve(series=held_out, color=1, look="dots")),
        ]
        return chart(
            title, "each record behind the smoothed curve; lower is better", curves, unit=unit, settles=True
        )
    curves = []
    for index, run in enumerate(runs):
        curves.append(("", Curve(series=smoothed(run.log.of(f"train/{name}")), color=index, look="faint")))
        curves.append((run.label, Curve(series=run.log.of(f"eval/{name}"), color=index, look="dots")))
    remark = "dots: held-out; thin: training, smoothed; lower is better"
    return chart(title, remark, curves, unit=unit, settles=True)


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


def _layer_health(log: RunLog) -> list[Chart]:
    """Four charts with a curve per layer."""
    few = len(log.layers) <= len(LIGHT)
    charts = []
    for name, title, remark, drawing in _HEALTH:
        curves = []
        for place, layer in enumerate(log.layers):
            series = smoothed(log.of(f"layer_{layer:02d}/{name}"))
            named = few or place in (0, len(log.layers) // 2, len(log.layers) - 1)
            shade = None if few else place / (len(log.layers) - 1)
            color = place if few else 0
            curves.append((f"layer {layer}" if named else "", Curve(series=series, color=color, shade=shade)))
        charts += chart(title, remark, curves, **drawing)
    return charts


def _worst_health(runs: Sequence[Named]) -> list[Chart]:
    """The worst layer of every run."""
    charts = []
    for name, title, remark, drawing in _HEALTH:
        of_runs = [run.log.of(f"experts/{name}") for run in runs]
        curves = [
            (run.label, Curve(series=smoothed(series), color=index))
            for index, (run, series) in enumerate(zip(runs, of_runs, strict=True))
        ]
        which = "all layers together" if name == "dead" else "worst layer"
        charts += chart(title, f"{which}; {remark}", curves, **drawing)
    return charts
