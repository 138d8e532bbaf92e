"""Maps of ranks over time, and sums by class, as SVG text for a page: see `charts` and `svg`.

Dims: P ranks, B columns of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.train.charts import Curve
from moesaic.train.svg import (
    HEX,
    LIGHT,
    MOST_ROWS,
    draw_map,
    label,
    new_figure,
    pool,
    prefixes,
    style,
    ticks,
    to_svg,
    tokens_axis,
    under_over,
    up_to_over,
)

MOST_WAIT = 0.5
"""End of a wait map's scale, in the colour OVER: half of a step or more."""
MOST_OVER = 2.0
"""Ends of the scale of a map of rows: so many times the mean or more, and that part of it or less."""
_POINTS = 300  # of a stack


@dataclass(frozen=True)
class RankMap:
    """A number of every rank over time. NaN: there was no such rank."""

    tokens: NDArray[np.float64]
    """Trained tokens where each of the B columns ends."""
    values: NDArray[np.float64]
    """(P, B)."""


def wait_chart(waits: RankMap, *, key: str) -> str:
    """Shares of the steps' time that ranks waited, as SVG: in the page's own colour where one did not wait.

    The scale is linear and the same in every report, from nothing to half of a step or more. Where ranks share a row,
    the one that waited longest is shown.
    """
    return _map_chart(waits, 0, MOST_WAIT, up_to_over, key)


def rows_chart(rows: RankMap, *, key: str) -> str:
    """Rows of ranks over the mean of all ranks, as SVG: in the page's own colour where a rank has its share.

    The scale is logarithmic and the same in every report, from half of the mean to twice the mean. Where ranks share a
    row, the one farthest from the mean is shown.
    """
    ends = np.log2(MOST_OVER)
    shown = RankMap(rows.tokens, np.log2(np.clip(rows.values, 1 / MOST_OVER, MOST_OVER)))
    return _map_chart(shown, -ends, ends, under_over, key)


def stack_chart(curves: Sequence[Curve], *, key: str, unit: str) -> str:
    """Areas on top of each other, the first one lowest, as SVG. All curves have values at the same tokens.

    Of more than 300 points, each drawn one is the mean of its neighbours.
    """
    groups = np.array_split(np.arange(len(curves[0].series.tokens)), _POINTS)
    groups = [group for group in groups if len(group)]
    tokens = np.array([curves[0].series.tokens[group[-1]] for group in groups])
    values = np.array([[curve.series.values[group].mean() for group in groups] for curve in curves])
    if len(tokens) == 1:  # an area needs a width
        tokens, values = np.append(0.0, tokens), values.repeat(2, axis=1)
    with style(key):
        figure, axes = new_figure(2.9)
        colors = [HEX[f"c{curve.color % len(LIGHT)}"] for curve in curves]
        axes.stackplot(tokens, values, colors=colors, alpha=0.85, linewidth=0)
        axes.set_axisbelow(True)
        label(axes, unit)
        tokens_axis(axes, tokens[-1])
        axes.set_ylim(0, None if values.any() else 1)
        axes.yaxis.set_major_formatter(prefixes())
        axes.yaxis.set_major_locator(ticks())
        return to_svg(figure)


def _map_chart(of: RankMap, low: float, high: float, colors: Any, key: str) -> str:
    """A row per rank."""
    together = -(-len(of.values) // MOST_ROWS)
    rows = pool(of.values, together)
    with style(key):
        figure, axes = new_figure(2.9)
        draw_map(axes, rows, of.tokens, low, high, colors())
        if len(rows) <= 16:
            for edge in range(1, len(rows)):
                axes.axhline(edge, color=HEX["muted"], linewidth=0.3)
        step = -(-len(rows) // 16)
        axes.set_yticks(
            np.arange(0, len(rows), step) + 0.5,
            [str(row * together) for row in range(0, len(rows), step)],
        )
        axes.tick_params(axis="y", length=0)
        label(axes, "rank")
        tokens_axis(axes, of.tokens[-1])
        return to_svg(figure)
