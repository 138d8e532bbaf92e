"""Curves and load maps of a run as SVG text that stands inside an HTML page and takes the page's colours.

Charts are drawn with colours that stand for roles (`_ROLES`) and become CSS variables (`var(--ink)`), so one drawing
serves a light and a dark page. They carry no names of runs and no legend: the page writes both, and escapes them.
The size of a chart is bounded however long the run is. matplotlib is imported when the first chart is drawn.

Dims: E experts, P ranks, B columns of a load map or a wait map.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0072b2", "#d55e00", "#00835f", "#b4508a", "#a87400", "#5b5bd6")
DARK = ("#56b4e9", "#ff8a47", "#2fc79b", "#e79fc6", "#f0c04a", "#a3a3ff")
"""Colours of curves on either background: hues of Okabe and Ito, which the colour-blind can tell apart."""
UNDER, OVER = "#1273c4", "#e05a00"
"""Ends of a load map's scale: a quarter of the mean load or less, four times the mean or more."""
MOST_WAIT = 0.5
"""End of a wait map's scale, in the colour OVER: half of a step or more."""

WIDTH = 5.4
"""Inches of 72 units: wide enough for labels, narrow enough to be read on a phone."""
_LEFT, _RIGHT = 0.76, 0.16  # margins in inches
_POINTS = 24_000  # of all curves in one chart together
_CELLS = 240_000  # of one load map
_ROWS = 960  # of one map: more experts or ranks share rows
_UNKNOWN = (0.5, 0.5, 0.5, 0.35)

_ROLES = {"#010101": "ink", "#020202": "muted", "#030303": "grid"} | {
    f"#0f0f{index:02x}": f"c{index}" for index in range(len(LIGHT))
}
_HEX = {role: color for color, role in _ROLES.items()}
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


@dataclass(frozen=True)
class WaitMap:
    """The share of the steps' time that every rank waited. NaN: there was no such rank."""

    tokens: NDArray[np.float64]
    """Trained tokens where each of the B columns ends."""
    share: NDArray[np.float64]
    """(P, B)."""


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
    with _style(key):
        figure, axes = _figure(2.9)
        for curve in curves:
            shown = thin(curve.series, limit)
            axes.plot(shown.tokens, shown.values, **_drawing(curve, len(shown.values)))
        _label(axes, unit)
        _tokens_axis(axes, max(curve.series.tokens[-1] for curve in curves))
        if settles:
            _cut_top(axes, [curve.series.finite() for curve in curves])
        if prefixed:
            axes.yaxis.set_major_formatter(_prefixes())
        else:
            axes.yaxis.set_major_formatter("{x:.4g}")
        axes.yaxis.set_major_locator(_ticks())
        if from_zero:
            some = any(np.any(curve.series.finite().values) for curve in curves)
            axes.set_ylim(0, None if some else 1)
        return _svg(figure)


def load_chart(loads: LoadMap, *, key: str) -> str:
    """A load map as SVG: a band per layer, a row per expert, and the page's own colour where an expert has its share.

    The scale is logarithmic and the same in every report, from a quarter of the mean to four times the mean.
    """
    together = -(-sum(len(load) for load in loads.layers.values()) // _ROWS)
    bands = {layer: _pool(_log_load(load), together) for layer, load in sorted(loads.layers.items())}
    ends = np.cumsum([len(band) for band in bands.values()])
    with _style(key):
        figure, axes = _figure(min(7.0, max(6.2, 0.6 + 0.1 * ends[-1])))
        _image(axes, np.concatenate(list(bands.values())), loads.tokens, -2, 2, _load_colors())
        for end in ends[:-1]:
            axes.axhline(end, color=_HEX["muted"], linewidth=0.8 if len(bands) <= 16 else 0.3)
        step = -(-len(bands) // 24)
        middles = (ends + np.concatenate(([0], ends[:-1]))) / 2
        axes.set_yticks(middles[::step], [str(layer) for layer in list(bands)[::step]])
        axes.tick_params(axis="y", length=0)
        _label(axes, "layer")
        _tokens_axis(axes, loads.tokens[-1])
        return _svg(figure)


def wait_chart(waits: WaitMap, *, key: str) -> str:
    """A wait map as SVG: a row per rank, in the page's own colour where it did not wait.

    The scale is linear and the same in every report, from nothing to half of a step or more. Where ranks share a row,
    the one that waited longest is shown.
    """
    together = -(-len(waits.share) // _ROWS)
    rows = _pool(waits.share, together)
    with _style(key):
        figure, axes = _figure(2.9)
        _image(axes, rows, waits.tokens, 0, MOST_WAIT, _wait_colors())
        if len(rows) <= 16:
            for edge in range(1, len(rows)):
                axes.axhline(edge, color=_HEX["muted"], linewidth=0.3)
        step = -(-len(rows) // 16)
        axes.set_yticks(
            np.arange(0, len(rows), step) + 0.5,
            [str(row * together) for row in range(0, len(rows), step)],
        )
        axes.tick_params(axis="y", length=0)
        _label(axes, "rank")
        _tokens_axis(axes, waits.tokens[-1])
        return _svg(figure)


def _image(
    axes: "Axes", rows: NDArray[np.float64], tokens: NDArray[np.float64], low: float, high: float, colors: Any
) -> None:
    """Rows from top to bottom; columns end at `tokens` and are drawn even in tokens, whatever the records are."""
    columns = min(len(tokens), max(40, _CELLS // len(rows)))
    at = (np.arange(columns) + 0.5) * tokens[-1] / columns
    axes.imshow(
        rows[:, np.searchsorted(tokens, at)],
        cmap=colors,
        vmin=low,
        vmax=high,
        aspect="auto",
        interpolation="none",
        extent=(0, tokens[-1], len(rows), 0),
    )
    axes.grid(visible=False)


def _ramp(place: float) -> str:
    """A colour between blue and yellow that is seen on white and on black."""
    stops = np.array([(66, 92, 196), (20, 140, 170), (30, 160, 110), (200, 150, 10)], dtype=float)
    mixed = [np.interp(place * (len(stops) - 1), range(len(stops)), channel) for channel in stops.T]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _drawing(curve: Curve, points: int) -> dict[str, Any]:
    color = _HEX[f"c{curve.color % len(LIGHT)}"] if curve.shade is None else _ramp(curve.shade)
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


def _pool(rows: NDArray[np.float64], together: int) -> NDArray[np.float64]:
    """Of every `together` neighbouring rows the value that is farthest from 0; NaN where any is."""
    if together <= 1:
        return rows
    groups = np.split(rows, range(together, len(rows), together))
    return np.stack([np.take_along_axis(g, np.abs(g).argmax(0)[None], axis=0)[0] for g in groups])


def _load_colors() -> Any:
    """From UNDER over nothing (balance is the page's own colour) to OVER, in 33 shades; grey where nothing is known."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    under, over = to_rgb(UNDER), to_rgb(OVER)
    stops = [(0.0, (*under, 1.0)), (0.5, (*under, 0.0)), (0.5, (*over, 0.0)), (1.0, (*over, 1.0))]
    return LinearSegmentedColormap.from_list("load", stops, N=33).with_extremes(bad=_UNKNOWN)


def _wait_colors() -> Any:
    """From nothing to OVER, in 26 shades; grey where there was no such rank."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    over = to_rgb(OVER)
    stops = [(*over, 0.0), (*over, 1.0)]
    return LinearSegmentedColormap.from_list("wait", stops, N=26).with_extremes(bad=_UNKNOWN)


@contextmanager
def _style(key: str) -> Iterator[None]:
    """matplotlib as these charts want it, whatever the user's settings are."""
    import matplotlib

    ink, muted, grid = (_HEX[role] for role in ("ink", "muted", "grid"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",  # text stays text
                "svg.hashsalt": key,  # names of clip paths differ between the charts of a page
                "text.parse_math": False,
                "font.size": 9,
                "text.color": ink,
                "axes.labelcolor": muted,
                "axes.edgecolor": muted,
                "axes.linewidth": 0.7,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.facecolor": "none",
                "axes.formatter.useoffset": False,
                "grid.color": grid,
                "grid.linewidth": 0.6,
                "xtick.color": muted,
                "ytick.color": muted,
                "xtick.labelcolor": ink,
                "ytick.labelcolor": ink,
                "lines.solid_capstyle": "round",
                "path.simplify_threshold": 0.2,
            }
        )
        yield


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(WIDTH, height), facecolor="none"
    )  # layout engines measure all text: twice the time
    figure.subplots_adjust(
        left=_LEFT / WIDTH, right=1 - _RIGHT / WIDTH, bottom=0.5 / height, top=1 - 0.1 / height
    )
    return figure, figure.add_subplot()


def _label(axes: "Axes", unit: str) -> None:
    axes.set_ylabel(unit)
    axes.yaxis.set_label_coords((0.13 - _LEFT) / (WIDTH - _LEFT - _RIGHT), 0.5)


def _tokens_axis(axes: "Axes", last: float) -> None:
    axes.set_xlim(0, last or 1)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(_prefixes())
    axes.xaxis.set_major_locator(_ticks())


def _ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])


def _prefixes() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _svg(figure: "Figure") -> str:
    """The drawing without a prologue and with variables for colours; as wide as the page gives it."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'^<svg[^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text)
    text = re.sub(
        r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL
    )  # the style would hold for the whole page
    text = text.replace("xlink:href", "href")
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every chart
    text = re.sub(r"(\.\d\d)\d+(?=[ \n\"])", r"\1", text)
    text = re.sub(r"#(?:0[1-3]){3}|#0f0f0\d", lambda found: _role(found.group()), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _role(color: str) -> str:
    return f"var(--{_ROLES[color]})" if color in _ROLES else color
