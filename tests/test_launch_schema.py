from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.launch.schema import field_docs, schema
from moesaic.train.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Common:
    size: int = 3
    """How large."""
    plain: str


@dataclass(frozen=True, kw_only=True)
class Left(Common):
    """The left one."""

    kind: Literal["left"] = "left"
    plain: str
    """Said again
    on two lines."""


@dataclass(frozen=True, kw_only=True)
class Right:
    kind: Literal["right"] = "right"
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True, kw_only=True)
class Top:
    """All of it."""

    side: Left | Right | None = None
    """Which side."""
    needed: Left
    many: tuple[Right, ...] = field(default_factory=lambda: (Right(),))
    named: dict[str, bool]
    word: Literal["a", "b"] = "a"


def definition(name: str) -> dict[str, Any]:
    return schema(Top)["$defs"][f"{__name__}.{name}"]


def test_docs_are_the_strings_below_the_fields():
    assert field_docs(Left) == {"size": "How large.", "plain": "Said again\non two lines."}
    assert field_docs(Top) == {"side": "Which side."}


def test_an_object():
    assert definition("Left") == {
        "type": "object",
        "description": "The left one.",
        "properties": {
            "size": {"type": "integer", "default": 3, "description": "How large."},
            "plain": {"type": "string", "description": "Said again\non two lines."},
            "kind": {"const": "left", "default": "left", "type": "string"},
        },
        "required": ["plain"],
        "additionalProperties": False,
    }
    assert "description" not in definition("Right")


def test_unions_tuples_and_mappings():
    top = definition("Top")
    right = {"$ref": f"#/$defs/{__name__}.Right"}
    assert top["required"] == ["needed", "named"]
    assert top["properties"]["side"] == {
        "anyOf": [{"$ref": f"#/$defs/{__name__}.Left"}, right, {"type": "null"}],
        "description": "Which side.",
        "default": None,
    }
    assert top["properties"]["many"] == {
        "type": "array",
        "items": right,
        "default": [{"kind": "right", "pair": [1, 2.0]}],
    }
    assert top["properties"]["named"] == {"type": "object", "additionalProperties": {"type": "boolean"}}
    assert top["properties"]["word"] == {"enum": ["a", "b"], "type": "string", "default": "a"}
    assert definition("Right")["properties"]["pair"] == {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"type": "number"}],
        "minItems": 2,
        "maxItems": 2,
        "default": [1, 2.0],
    }


def test_a_file_that_extends_needs_nothing():
    whole = schema(Top)
    assert whole["if"] == {"type": "object", "required": ["extends"]}
    assert whole["then"] == {"$ref": f"#/$defs/{__name__}.Top.partial"}
    assert whole["else"] == {"$ref": f"#/$defs/{__name__}.Top"}
    partial = definition("Top.partial")
    assert partial["properties"]["needed"] == {"$ref": f"#/$defs/{__name__}.Left.partial"}
    assert partial["properties"]["extends"]["type"] == "string"
    assert "extends" not in definition("Top")["properties"]
    assert not any("required" in each for name, each in whole["$defs"].items() if name.endswith(".partial"))


def test_every_reference_of_the_real_schema_leads_somewhere():
    whole = schema(RunConfig)

    def references(value: Any) -> set[str]:
        if isinstance(value, list):
            return {found for each in value for found in references(each)}
        if not isinstance(value, dict):
            return set()
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own | {found for each in value.values() for found in references(each)}

    assert references(whole) == {f"#/$defs/{name}" for name in whole["$defs"]}
    run = whole["$defs"]["train.config.RunConfig"]
    assert run["required"] == ["name", "model", "data", "train", "optim"]
    steps = whole["$defs"]["train.config.TrainConfig"]["properties"]["steps"]
    assert steps == {"type": "integer", "description": "Optimizer steps of the whole run."}
