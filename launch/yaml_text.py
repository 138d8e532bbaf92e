"""YAML in and out: scalars as in YAML 1.2, duplicate keys refused, every error with its file and line.

Knows nothing of runs: it turns text into plain mappings, lists and scalars, and back.
"""

import re
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A config or an override that cannot be used. Names the file or field, the value and the remedy."""


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
    yaml_implicit_resolvers = {}  # noqa: RUF012  (the parent's attribute, replaced so that its YAML 1.1 rules are gone)

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
        return super().construct_mapping(
            node, deep=True
        )  # deep: a node that contains itself is an error here

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).lower()
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if "\n" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _starts in _SCALARS:
    _rule = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(_tag, _rule, list(_starts))
    _Dumper.add_implicit_resolver(
        _tag, _rule, list(_starts)
    )  # beside YAML 1.1's: quote what either would misread
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
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
        return "a mapping with " + ", ".join(map(str, value)) if value else "an empty mapping"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    if len(text) > 80:
        text = text[:77] + "..."
    return f"the list {text}" if isinstance(value, list) else text


def _load(text: str, where: str, *, lines: bool = True) -> Any:
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
