"""JSON Schema of config files, for editors: completion, hovering and checks while typing.

It follows the same type hints as `moesaic.launch.build`, so what it accepts is what a run accepts, except for rules
across fields. Descriptions are the docstrings below the fields. A file that extends another may leave out anything: for
those the schema asks for no key, for others it asks for every required one.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter

from moesaic.launch.build import default_of, has_default, hints, is_config, members, plain

EXTENDS = "Config file to start from: a path relative to this file, or the name of a shipped config."


def schema(cls: type) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a file that holds the dataclass `cls`."""
    definitions: dict[str, Any] = {}
    complete = _schema(cls, definitions, "")
    partial = _schema(cls, definitions, ".partial")
    definitions[_name(cls, ".partial")]["properties"]["extends"] = {"type": "string", "description": EXTENDS}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moesaic run",
        "if": {"type": "object", "required": ["extends"]},
        "then": partial,
        "else": complete,
        "$defs": definitions,
    }


def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(each):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                docs.pop(statement.target.id, None)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[statement.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


def _schema(hint: Any, definitions: dict[str, Any], suffix: str) -> dict[str, Any]:
    choices = members(hint)
    if len(choices) > 1:
        return {"anyOf": [_schema(each, definitions, suffix) for each in choices]}
    if is_config(hint):
        name = _name(hint, suffix)
        if name not in definitions:
            definitions[name] = {}  # before its fields, so that a type may hold itself
            definitions[name] = _object(hint, definitions, suffix)
        return {"$ref": f"#/$defs/{name}"}
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return {"type": "array", "items": _schema(inner[0], definitions, suffix)}
        items = [_schema(each, definitions, suffix) for each in inner]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1], definitions, suffix)}
    return TypeAdapter(hint).json_schema()


def _object(cls: type, definitions: dict[str, Any], suffix: str) -> dict[str, Any]:
    docs, properties, required = field_docs(cls), {}, []
    types_of = hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        entry = _schema(types_of[field.name], definitions, suffix)
        if field.name in docs:
            entry["description"] = docs[field.name]
        if has_default(field):
            entry["default"] = plain(default_of(field))
        elif not suffix:
            required.append(field.name)
        properties[field.name] = entry
    result: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    if cls.__doc__ and not cls.__doc__.startswith(
        f"{cls.__name__}("
    ):  # dataclasses write that one themselves
        result["description"] = inspect.cleandoc(cls.__doc__)
    if required:
        result["required"] = required
    return result


def _name(cls: type, suffix: str) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("moesaic.") + suffix
