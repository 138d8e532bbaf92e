from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from moesaic.launch.build import build, plain
from moesaic.launch.yaml_text import ConfigError


@dataclass(frozen=True, kw_only=True)
class Dense:
    kind: Literal["dense"] = "dense"
    hidden: int


@dataclass(frozen=True, kw_only=True)
class Router:
    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    limit: Literal["low", 2] | None = None


@dataclass(frozen=True, kw_only=True)
class Sparse:
    kind: Literal["sparse", "moe"] = "sparse"
    experts: int
    router: Router

    def __post_init__(self) -> None:
        if self.router.k > self.experts:
            raise ValueError(f"router.k: {self.router.k} is more than experts = {self.experts}")
        if self.experts == 13:
            raise ValueError("thirteen experts bring bad luck")


Ffn = Dense | Sparse


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int
    rate: float = 0.5
    flag: bool = False
    name: str = "m"
    note: str | None = None
    ffn: Ffn
    default_ffn: Ffn = field(default_factory=lambda: Dense(hidden=3))
    optional_ffn: Ffn | None = None
    at: dict[str, Ffn] = field(default_factory=dict)
    ffns: tuple[Ffn, ...] = ()
    betas: tuple[float, float] = (0.9, 0.95)
    path: str | tuple[str, ...] = "x"
    size: int | Literal["auto"] = "auto"


DENSE = {"kind": "dense", "hidden": 4}
SMALL: dict[str, Any] = {"dim": 2, "ffn": DENSE}


def error_of(**changes: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        build(Model, SMALL | changes)
    return str(raised.value)


def test_everything_is_built():
    router = {"k": 2, "score": "sigmoid", "limit": 2}
    model = build(
        Model,
        {
            "dim": 8,
            "rate": 1,
            "flag": True,
            "name": "a",
            "note": None,
            "ffn": {"kind": "moe", "experts": 4, "router": router},
            "default_ffn": {"hidden": 9},
            "optional_ffn": None,
            "at": {"0-2": DENSE},
            "ffns": [DENSE, {"kind": "sparse", "experts": 2, "router": {"k": 1}}],
            "betas": [0, 0.5],
            "path": ["a", "b"],
            "size": 3,
        },
    )
    assert model == Model(
        dim=8,
        rate=1.0,
        flag=True,
        name="a",
        note=None,
        ffn=Sparse(kind="moe", experts=4, router=Router(k=2, score="sigmoid", limit=2)),
        default_ffn=Dense(hidden=9),
        at={"0-2": Dense(hidden=4)},
        ffns=(Dense(hidden=4), Sparse(experts=2, router=Router(k=1))),
        betas=(0.0, 0.5),
        path=("a", "b"),
        size=3,
    )
    assert type(model.rate) is float
    assert type(model.betas[0]) is float


def test_defaults_stay():
    assert build(Model, SMALL) == Model(dim=2, ffn=Dense(hidden=4))


def test_plain_reads_back_with_kind_first():
    model = Model(
        dim=2,
        ffn=Sparse(experts=2, router=Router(k=1)),
        at={"0": Dense(hidden=1)},
        ffns=(Dense(hidden=7),),
        path=("a",),
    )
    values = plain(model)
    assert build(Model, values) == model
    assert list(values["ffn"]) == ["kind", "experts", "router"]
    assert values["at"] == {"0": {"kind": "dense", "hidden": 1}}
    assert values["path"] == ["a"]
    assert values["optional_ffn"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dimm": 3}, "dimm: no such field; did you mean 'dim'?"),
        ({"ffn": {"kind": "dense", "hidden": 1, "zzz": 1}}, "ffn.zzz: no such field; fields: kind, hidden"),
        (
            {"ffn": {"kind": "moe", "experts": 4, "router": {"topk": 2}}},
            "ffn.router.topk: no such field; did you mean 'k'?",
        ),
        ({"at": {"1": {"kind": "dense", "hiden": 1}}}, "at.1.hiden: no such field; did you mean 'hidden'?"),
        ({"ffns": [DENSE, {"kind": "dense"}]}, "ffns.1.hidden: missing; it has no default"),
        ({"ffn": {"kind": "moe"}}, "ffn.experts: missing (also router); it has no default"),
        ({"ffn": {"hidden": 4}}, "ffn.kind: missing; one of dense, sparse, moe"),
        ({"optional_ffn": {"hidden": 4}}, "optional_ffn.kind: missing; one of dense, sparse, moe"),
        ({"ffn": {"kind": "dens"}}, "ffn.kind: no such kind 'dens'; did you mean 'dense'?"),
        ({"ffn": {"kind": "abc"}}, "ffn.kind: no such kind 'abc'; kinds: dense, sparse, moe"),
        ({"ffn": {"kind": [1]}}, "ffn.kind: no such kind the list [1]; kinds: dense, sparse, moe"),
        ({"ffn": "dense"}, "ffn: expected keys and values, got 'dense'"),
        ({"optional_ffn": 3}, "optional_ffn: expected keys and values or null, got 3"),
        ({"at": [DENSE]}, "at: expected keys and values, got the list [{'kind': 'dense', 'hidden': 4}]"),
        ({"at": {"0": 5}}, "at.0: expected keys and values, got 5"),
        ({"ffns": DENSE}, "ffns: expected a list, got a mapping with kind, hidden"),
        ({"dim": "8"}, "dim: expected an integer, got '8'"),
        ({"dim": True}, "dim: expected an integer, got true"),
        ({"dim": 2.5}, "dim: expected an integer, got 2.5"),
        ({"dim": 1000.0}, "dim: expected an integer, got 1000.0; write 1000"),
        ({"dim": None}, "dim: expected an integer, got nothing (null)"),
        ({"rate": "1e-3"}, "rate: expected a number, got '1e-3'"),
        ({"rate": False}, "rate: expected a number, got false"),
        ({"rate": float("inf")}, "rate: inf is not a finite number"),
        ({"rate": float("nan")}, "rate: nan is not a finite number"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
        ({"flag": "off"}, "flag: expected true or false, got 'off'; write false"),
        ({"name": 12}, "name: expected a string, got 12; put it in quotes"),
        ({"name": {"a": 1}}, "name: expected a string, got a mapping with a; text with a colon needs quotes"),
        ({"name": "\ud800"}, "name: '\\ud800' is not valid Unicode text"),
        ({"note": 1.5}, "note: expected a string or null, got 1.5; put it in quotes"),
        ({"betas": [0.1]}, "betas: expected a list of 2, got the list [0.1]"),
        ({"betas": [0.1, "b"]}, "betas.1: expected a number, got 'b'"),
        ({"path": ["a", 1]}, "path.1: expected a string, got 1; put it in quotes"),
        ({"path": True}, "path: expected a string or a list, got true; put it in quotes"),
        ({"size": "manual"}, "size: expected an integer or one of auto, got 'manual'"),
        (
            {"ffn": {"kind": "moe", "experts": 2, "router": {"k": 1, "score": "sigmoidal"}}},
            "ffn.router.score: 'sigmoidal' is not a choice; did you mean 'sigmoid'?",
        ),
        (
            {"ffn": {"kind": "moe", "experts": 2, "router": {"k": 1, "limit": 3}}},
            "ffn.router.limit: 3 is not a choice; choices: low, 2",
        ),
        (
            {"ffn": {"kind": "moe", "experts": 2, "router": {"k": 3}}},
            "ffn.router.k: 3 is more than experts = 2",
        ),
        (
            {"at": {"5": {"kind": "moe", "experts": 13, "router": {"k": 3}}}},
            "at.5: thirteen experts bring bad luck",
        ),
    ],
)
def test_errors(changes: dict[str, Any], message: str):
    assert error_of(**changes) == message


def test_an_unknown_key_is_reported_before_a_missing_one():
    with pytest.raises(ConfigError, match=r"^dims: no such field; did you mean 'dim'\?$"):
        build(Model, {"dims": 2})


def test_a_rule_of_the_top_has_no_prefix():
    with pytest.raises(ConfigError, match=r"^thirteen"):
        build(Sparse, {"experts": 13, "router": {"k": 1}})


def test_other_errors_pass_through():
    @dataclass(frozen=True)
    class Broken:
        x: int = 0

        def __post_init__(self) -> None:
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        build(Broken, {})
