"""Numbers as people read them, at every edge between two units."""

import pytest

from moesaic.train.units import count, duration, flops, size, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.6, "1.00k"),
        (1000, "1.00k"),
        (9994, "9.99k"),
        (9996, "10.0k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (12_345_678, "12.3M"),
        (2.5e9, "2.50G"),
        (3e12, "3.00T"),
        (4e19, "40.0E"),
    ],
)
def test_count(value: float, text: str):
    assert count(value) == text


def test_flops_put_the_prefix_before_the_unit():
    assert [flops(value) for value in (12, 9.8e6, 2.89e14)] == ["12 FLOP", "9.80 MFLOP", "289 TFLOP"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1_288_490_189, "1.20 GiB"),
        (2**20 - 1, "1.00 MiB"),
        (180 << 20, "180 MiB"),
        (3 << 40, "3.00 TiB"),
    ],
)
def test_size(value: int, text: str):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (95, "1m 35s"),
        (3599.6, "1h 00m"),
        (7260, "2h 01m"),
        (86_400, "1d 00h"),
        (180_000, "2d 02h"),
    ],
)
def test_duration(value: float, text: str):
    assert duration(value) == text


def test_visible_disarms_control_characters_only():
    assert visible("a\x1b[31m\x07\r\x9b\u202e") == "a\\x1b[31m\\x07\\r\\x9b\\u202e"
    assert (
        visible("def f():\n\treturn 'caf\u00e9 \\ \u4f60\ufffd'")
        == "def f():\n\treturn 'caf\u00e9 \\ \u4f60\ufffd'"
    )
