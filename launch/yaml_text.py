"""YAML in and out: scalars as in YAML 1.2, duplicate keys refused, every error with its file and line.

Knows nothing of runs: it turns text into plain mappings, lists and scalars, and back.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config or an override that cannot be used. Names the file or field, the value and the remedy."""


WORD = 1 << 63
"""Whole numbers are below it."""

# YAML 1.2's core schema. PyYAML follows 1.1, where `1e-3` is a string, `no` is false, `1:30` is 90 and `010` is 8.
_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]


class _Loader(yaml.SafeLoader):
    yaml_constructors = {}  # noqa: RUF012  (likewise: dates and sets have no place here)
    yaml_implicit_resolvers = {}  # noqa: RUF012  (the parent's attribute, replaced so that its YAML 1.1 rules are gone)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        return super().construct_object(node, deep=True)  # deep: a node that contains itself is an error here

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or mapping", key.start_mark
                )
            key.tag = "tag:yaml.org,2002:str"  # `0:` and `true:` are names too
            line = key.start_mark.line + 1
            if key.value in first:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key.value!r} is given twice, first on line {first[key.value]}",
                    key.start_mark,
                )
            first[key.value] = line
        return super().construct_mapping(node, deep=deep)

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        self._expect(node)
        text = self.construct_scalar(node).lower()
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) < 99 else WORD
        if not -WORD <= number < WORD:
            raise yaml.constructor.ConstructorError(
                None, None, f"{_short(text)} does not fit in 64 bits", node.start_mark
            )
        return number

    def construct_core_float(self, node: yaml.ScalarNode) -> float:
        self._expect(node)
        return super().construct_yaml_float(node)

    def construct_core_bool(self, node: yaml.ScalarNode) -> bool:
        self._expect(node)
        return super().construct_yaml_bool(node)

    def _expect(self, node: yaml.ScalarNode) -> None:
        """A tag that is written out, as in `!!int x`, promises what the text may not be."""
        if not _RULES[node.tag].match(node.value):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{_short(repr(node.value))} is no {kind}", node.start_mark
            )

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(
            node
        )  # a key merged twice is there twice, and doubles with every level of merging
        names = [key.value if isinstance(key, yaml.ScalarNode) else id(key) for key, _ in node.value]
        node.value = list(dict(zip(names, node.value, strict=True)).values())


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_RULES = {tag: re.compile(f"^(?:{pattern})$") for tag, pattern, _ in _SCALARS}
for _tag, _, _starts in _SCALARS:
    _rule = _RULES[_tag]
    _Loader.add_implicit_resolver(_tag, _rule, list(_starts))
    _Dumper.add_implicit_resolver(
        _tag, _rule, list(_starts)
    )  # beside YAML 1.1's: quote what either would misread
for _tag, _construct in {
    "null": _Loader.construct_yaml_null,
    "bool": _Loader.construct_core_bool,
    "int": _Loader.construct_core_int,
    "float": _Loader.construct_core_float,
    "str": _Loader.construct_yaml_str,
    "seq": _Loader.construct_yaml_seq,
    "map": _Loader.construct_yaml_map,
}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
_Loader.add_constructor(None, _Loader.construct_undefined)  # pyright: ignore[reportArgumentType]
_Dumper.add_representer(str, _Dumper.represent_text)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. ConfigError, with the line, where it is not one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a config is a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    value = _load(text, str(path))
    if value is None:
        raise ConfigError(f"{path}: the file is empty; it needs at least `extends:` or the keys of a run")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds {describe(value)}, not keys and values (`key: value` on each line)")
    return value


def parse_value(text: str, where: str) -> Any:
    """A YAML value given on the command line; `where` names it in errors."""
    return _load(text, where, lines=False)


def dump(value: dict[str, Any]) -> str:
    """YAML text that `read_mapping` reads back to an equal mapping, in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def describe(value: object) -> str:
    """A value as an error message shows it: what it is, and shortly what is in it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict):
        return "a mapping with " + _short(", ".join(map(quoted, value))) if value else "an empty mapping"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else _short(repr(_pruned(value)))
    return f"the list {text}" if isinstance(value, list) else text


def quoted(text: object) -> str:
    """A key or a file as it is; in quotes where it has characters that would break a message into lines."""
    plain = str(text)
    return _short(plain if plain.isprintable() else ascii(plain))


def _pruned(value: Any, depth: int = 4) -> Any:
    """The beginning of a value: with aliases of lists of aliases, writing it out in full could take for ever."""
    if not isinstance(value, dict | list):
        return value[:99] if isinstance(value, str) else value
    if not depth:
        return ...
    if isinstance(value, list):
        return [_pruned(inner, depth - 1) for inner in value[:9]]
    return {key[:99]: _pruned(inner, depth - 1) for key, inner in itertools.islice(value.items(), 9)}


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _load(text: str, where: str, *, lines: bool = True) -> Any:
    where = where if lines else quoted(where)
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds nothing but plain values
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{where}: the character {chr(error.character)!r} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark and lines else ""
        raise ConfigError(f"{where}{position}: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
