"""The layers of a config: a file, the files it extends, and the overrides of the command line, merged into one mapping.

Knows nothing of the schema; `moesaic.launch.build` checks what comes out.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import moesaic.configs
from moesaic.launch.yaml_text import ConfigError, describe, parse_value, quoted, read_mapping

DEEPEST = 50
"""Names of an override, and files that extend each other."""
SHIPPED = Path(moesaic.configs.__file__).parent


def shipped_names() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_config(path_or_name: str, *, beside: Path | None = None) -> Path:
    """The file a config is in: a path (relative to `beside`, if given), else the name of a shipped config."""
    if "\0" in path_or_name or len(path_or_name.encode(errors="replace")) > 4000:
        raise ConfigError(f"{quoted(path_or_name)}: cannot be the name of a file")
    try:
        path = (beside or Path()) / Path(path_or_name).expanduser()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a part that is too long; the home of nobody
        raise ConfigError(f"{quoted(path_or_name)}: {getattr(error, 'strerror', None) or error}") from None
    if is_file:
        return path
    if path.is_dir() and (path / "config.yaml").is_file():
        raise ConfigError(f"{path_or_name}: is a run's folder; its config is {path / 'config.yaml'}")
    name = path_or_name.removesuffix(".yaml")
    if name in shipped_names():
        return SHIPPED / f"{name}.yaml"
    if path.is_dir():
        raise ConfigError(f"{path_or_name}: is a folder, not a config file")
    raise ConfigError(f"{path_or_name}: no such file{suggestion(name, shipped_names(), 'shipped configs')}")


def read_layers(path_or_name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One mapping: the file over the files it extends, `a.b=value` overrides over both.

    Mappings merge key by key, everything else replaces. Where a mapping changes `kind` it replaces, since the keys of
    one kind mean nothing to another.
    """
    overlay = read_overrides(overrides)
    return merge(_read_file(find_config(path_or_name), []), overlay, "")


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["a.b=1", "a.c=x"]` as `{"a": {"b": 1, "c": "x"}}`; values are YAML, later ones win."""
    overlay: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            raise ConfigError(f"{describe(text)}: not an override; write a.b=value, such as train.steps=100")
        inner = parse_value(value, f"{key}={value}")
        for part in reversed(parts):
            inner = {part: inner}
        overlay = merge(overlay, inner, "")
    return overlay


def merge(below: Any, above: Any, path: str) -> Any:
    """`above` over `below`. A mapping over a list whose keys are all numbers changes those items of the list."""
    if isinstance(below, list) and _indices(above):
        items = list(below)
        for key, value in above.items():
            if len(key) > 9 or int(key) >= len(items):
                raise ConfigError(
                    f"{path}.{quoted(key)}: no such item; the list has {len(items)}, counted from 0"
                )
            items[int(key)] = merge(items[int(key)], value, f"{path}.{key}")
        return items
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "kind" in below and "kind" in above and below["kind"] != above["kind"]:
        return dict(above)
    merged = dict(below)
    for key, value in above.items():
        inner = f"{path}.{key}" if path else str(key)
        merged[key] = merge(merged[key], value, inner) if key in merged else value
    return merged


def suggestion(name: str, known: Sequence[str], what: str) -> str:
    """`; did you mean 'x'?` where a known name is near, else the list of known names."""
    near = difflib.get_close_matches(name, known, n=1) or [each for each in known if _abbreviates(each, name)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; {what}: {', '.join(known)}" if known else ""


def _abbreviates(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return (len(short) >= 3 or len(long) <= 4) and (long.startswith(short) or long.endswith(short))


def _indices(value: Any) -> bool:
    return (
        isinstance(value, Mapping) and bool(value) and all(key.isascii() and key.isdigit() for key in value)
    )


def _read_file(path: Path, children: list[Path]) -> dict[str, Any]:
    path = path.resolve()
    if len(children) > DEEPEST:
        raise ConfigError(f"extends: more than {DEEPEST} files, each extending the next")
    if path in children:
        circle = " -> ".join(str(each) for each in [*children[children.index(path) :], path])
        raise ConfigError(f"extends: goes in a circle: {circle}")
    mapping = read_mapping(path)
    if "extends" not in mapping:
        return mapping
    parent = mapping.pop("extends")
    if not isinstance(parent, str) or not parent:
        raise ConfigError(f"{path}: extends: {parent!r} is not the path or name of one config")
    try:
        found = find_config(parent, beside=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    return merge(_read_file(found, [*children, path]), mapping, "")
