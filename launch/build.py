"""From plain mappings to frozen dataclasses and back.

`build` walks the type hints of a dataclass: nested dataclasses, unions selected by `kind`, optional values, tuples,
string keys, literals. Every error is a ConfigError `path.to.field: problem`. pydantic checks the leaves, strictly: a
string is never a number, a bool is never an int; an int serves as a float.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moesaic.launch.layers import suggestion
from moesaic.launch.yaml_text import ConfigError, describe, quoted

Config = TypeVar("Config")

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


def build(cls: type[Config], mapping: Mapping[str, Any]) -> Config:
    """The dataclass `cls` from plain values, or ConfigError naming the first field that is wrong."""
    return _build(cls, mapping, "")


def plain(value: Any) -> Any:
    """The mappings, lists and scalars from which `build` makes an equal dataclass; `kind` comes first."""
    if dataclasses.is_dataclass(value):
        names = sorted((field.name for field in dataclasses.fields(value)), key=lambda name: name != "kind")
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [plain(inner) for inner in value]
    return value


@cache
def hints(cls: type) -> dict[str, Any]:
    """Type of each field, in the order of the dataclass."""
    resolved = get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def members(hint: Any) -> tuple[Any, ...]:
    """What a union is made of; any other type is its own only member."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_config(hint: Any) -> TypeGuard[type]:
    """Whether a type is a dataclass."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def kinds(cls: type) -> tuple[str, ...]:
    """Values of `kind` that select this dataclass; empty if it has no such field."""
    hint = hints(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not given. Only for fields with a default."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _build(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """`default`: what the field holds if it is not given; a mapping without `kind` means that one's kind."""
    choices = members(hint)
    if value is None and type(None) in choices:
        return None
    configs = [each for each in choices if is_config(each)]
    if configs and isinstance(value, Mapping):
        return _dataclass(_select(configs, value, path, default), value, path)
    if isinstance(value, Mapping):
        for choice in choices:
            if get_origin(choice) is dict:
                return {
                    key: _build(get_args(choice)[1], inner, _join(path, key)) for key, inner in value.items()
                }
    if isinstance(value, list | tuple):
        for choice in choices:
            if get_origin(choice) is tuple:
                return _tuple(get_args(choice), value, path)
    return _leaf(hint, value, path)


def _select(configs: Sequence[type], value: Mapping[str, Any], path: str, default: Any) -> type:
    """The one dataclass of a union that `kind` names."""
    by_kind = {kind: cls for cls in configs for kind in kinds(cls)}
    if len(configs) == 1 and not by_kind:
        return configs[0]
    if "kind" not in value:
        if type(default) in configs:
            return type(default)
        if len(configs) == 1:
            return configs[0]
        raise ConfigError(f"{_join(path, 'kind')}: missing; one of {', '.join(by_kind)}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in by_kind:
        near = suggestion(str(kind), list(by_kind), "kinds")
        raise ConfigError(f"{_join(path, 'kind')}: no such kind {describe(kind)}{near}")
    return by_kind[kind]


def _dataclass(cls: type, value: Mapping[str, Any], path: str) -> Any:
    types_of = hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            raise ConfigError(
                f"{_join(path, key)}: no such field{suggestion(str(key), list(fields), 'fields')}"
            )
    given = {}
    for name, field in fields.items():
        if name in value:
            default = default_of(field) if has_default(field) else None
            given[name] = _build(types_of[name], value[name], _join(path, name), default)
    missing = [name for name, field in fields.items() if name not in given and not has_default(field)]
    if missing:
        also = f" (also {', '.join(missing[1:])})" if len(missing) > 1 else ""
        raise ConfigError(f"{_join(path, missing[0])}: missing{also}; it has no default")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except ValueError as error:
        # A dataclass says `field: problem`, where field may go deeper; anything else is about the dataclass itself.
        named = str(error).partition(":")[0].partition(".")[0] in fields
        separator = "." if named else ": "
        raise ConfigError(f"{path}{separator}{error}" if path else str(error)) from None


def _tuple(inner: tuple[Any, ...], value: Sequence[Any], path: str) -> tuple[Any, ...]:
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise ConfigError(f"{path}: expected a list of {len(inner)}, got {describe(list(value))}")
    return tuple(
        _build(each, item, f"{path}.{i}") for i, (each, item) in enumerate(zip(inner, value, strict=True))
    )


def _leaf(hint: Any, value: Any, path: str) -> Any:
    """A value that is no mapping or list its type knows: pydantic checks it against the scalars of the union."""
    scalars = tuple(
        each for each in members(hint) if not is_config(each) and get_origin(each) not in (tuple, dict)
    )
    if isinstance(value, str) and any(
        "\ud800" <= char <= "\udfff" or char == "\0" for char in value
    ):  # bytes of a shell, not UTF-8
        raise ConfigError(f"{path}: {value!a} is not valid Unicode text")
    reason = ""
    try:
        if scalars:
            return _adapter(Union[scalars]).validate_python(value)  # noqa: UP007 (built from a tuple)
    except ValidationError as error:
        reason = error.errors()[0]["type"]
    if reason == "finite_number":
        raise ConfigError(f"{path}: {value} is not a finite number")
    if all(get_origin(each) is Literal or each is type(None) for each in members(hint)):
        values = [str(option) for each in members(hint) for option in get_args(each)]
        near = suggestion(str(value), values, "choices")
        raise ConfigError(f"{path}: {describe(value)} is not a choice{near}")
    raise ConfigError(f"{path}: expected {_expected(hint)}, got {describe(value)}{_remedy(hint, value)}")


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _expected(hint: Any) -> str:
    """A type as a user names it."""
    names = []
    for each in members(hint):
        origin = get_origin(each)
        if each is type(None):
            names.append("null")
        elif origin is Literal:
            names.append("one of " + ", ".join(map(str, get_args(each))))
        elif origin is tuple:
            names.append("a list")
        elif origin is dict or is_config(each):
            names.append("keys and values")
        else:
            names.append(_EXPECTED.get(each, getattr(each, "__name__", str(each))))
    return " or ".join(dict.fromkeys(names))


def _remedy(hint: Any, value: Any) -> str:
    if str in members(hint) and isinstance(value, int | float):
        return "; put it in quotes"
    if str in members(hint) and isinstance(value, dict):
        return "; text with a colon needs quotes"
    if int in members(hint) and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if bool in members(hint) and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"
    return ""


def _join(path: str, name: object) -> str:
    return f"{path}.{quoted(name)}" if path else quoted(name)
