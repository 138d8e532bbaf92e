"""How charts of a page are drawn: matplotlib in the page's colours, axes over tokens, maps of rows, and SVG text out.

Colours that stand for roles (`_ROLES`) become CSS variables (`var(--ink)`), so one drawing serves a light and a dark
page. matplotlib is imported when the first chart is drawn.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIGHT = ("#0072b2", "#d55e00", "#00835f", "#b4508a", "#a87400", "#5b5bd6")
DARK = ("#56b4e9", "#ff8a47", "#2fc79b", "#e79fc6", "#f0c04a", "#a3a3ff")
"""Colours of curves on either background: hues of Okabe and Ito, which the colour-blind can tell apart."""
UNDER, OVER = "#1273c4", "#e05a00"
"""Ends of the scale of a map of loads: far below the mean, far above it."""
WIDTH = 5.4
"""Inches of 72 units: wide enough for labels, narrow enough to be read on a phone."""
_LEFT, _RIGHT = 0.76, 0.16  # margins in inches
_CELLS = 240_000  # of one map
MOST_ROWS = 960
"""Rows of one map: more experts or ranks share rows."""
_UNKNOWN = (0.5, 0.5, 0.5, 0.35)

_ROLES = {"#010101": "ink", "#020202": "muted", "#030303": "grid"} | {
    f"#0f0f{index:02x}": f"c{index}" for index in range(len(LIGHT))
}
HEX = {role: color for color, role in _ROLES.items()}


@contextmanager
def style(key: str) -> Iterator[None]:
    """matplotlib as these charts want it, whatever the user's settings are."""
    import matplotlib

    ink, muted, grid = (HEX[role] for role in ("ink", "muted", "grid"))
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


def new_figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(WIDTH, height), facecolor="none"
    )  # layout engines measure all text: twice the time
    figure.subplots_adjust(
        left=_LEFT / WIDTH, right=1 - _RIGHT / WIDTH, bottom=0.5 / height, top=1 - 0.1 / height
    )
    return figure, figure.add_subplot()


def label(axes: "Axes", unit: str) -> None:
    axes.set_ylabel(unit)
    axes.yaxis.set_label_coords((0.13 - _LEFT) / (WIDTH - _LEFT - _RIGHT), 0.5)


def tokens_axis(axes: "Axes", last: float) -> None:
    axes.set_xlim(0, last or 1)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(prefixes())
    axes.xaxis.set_major_locator(ticks())


def ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10])


def prefixes() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def to_svg(figure: "Figure") -> str:
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


def draw_map(
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


def pool(rows: NDArray[np.float64], together: int) -> NDArray[np.float64]:
    """Of every `together` neighbouring rows the value that is farthest from 0; NaN where any is."""
    if together <= 1:
        return rows
    groups = np.split(rows, range(together, len(rows), together))
    return np.stack([np.take_along_axis(g, np.abs(g).argmax(0)[None], axis=0)[0] for g in groups])


def under_over() -> Any:
    """From UNDER over nothing (balance is the page's own colour) to OVER, in 33 shades; grey where nothing is known."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    under, over = to_rgb(UNDER), to_rgb(OVER)
    stops = [(0.0, (*under, 1.0)), (0.5, (*under, 0.0)), (0.5, (*over, 0.0)), (1.0, (*over, 1.0))]
    return LinearSegmentedColormap.from_list("load", stops, N=33).with_extremes(bad=_UNKNOWN)


def up_to_over() -> Any:
    """From nothing to OVER, in 26 shades; grey where nothing is known."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    over = to_rgb(OVER)
    stops = [(*over, 0.0), (*over, 1.0)]
    return LinearSegmentedColormap.from_list("wait", stops, N=26).with_extremes(bad=_UNKNOWN)
