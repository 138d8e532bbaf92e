"""Curves and load maps of a run as SVG text that stands inside an HTML page and takes the page's colours.

Charts carry no names of runs and no legend: the page writes both, and escapes them. The size of a chart is bounded
however long the run is. What they are drawn with is in `svg`; maps of ranks are in `rank_charts`.

Dims: E experts, B columns of a load map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

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
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 24_000  # of all curves in one chart together
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))
_TOP = 0.03  # the share of a run whose values may leave the chart at its top

Look = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """Numbers over trained tokens, in order. What was not finite is NaN."""

    tokens: NDArray[np.float64]
    values: NDArray[np.float64]

    def finite(self) -> "Series":
        """Without the values that are not numbers."""
        kept = np.isfinite(self.values)
        return Series(self.tokens[kept], self.values[kept])


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of a chart: a thick `line`, a `faint` one behind it, or `dots` joined by a line."""

    series: Series
    color: int = 0
    """Index of the colour; beyond the palette it starts again with dashes. See `shade` for many ordered curves."""
    shade: float | None = None
    """Place on a scale from 0 to 1, for many curves with an order such as layers; replaces `color`."""
    look: Look = "line"

    @property
    def css(self) -> str:
        """The colour as the page writes it in its legend."""
        return f"var(--c{self.color % len(LIGHT)})" if self.shade is None else _ramp(self.shade)

    @property
    def dash(self) -> int:
        """0: solid, 1: dashed, 2: dotted."""
        return 0 if self.shade is not None else self.color // len(LIGHT) % len(_DASHES)


@dataclass(frozen=True)
class LoadMap:
    """Load of every expert over time, relative to the mean of its layer: 1 is balance, 0 a dead expert."""

    tokens: NDArray[np.float64]
    """Trained tokens where each of the B columns ends."""
    layers: Mapping[int, NDArray[np.float64]]
    """Layer -> (E, B)."""


def smooth(series: Series, *, window: int) -> Series:
    """The mean of `window` values around each one, fewer towards both ends."""
    series, half = series.finite(), max(1, window // 2)
    total = np.concatenate(([0.0], np.cumsum(series.values)))
    index = np.arange(len(series.values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(index))
    return Series(series.tokens, (total[high] - total[low]) / (high - low))


def thin(series: Series, limit: int) -> Series:
    """At most `limit` points that draw the same picture: the least and the greatest of every group."""
    series, count = series.finite(), len(series.finite().values)
    if count <= limit:
        return series
    groups = np.array_split(np.arange(count), max(1, limit // 2))
    ends = ((g[series.values[g].argmin()], g[series.values[g].argmax()]) for g in groups)
    kept = sorted({int(index) for pair in ends for index in pair})
    return Series(series.tokens[kept], series.values[kept])


def line_chart(
    curves: Sequence[Curve],
    *,
    key: str,
    unit: str,
    prefixed: bool = False,
    from_zero: bool = False,
    settles: bool = False,
) -> str:
    """Curves over tokens as SVG. Every curve has a point.

    key: one word that no other chart of the page has. unit: label of the upright axis. prefixed: write 4k for 4000.
    from_zero: the axis begins at 0, where a change is to be seen against the whole.
    settles: the first values may leave the chart at its top, as a loss does that starts high.
    """
    limit = max(60, min(1200, _POINTS // max(1, len(curves))))
    with style(key):
        figure, axes = new_figure(2.9)
        for curve in curves:
            shown = thin(curve.series, limit)
            axes.plot(shown.tokens, shown.values, **_drawing(curve, len(shown.values)))
        label(axes, unit)
        tokens_axis(axes, max(curve.series.tokens[-1] for curve in curves))
        if settles:
            _cut_top(axes, [curve.series.finite() for curve in curves])
        if prefixed:
            axes.yaxis.set_major_formatter(prefixes())
        else:
            axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_major_locator(ticks())
        if from_zero:
            some = any(np.any(curve.series.finite().values) for curve in curves)
            axes.set_ylim(0, None if some else 1)
        return to_svg(figure)


def load_chart(loads: LoadMap, *, key: str) -> str:
    """A load map as SVG: a band per layer, a row per expert, and the page's own colour where an expert has its share.

    The scale is logarithmic and the same in every report, from a quarter of the mean to four times the mean.
    """
    together = -(-sum(len(load) for load in loads.layers.values()) // MOST_ROWS)
    bands = {layer: pool(_log_load(load), together) for layer, load in sorted(loads.layers.items())}
    ends = np.cumsum([len(band) for band in bands.values()])
    with style(key):
        figure, axes = new_figure(min(7.0, max(6.2, 0.6 + 0.1 * ends[-1])))
        draw_map(axes, np.concatenate(list(bands.values())), loads.tokens, -2, 2, under_over())
        for end in ends[:-1]:
            axes.axhline(end, color=HEX["muted"], linewidth=0.8 if len(bands) <= 16 else 0.3)
        step = -(-len(bands) // 24)
        middles = (ends + np.concatenate(([0], ends[:-1]))) / 2
        axes.set_yticks(middles[::step], [str(layer) for layer in list(bands)[::step]])
        axes.tick_params(axis="y", length=0)
        label(axes, "layer")
        tokens_axis(axes, loads.tokens[-1])
        return to_svg(figure)


def _ramp(place: float) -> str:
    """A colour between blue and yellow that is seen on white and on black."""
    stops = np.array([(66, 92, 196), (20, 140, 170), (30, 160, 110), (200, 150, 10)], dtype=float)
    mixed = [np.interp(place * (len(stops) - 1), range(len(stops)), channel) for channel in stops.T]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _drawing(curve: Curve, points: int) -> dict[str, Any]:
    color = HEX[f"c{curve.color % len(LIGHT)}"] if curve.shade is None else _ramp(curve.shade)
    look: dict[str, Any] = {"color": color, "linestyle": _DASHES[curve.dash]}
    if curve.look == "faint":
        return look | {"linewidth": 0.8, "alpha": 0.45, "zorder": 1.6}
    if curve.look == "dots" or points == 1:
        return look | {"linewidth": 1.3, "marker": "o", "markersize": 3.2 if points < 60 else 0, "zorder": 3}
    return look | {"linewidth": 1.5 if curve.shade is None else 1.1, "zorder": 2}


def _cut_top(axes: "Axes", curves: Sequence[Series]) -> None:
    """Let the axis end at the greatest value after the first few percent, where that leaves most of it."""
    late = [c.values[c.tokens > _TOP * c.tokens[-1]] for c in curves if len(c.values) > 20]
    tops = [values.max() for values in late if len(values)]
    low, high = axes.get_ylim()
    if tops and max(tops) < high:
        axes.set_ylim(low, max(tops) + 0.04 * (max(tops) - low))


def _log_load(load: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative load -> -2 (a quarter or less) to 2 (four times or more); NaN stays."""
    return np.log2(np.clip(load, 0.25, 4.0))
