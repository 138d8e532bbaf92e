"""A report's section on ranks that own experts: how they waited, which rows and copies they had, what they sent."""

from collections.abc import Callable, Sequence

import numpy as np

from moesaic.train.charts import Curve
from moesaic.train.figures import Chart, Named, Table, chart, or_dash, plain, smoothed
from moesaic.train.rank_charts import RankMap, rows_chart, stack_chart, wait_chart
from moesaic.train.units import size

_CLASSES = {
    "tokens": "rows to experts and back, and their gradients",
    "counts": "how many rows go where",
    "copies": "experts' weights, to ranks that have copies",
    "copy_gradients": "gradients of copies, to the owners",
    "weights": "matrices that are gathered for a block; computed from their sizes",
    "gradients": "sums over ranks; computed from their sizes",
}  # name in the records, what it is
_OF_COPIES = ("copies", "copy_gradients")


def rank_charts(runs: Sequence[Named]) -> list[Chart]:
    """Maps and curves of the runs whose ranks own experts; more of them where experts were copied."""
    copied = [run for run in runs if run.log.copied]
    alone, waited = len(runs) == 1, "over the time of the step"
    return [
        *_maps(
            runs,
            "time/waited",
            "Waiting",
            f"time that a rank waited for rows and counts, {waited}",
            wait_chart,
            alone=alone,
        ),
        *_maps(
            copied,
            "time/waited_for_copies",
            "Waiting for copies",
            f"time that a rank waited for copies and their gradients, {waited}",
            wait_chart,
            alone=alone,
        ),
        *_maps(
            copied,
            "traffic/rows",
            "Rows of each rank",
            "rows over the mean of the ranks",
            rows_chart,
            alone=alone,
        ),
        *_maps(
            copied,
            "traffic/rows_alone",
            "Rows of each rank without copies",
            "what the same tokens would have been on the owners alone; same scale",
            rows_chart,
            alone=alone,
        ),
        *_busiest(runs),
        *_copies(copied, alone=alone),
        *_stacks(copied, alone=alone),
        *plain(
            copied,
            "plan/changed",
            "Changes of plan",
            remark="banks whose copies are others than in the step before",
            unit="banks",
            from_zero=True,
        ),
    ]


def bytes_sent(runs: Sequence[Named]) -> Table | None:
    """What all ranks send in a step, by class: the mean over the records of each run."""
    sent = {run.label: run.log.sent for run in runs if run.log.sent}
    if not sent:
        return None
    copied = any(run.log.copied for run in runs)
    rows = [
        (name.replace("_", " "), *(or_dash(of_run.get(name), size) for of_run in sent.values()), what)
        for name, what in _CLASSES.items()
        if copied or name not in _OF_COPIES
    ]
    rows.append(("all", *(size(sum(of_run.values())) for of_run in sent.values()), ""))
    labels = ["per step"] if len(runs) == 1 else sent
    return Table("Bytes sent", "by all ranks together in a step, a mean", ["class", *labels, "what"], rows)


def _maps(
    runs: Sequence[Named],
    name: str,
    title: str,
    remark: str,
    draw: Callable[..., str],
    *,
    alone: bool,
) -> list[Chart]:
    """One map per run that recorded the numbers."""
    charts = []
    for index, run in enumerate(runs):
        found: RankMap | None = run.log.of_ranks.get(name)
        if found is not None:
            svg = draw(found, key=f"{name.replace('/', '-')}-{index}")
            missing = "; grey: no such rank" if np.isnan(found.values).any() else ""
            titled = title if alone else f"{title}: {run.label}"
            scale = "wait" if draw is wait_chart else "rows"
            charts.append(Chart(title=titled, remark=remark + missing, svg=svg, scale=scale))
    return charts


def _busiest(runs: Sequence[Named]) -> list[Chart]:
    """The busiest rank's rows; of one run with copies also what they would have been without."""
    name, title = "traffic/rows_max_over_mean", "Rows of the busiest rank"
    remark = "rows of a step, all layers together; 1 is balance"
    if len(runs) > 1 or not runs[0].log.copied:
        return plain(runs, name, title, remark=remark, unit="max / mean")
    log = runs[0].log
    curves = [
        ("", Curve(series=log.of(name), look="faint")),
        ("with copies", Curve(series=smoothed(log.of(name)))),
        (
            "the same tokens without",
            Curve(series=smoothed(log.of("traffic/rows_alone_max_over_mean")), color=1),
        ),
    ]
    return chart(title, f"{remark}; smoothed", curves, unit="max / mean")


def _copies(runs: Sequence[Named], *, alone: bool) -> list[Chart]:
    """Copies that were used, and of one run those that were planned before the step."""
    remark = "experts that ranks had and did not own, all ranks and layers together"
    if not alone:
        return plain(runs, "traffic/copies_used", "Copies", remark=remark, unit="copies", from_zero=True)
    curves = [
        (label, Curve(series=smoothed(run.log.of(name)), color=color))
        for run in runs
        for color, (label, name) in enumerate(
            {"used": "traffic/copies_used", "planned": "plan/copies"}.items()
        )
    ]
    return chart("Copies", f"{remark}; smoothed", curves, unit="copies", from_zero=True)


def _stacks(runs: Sequence[Named], *, alone: bool) -> list[Chart]:
    """Bytes by class over time, one chart per run."""
    charts = []
    for index, run in enumerate(runs):
        names = [name for name in _CLASSES if run.log.sent.get(name, 0) > 0]
        curves = [
            (name.replace("_", " "), Curve(series=run.log.of(f"traffic/bytes_{name}"), color=color))
            for color, name in enumerate(_CLASSES)
            if name in names
        ]
        title = "Bytes by class" if alone else f"Bytes by class: {run.label}"
        svg = stack_chart([curve for _, curve in curves], key=f"bytes-{index}", unit="bytes in a step")
        remark = "what all ranks together sent to others, stacked"
        charts.append(Chart(title=title, remark=remark, svg=svg, legend=curves))
    return charts
