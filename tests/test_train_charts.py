"""Charts: what is drawn, that it is bounded, and that it takes the page's colours."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from moesaic.train.charts import (
    Curve,
    LoadMap,
    Series,
    line_chart,
    load_chart,
    smooth,
    thin,
)
from moesaic.train.rank_charts import RankMap, rows_chart, stack_chart, wait_chart

DATA = re.compile(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)\"")


def series(*values: float) -> Series:
    return Series(np.linspace(1000.0, 1000.0 * len(values), len(values)), np.array(values, dtype=float))


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]


def image(svg: str) -> np.ndarray:
    """The pixels of a load map, from 0 to 1."""
    from matplotlib.image import imread

    (found,) = DATA.findall(svg)
    return imread(io.BytesIO(base64.b64decode(found)), format="png")


def test_smoothing_is_a_mean_of_neighbours_and_shorter_at_the_ends():
    smoothed = smooth(series(1, 2, np.nan, 3, 10), window=3)
    assert smoothed.values.tolist() == [1.5, 2, 5, 6.5]
    assert smoothed.tokens.tolist() == [1000, 2000, 4000, 5000]
    line = series(*range(50))
    assert smooth(line, window=9).values[4:-4] == pytest.approx(line.values[4:-4])
    assert len(smooth(series(), window=5).values) == 0


def test_thinning_keeps_the_extremes_and_the_order():
    values = np.sin(np.arange(10_000.0))
    values[1234], values[8765] = 7, -7
    thinned = thin(series(*values), 100)
    assert len(thinned.values) <= 100
    assert (thinned.values.max(), thinned.values.min()) == (7, -7)
    assert (np.diff(thinned.tokens) > 0).all()
    short = series(1, np.nan, 2)
    assert thin(short, 100).values.tolist() == [1, 2]


def test_a_chart_is_well_formed_and_takes_the_colours_of_the_page():
    curves = [Curve(series=series(3, 2, 1), color=0), Curve(series=series(4, 3, 2), color=7, look="dots")]
    svg = line_chart(curves, key="loss", unit="nats & <per> $token$")
    shown = texts(svg)
    assert "nats & <per> $token$" in shown
    assert "tokens" in shown
    for role in ("ink", "muted", "grid", "c0", "c1"):
        assert f"var(--{role})" in svg
    assert "#0" not in svg.replace("#000", "")  # no colour that stands for a role is left
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg)
    assert curves[1].dash == 1
    assert curves[1].css == "var(--c1)"


def test_charts_of_a_page_share_no_names():
    curve = Curve(series=series(1, 2, 3))
    names = [set(re.findall(r'id="([^"]+)"', line_chart([curve], key=key, unit="x"))) for key in ("a", "b")]
    assert names[0]
    assert names[0].isdisjoint(names[1])
    assert line_chart([curve], key="a", unit="x") == line_chart([curve], key="a", unit="x")


def test_a_single_point_a_constant_and_zeros_can_be_drawn():
    for values in ((1.0,), (2.0, 2.0), (0.0, 0.0), (1e-9, 1e12)):
        ElementTree.fromstring(line_chart([Curve(series=series(*values))], key="x", unit="u", from_zero=True))


def test_a_long_run_with_many_layers_stays_small():
    values = np.random.default_rng(0).normal(size=20_000)
    curves = [Curve(series=series(*values), shade=index / 39) for index in range(40)]
    assert len(line_chart(curves, key="x", unit="u")) < 600_000
    loads = LoadMap(
        np.linspace(1e6, 3e8, 300),
        {layer: np.random.default_rng(layer).gamma(5, 0.2, (256, 300)) for layer in range(48)},
    )
    assert len(load_chart(loads, key="x")) < 800_000


def test_balance_has_no_colour_and_imbalance_has_one_of_two():
    load = np.ones((3, 4))
    load[1], load[2] = 0.0, 8.0
    pixels = image(load_chart(LoadMap(np.array([1.0, 2, 3, 4]), {0: load}), key="x"))
    balanced, under, over = pixels[0, 0], pixels[len(pixels) // 2, 0], pixels[-1, 0]
    assert balanced[3] < 0.05
    assert under[3] == over[3] == 1
    assert under[2] > under[0]  # blue
    assert over[0] > over[2]  # orange


def test_columns_stand_at_their_tokens():
    """Records that lie close together take as much room as the tokens between them."""
    load = np.array([[4.0, 1, 1, 1, 1]])
    pixels = image(load_chart(LoadMap(np.array([80.0, 85, 90, 95, 100]), {0: load}), key="x"))
    assert (pixels[0, :, 3] > 0.5).mean() == pytest.approx(0.8, abs=0.05)


def test_experts_that_share_a_row_show_the_one_farthest_from_balance():
    load = np.ones((2000, 3))
    load[1001] = 4.0
    pixels = image(load_chart(LoadMap(np.array([1.0, 2, 3]), {0: load}), key="x"))
    assert len(pixels) < 1000
    assert (pixels[:, 0, 3] == 1).sum() == 1


def test_waiting_has_more_colour_the_longer_it_is_and_unknown_ranks_are_grey():
    share = np.array([[0.0, 0.0], [0.25, 0.25], [0.5, 0.9], [np.nan, 0.0]])
    svg = wait_chart(RankMap(np.array([100.0, 200.0]), share), key="x")
    assert [text for text in texts(svg) if text.isdecimal() and len(text) == 1][-4:] == ["0", "1", "2", "3"]
    pixels = image(svg)
    none, quarter, half, unknown = pixels[:, 0]
    assert none[3] < 0.05
    assert quarter[3] == pytest.approx(0.5, abs=0.05)
    assert half[3] == 1
    assert half[0] > half[2]  # orange
    assert unknown[0] == unknown[1] == unknown[2]
    assert pixels[2, -1].tolist() == half.tolist()  # beyond the scale


def test_ranks_that_share_a_row_show_the_one_that_waited_longest():
    share = np.zeros((2000, 2))
    share[1001] = 0.5
    svg = wait_chart(RankMap(np.array([1.0, 2.0]), share), key="x")
    pixels = image(svg)
    assert len(pixels) < 1000
    assert (pixels[:, 0, 3] == 1).sum() == 1
    assert len(svg) < 100_000


def test_rows_of_ranks_have_one_scale() -> None:
    """From half of the mean to twice the mean, whatever the run; the end colour goes no further."""
    rows = RankMap(np.array([100.0, 200.0]), np.array([[2.0, 1.0], [0.5, 8.0]]))
    pixels = image(rows_chart(rows, key="r"))
    alpha = pixels[..., 3]
    height, width = alpha.shape
    top, bottom = alpha[height // 4], alpha[3 * height // 4]
    assert top[width // 4] == bottom[width // 4] == bottom[3 * width // 4] == 1
    assert top[3 * width // 4] < 0.05
    assert pixels[height // 4, width // 4].tolist() != pixels[3 * height // 4, width // 4].tolist()


def test_a_stack_ends_at_the_sum() -> None:
    curves = [Curve(series=series(*[value] * 900), color=color) for color, value in enumerate((3e6, 1e6))]
    svg = stack_chart(curves, key="s", unit="bytes")
    assert {"0", "4M", "bytes"} <= set(texts(svg))
    assert len(svg) < 60_000
    assert "var(--c0)" in svg
    assert "var(--c1)" in svg
    assert "<svg" in stack_chart([Curve(series=series(5))], key="one", unit="bytes")
