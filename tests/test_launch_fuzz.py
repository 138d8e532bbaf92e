"""Whatever a config holds, `moesaic train` either begins to prepare data or says in one line which field is wrong.

Shipped configs are changed at random: keys dropped, renamed and nested, values of other types, absurd numbers, other
kinds, odd strings, odd overrides, broken YAML. They go the whole way that `moesaic train` goes before it reads data.
"""

import copy
import dataclasses
import os
import resource
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesaic.launch.build import build, plain
from moesaic.launch.config import read_run
from moesaic.launch.layers import read_layers, shipped_names
from moesaic.train import session
from moesaic.train.config import RunConfig

Path_ = tuple[str | int, ...]

Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C, where there is one
SECTIONS = [field.name for field in dataclasses.fields(RunConfig)]
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    999,
    4096,
    65536,
    10**6,
    2**31 - 1,
    2**31,
    2**40,
    2**62,
    2**63,
    10**30,
    -(2**63),
]
NUMBERS += [-value for value in NUMBERS[1:8]]
FLOATS = [0.0, -0.0, 0.5, 1.0, 1e-3, 1e-320, 1e308, -1.5, float("nan"), float("inf"), float("-inf"), 1e19]
STRINGS = [
    "",
    " ",
    "0",
    "1e3",
    "true",
    "null",
    "~",
    "dense",
    "moe",
    "topk",
    "bpe",
    "bytes",
    "text",
    "auto",
    "*",
    "[a",
    "[",
]
STRINGS += [
    "a/b",
    "..",
    "~nobody/x",
    "x" * 5000,
    "a\nb",
    "\x1b[2J",
    "\0",
    "\u202e",
    "0-1",
    "0-",
    "-1",
    "\u0663",
    "9" * 99,
    "*norm*",
]
KEYS = [
    "kind",
    "dim",
    "hidden",
    "k",
    "lr",
    "extends",
    "<<",
    "",
    "a.b",
    "a\nb",
    "steps ",
    "x" * 300,
    "0",
    "-1",
    "9" * 30,
    "\u00e9",
]
KINDS = [
    "moe",
    "dense",
    "topk",
    "adamw",
    "muon",
    "cosine",
    "wsd",
    "bpe",
    "bytes",
    "file",
    "text",
    "jsonl",
    "python",
    "z",
    "balance",
]
VALUES = [
    "1",
    "1e3",
    "1_000",
    "0x10",
    "0o17",
    "010",
    ".5",
    "+1",
    ".nan",
    "-.inf",
    "yes",
    "[",
    "{a: 1",
    "[1, [2, [3]]]",
    "{}",
    "[]",
]
VALUES += [
    "&a [*a]",
    "*a",
    "!!python/object:os.system x",
    "!x 1",
    "9" * 5000,
    "0x" + "f" * 999,
    "\t",
    "'",
    "a: b",
    "- 1",
    "# c",
    "|",
    "a=b",
    "?",
]
TEXTS = [
    "\n",
    "\t",
    ":",
    "- ",
    "{",
    "]",
    "&a ",
    "*a",
    "'",
    "#",
    "\x00",
    "\x85",
    "!!int ",
    "? ",
    "<<: ",
    "---\n",
    "%YAML 1.2\n",
]

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from(FLOATS),
    st.sampled_from(STRINGS),
    st.integers(),
    st.floats(allow_subnormal=False),
    st.text(max_size=8),
)
nonsense = st.one_of(
    leaves,
    st.lists(leaves, max_size=3),
    st.dictionaries(st.sampled_from(KEYS), leaves, max_size=3),
    st.integers(1, 60).map(lambda depth: [0] if depth == 1 else _nested(depth)),
)


def _nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"kind": value}
    return value


def _base(name: str) -> dict[str, Any]:
    """A shipped config; two layers are as good as 28 here."""
    overrides = ["model.layers=2"] if name.startswith("moe_") else []
    return read_layers(name, overrides)


BASES = [_base(name) for name in shipped_names()]


def _places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of everything within a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from _places(inner, (*path, key))


PLACES = sorted({".".join(map(str, path)) for base in BASES for path in _places(base)})


def _change(draw: st.DrawFn, config: dict[str, Any]) -> None:
    """One change, in place."""
    places: list[Any] = list(_places(config))
    if not places:
        return
    path = draw(st.sampled_from(places))
    above: Any = path[:-1]
    parent: Any = config
    last: Any = path[-1]
    for key in above:
        parent = parent[key]
    match draw(
        st.sampled_from(["number", "float", "value", "value", "drop", "rename", "kind", "add", "repeat"])
    ):
        case "number":
            parent[last] = draw(st.sampled_from(NUMBERS))
        case "float":
            parent[last] = draw(st.sampled_from(FLOATS))
        case "value":
            parent[last] = draw(nonsense)
        case "drop":
            del parent[last]
        case "rename" if isinstance(parent, dict):
            parent[draw(st.sampled_from(KEYS)) if draw(st.booleans()) else f"{last}s"] = parent.pop(last)
        case "kind" if isinstance(parent, dict):
            parent["kind"] = draw(st.sampled_from(KINDS))
        case "repeat" if isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[last]) for _ in range(3))
        case _ if isinstance(parent[last], dict):
            parent[last][draw(st.sampled_from(KEYS))] = draw(nonsense)
        case _:
            parent[last] = [parent[last]]


@st.composite
def overrides(draw: st.DrawFn) -> str:
    """An argument `a.b=value`, more or less."""
    key = draw(
        st.one_of(
            st.sampled_from(PLACES), st.sampled_from(PLACES), st.sampled_from(KEYS), st.just("a." * 999 + "b")
        )
    )
    if draw(st.integers(0, 5)) == 0:
        key += draw(st.sampled_from([".", "..a", ".0", ".kind", " ", ".9999999999", "\n"]))
    value = draw(
        st.one_of(
            st.sampled_from(VALUES),
            st.sampled_from(NUMBERS).map(str),
            st.sampled_from(STRINGS),
            st.text(max_size=6),
        )
    )
    return f"{key}={value}" if draw(st.integers(0, 20)) else key + value


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The text of a config file, and overrides."""
    config = copy.deepcopy(draw(st.sampled_from(BASES)))
    for _ in range(draw(st.integers(0, 3))):
        _change(draw, config)
    text = yaml.dump(config, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if draw(st.integers(0, 9)) == 0:  # broken text
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(TEXTS)) + text[place + draw(st.integers(0, 3)) :]
    return text, draw(st.lists(overrides(), max_size=2))


class _Reached(Exception):  # noqa: N818  (no error: the run is fine)
    """All checks are passed: now data would be prepared."""


def check(text: str, arguments: list[str], folder: Path) -> None:
    """Raise AssertionError where a config is neither accepted nor refused as it should be."""
    (folder / "run.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        run = read_run("run.yaml", arguments)
        with pytest.raises(_Reached):
            session.train(run, "", resume=False, profile=False, command=[])
    except ValueError as error:  # what the command line turns into one line
        message = str(error)
    else:
        assert build(RunConfig, plain(run)) == run
        return
    assert len(message) < 1000, message
    assert len(message.splitlines()) == 1, ascii(message)
    assert message.isprintable(), ascii(message)
    place, colon, _ = message.partition(":")
    first = place.partition(".")[0]
    known = (
        place == str(folder / "run.yaml") or first in SECTIONS or first[:70] in " ".join([text, *arguments])
    )
    assert colon, message
    assert known or message[0] in "'\"", message  # quotes: a key or an argument that is not printable


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder; training ends where data would be prepared."""

    def prepare(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(session, "prepare", prepare)
    monkeypatch.setattr(session, "tune_host", lambda: None)
    monkeypatch.setattr(session, "Display", lambda **kwargs: nullcontext(_Display()))
    return tmp_path


class _Display:
    preparing = None


OPTIONS: dict[str, Any] = {
    "database": None,
    "deadline": 20000,  # milliseconds: an example takes 10 where the machine is not busy
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=300, derandomize=True, **OPTIONS)
@given(case=cases())
def test_a_changed_config_is_accepted_or_refused_by_name(folder: Path, case: tuple[str, list[str]]):
    check(*case, folder)
    assert _peak() < 2 << 30


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")), **OPTIONS)
@given(case=cases())
def test_many_more(folder: Path, case: tuple[str, list[str]]):
    check(*case, folder)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_shipped_configs_are_accepted(folder: Path):
    for name in shipped_names():
        run = read_run(name)
        with pytest.raises(_Reached):
            session.train(run, "", resume=False, profile=False, command=[])
