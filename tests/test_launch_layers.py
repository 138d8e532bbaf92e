from pathlib import Path

import pytest

from moesaic.launch import layers
from moesaic.launch.layers import find_config, merge, read_layers, read_overrides, shipped_names, suggestion
from moesaic.launch.yaml_text import ConfigError


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped configs, and an empty current folder."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "small.yaml").write_text("size: {a: 1, b: 2}\nname: small\n")
    (folder / "other.yaml").write_text("extends: small\nname: other\n")
    monkeypatch.setattr(layers, "SHIPPED", folder)
    current = tmp_path / "current"
    current.mkdir()
    monkeypatch.chdir(current)
    return folder


def test_merge_is_per_key_and_leaves_its_inputs_alone():
    below, above = {"a": {"x": 1, "y": [1, 2]}, "b": 1}, {"a": {"y": [3]}, "c": None}
    assert merge(below, above, "") == {"a": {"x": 1, "y": [3]}, "b": 1, "c": None}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert above == {"a": {"y": [3]}, "c": None}


def test_another_kind_replaces():
    below = {"ffn": {"kind": "moe", "experts": 4, "hidden": 8}}
    assert merge(below, {"ffn": {"kind": "dense", "hidden": 16}}, "") == {
        "ffn": {"kind": "dense", "hidden": 16}
    }
    assert merge(below, {"ffn": {"kind": "moe", "hidden": 16}}, "")["ffn"]["experts"] == 4
    assert merge(below, {"ffn": {"hidden": 16}}, "")["ffn"] == {"kind": "moe", "experts": 4, "hidden": 16}


def test_a_number_changes_one_item_of_a_list():
    below = {"aux": [{"kind": "a", "coef": 1}, {"kind": "b", "coef": 2}]}
    above = {"aux": {"1": {"coef": 3}}}
    assert merge(below, above, "") == {"aux": [{"kind": "a", "coef": 1}, {"kind": "b", "coef": 3}]}
    assert below["aux"][1]["coef"] == 2
    with pytest.raises(ConfigError, match=r"^aux\.2: no such item; the list has 2, counted from 0$"):
        merge(below, {"aux": {"2": {"coef": 3}}}, "")
    assert merge(below, {"aux": {"kind": "c"}}, "") == {"aux": {"kind": "c"}}


def test_overrides_form_one_layer():
    texts = ["a.b=1", "a.c=x=y", "d=[1, {e: 2}]", "a.b=1e-3", "d.1.e=5", "f="]
    assert read_overrides(texts) == {"a": {"b": 0.001, "c": "x=y"}, "d": [1, {"e": 5}], "f": None}


def test_the_order_of_kind_does_not_matter(shipped: Path):
    Path("run.yaml").write_text("ffn: {kind: moe, experts: 4}\n")
    expected = {"ffn": {"kind": "dense", "hidden": 16}}
    assert read_layers("run.yaml", ["ffn.kind=dense", "ffn.hidden=16"]) == expected
    assert read_layers("run.yaml", ["ffn.hidden=16", "ffn.kind=dense"]) == expected


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_no_override(text: str):
    with pytest.raises(ConfigError) as raised:
        read_overrides([text])
    assert str(raised.value) == f"{text!r}: not an override; write a.b=value, such as train.steps=100"


def test_value_of_an_override_that_is_no_yaml():
    with pytest.raises(ConfigError, match=r"^a=\[1: .*expected ',' or ']'"):
        read_overrides(["a=[1"])


def test_extends_a_file_beside_it(shipped: Path):
    folder = Path("sub")
    folder.mkdir()
    (folder / "base.yaml").write_text("a: {x: 1, y: 2}\nb: 3\n")
    (folder / "small").write_text("a: 5\n")
    (folder / "run.yaml").write_text("extends: base.yaml\na: {y: 4}\n")
    assert read_layers("sub/run.yaml", ["a.x=9"]) == {"a": {"x": 9, "y": 4}, "b": 3}
    (folder / "run.yaml").write_text("extends: small\n")  # a file beside it comes before a shipped name
    assert read_layers("sub/run.yaml") == {"a": 5}


def test_extends_a_shipped_name(shipped: Path):
    Path("run.yaml").write_text("extends: other\nsize: {b: 7}\n")
    assert read_layers("run.yaml") == {"size": {"a": 1, "b": 7}, "name": "other"}
    assert read_layers("other.yaml")["name"] == "other"


def test_circles_are_refused(shipped: Path):
    Path("a.yaml").write_text("extends: b.yaml\n")
    Path("b.yaml").write_text("extends: ./a.yaml\n")
    with pytest.raises(
        ConfigError, match=r"^extends: goes in a circle: .*a\.yaml -> .*b\.yaml -> .*a\.yaml$"
    ):
        read_layers("a.yaml")


@pytest.mark.parametrize("value", ["[a, b]", "3", "", "''"])
def test_extends_names_one_config(shipped: Path, value: str):
    Path("run.yaml").write_text(f"extends: {value}\na: 1\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: extends: .* is not the path or name of one config"):
        read_layers("run.yaml")


def test_extends_something_missing(shipped: Path):
    Path("run.yaml").write_text("extends: smal\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: extends: smal: no such file; did you mean 'small'\?$"):
        read_layers("run.yaml")


def test_finding_a_config(shipped: Path):
    assert find_config("small") == shipped / "small.yaml"
    Path("small").mkdir()  # such as a run's folder of that name
    assert find_config("small") == shipped / "small.yaml"
    Path("small.yaml").write_text("a: 1\n")
    assert find_config("small.yaml") == Path("small.yaml")
    with pytest.raises(ConfigError, match=r"^nothing: no such file; shipped configs: other, small$"):
        find_config("nothing")
    Path("runs/x").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^runs/x: is a folder, not a config file$"):
        find_config("runs/x")
    Path("runs/x/config.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"^runs/x: is a run's folder; its config is runs/x/config\.yaml$"):
        find_config("runs/x")


@pytest.mark.parametrize("name", ["~nobody-at-all/x", "x" * 300, "a\0b", "\ud800"])
def test_what_cannot_be_a_file(shipped: Path, name: str):
    with pytest.raises(ConfigError):
        find_config(name)


def test_keys_that_would_break_a_line_are_quoted(shipped: Path):
    with pytest.raises(ConfigError) as raised:
        read_overrides(["a\nb=[1"])
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="not an override"):
        read_overrides(["a." * 60 + "b=1"])


def test_the_package_ships_the_configs_of_the_readme():
    assert {"debug", "quickstart"} <= set(shipped_names())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("topk", "; did you mean 'k'?"),
        ("warmups", "; did you mean 'warmup'?"),
        ("num_warmup", "; did you mean 'warmup'?"),
        ("zzz", "; fields: k, warmup, steps"),
        ("rank_of_block", "; fields: k, warmup, steps"),
    ],
)
def test_suggestion(name: str, expected: str):
    assert suggestion(name, ["k", "warmup", "steps"], "fields") == expected
    assert suggestion(name, [], "fields") == ""
