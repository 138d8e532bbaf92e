import math
from pathlib import Path

import pytest
import yaml

from moesaic.launch.yaml_text import ConfigError, describe, dump, parse_value, read_mapping


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1e-3'", "1e-3"),
        ("[1, a, {b: 2.5}]", [1, "a", {"b": 2.5}]),
        ("{0: x, true: y}", {"0": "x", "true": "y"}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object):
    found = parse_value(text, "key")
    assert found == value
    assert type(found) is type(value)


def test_infinities():
    assert parse_value("-.inf", "x") == -math.inf
    assert math.isnan(parse_value(".nan", "x"))


def test_anchors_and_merge_keys(tmp_path: Path):
    path = write(tmp_path, "a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    assert read_mapping(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", ":5:3", "'c' is given twice, first on line 3"),
        ("1: a\n'1': b\n", ":2:1", "'1' is given twice, first on line 1"),
        ("a: [1, 2\nb: 3\n", ":2:2", "expected ',' or ']'"),
        ("a: b: c\n", ":1:5", "mapping values are not allowed here"),
        ("? [a, b]\n: 1\n", ":1:3", "a key is a list or mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", ":1:4", "could not determine a constructor"),
        ("a: 1\n---\nb: 2\n", ":2:1", "expected a single document"),
        ("a: &x {b: *x}\n", ":1:4", "recursive"),
        ("a: &x [*x]\n", ":1:4", "recursive"),
        ("a: !!int 0.5\n", ":1:4", "'0.5' is no int"),
        ("a: !!bool x\n", ":1:4", "'x' is no bool"),
        ("a: !!timestamp x\n", ":1:4", "could not determine a constructor"),
        ("a: 9223372036854775808\n", ":1:4", "9223372036854775808 does not fit in 64 bits"),
        (f"a: {'9' * 5000}\n", ":1:4", "... does not fit in 64 bits"),
        ("a: *missing\n", ":1:4", "found undefined alias"),
        ("a: \x07\n", "", "is not allowed in YAML"),
        ("", "", "the file is empty"),
        ("# nothing\n", "", "the file is empty"),
        ("- a\n- b\n", "", "holds the list ['a', 'b'], not keys and values"),
        ("a: " + "[" * 600, "", "nested too deeply"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, place: str, problem: str):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_mapping(path)
    assert str(raised.value).startswith(f"{path}{place}: ")
    assert problem in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8 text \(byte 3\)"):
        read_mapping(path)
    with pytest.raises(ConfigError, match="missing: No such file or directory"):
        read_mapping(tmp_path / "missing")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_mapping(tmp_path)


def test_values_of_the_command_line_have_no_lines():
    with pytest.raises(ConfigError) as raised:
        parse_value("{a: 1, a: 2}", "x={a: 1, a: 2}")
    assert str(raised.value) == "x={a: 1, a: 2}: 'a' is given twice, first on line 1"


TREE = {
    "floats": [1e-3, 1e-30, 1.0, 123456789.125, 1e300, -2.5e-7],
    "ints": [0, -1, 2**62],
    "texts": [
        "1e-3",
        "1e5",
        ".5",
        "0o7",
        "010",
        "no",
        "yes",
        "null",
        "~",
        "",
        " ",
        "true",
        "12",
        "1_0",
        "<<",
        "=",
        "-",
    ],
    "lines": [
        "def f():\n    return 1\n",
        "\n",
        "  x\n\n y",
        "a: b",
        "# c",
        "\u00fc\u4e2d",
        "\ttab",
        "quote' \"",
        "x" * 300,
    ],
    "empty": [{}, [], None, True, False],
    "1e5": "a key that looks like a number",
}


def test_aliases_of_aliases_stay_small(tmp_path: Path):
    lists = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 1}]" for i in range(30)]
    merged = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}], x{i}: 1}}" for i in range(1, 30)]
    text = "\n".join([*lists, "m0: &m0 {x0: 1}", *merged])
    found = read_mapping(write(tmp_path, text))
    assert describe(found["l29"]).startswith("the list [[[[Ellipsis, Ellipsis")
    assert len(found["m29"]) == 30


def test_an_override_that_holds_itself_is_refused():
    with pytest.raises(ConfigError, match="recursive"):
        parse_value("&a [*a]", "x=&a [*a]")


def test_dump_reads_back(tmp_path: Path):
    text = dump(TREE)
    assert read_mapping(write(tmp_path, text)) == TREE
    assert list(read_mapping(tmp_path / "run.yaml")) == list(TREE)


def test_other_readers_agree():
    assert yaml.safe_load(dump(TREE)) == TREE


def test_dump_repeats_what_is_shared():
    shared = [1, 2]
    assert "&" not in dump({"a": shared, "b": shared})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing (null)"),
        (True, "true"),
        (3, "3"),
        ("abc", "'abc'"),
        ({"a": 1, "b": 2}, "a mapping with a, b"),
        ({}, "an empty mapping"),
        ([1], "the list [1]"),
        ("x" * 200, "'" + "x" * 76 + "..."),
    ],
)
def test_describe(value: object, text: str):
    assert describe(value) == text
