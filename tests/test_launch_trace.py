"""The command `trace`: files made, converted, shown and trained on; mistakes in one line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesaic.launch import cli
from moesaic.moe.regimes import Shape, generate
from moesaic.moe.trace import load_trace


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def test_generate_and_show(tmp_path: Path):
    out = tmp_path / "a.npz"
    options = [
        "--steps",
        3,
        "--layers",
        2,
        "--sources",
        4,
        "--experts",
        8,
        "--tokens",
        64,
        "--k",
        1,
        "--seed",
        9,
    ]
    assert run("trace", "generate", "R3", out, *options).stdout.strip() == str(out)
    shape = Shape(steps=3, layers=2, sources=4, experts=8, tokens=64, k=1)
    np.testing.assert_array_equal(load_trace(out).counts, generate("R3", shape, seed=9).counts)
    run("trace", "generate", "skewed", out, *options, "--ranks", 2, "--peak", 1.5)
    facts = json.loads(run("trace", "show", out, "--ranks", 2, "--json").stdout)
    assert facts["rank_max_over_mean"] == {"median": 1.5, "p95": 1.5}
    assert [facts[name] for name in ("steps", "layers", "sources", "experts", "k")] == [3, 2, 4, 8, 1]
    table = run("trace", "show", out, "--ranks", 2).stdout
    assert "busiest of 2 ranks over mean" in table
    assert "1.500" in table


def test_convert(tmp_path: Path):
    for rank in (0, 1):
        (tmp_path / f"table_iter1_rank{rank}.log").write_text(f"0:[[3.0, 1.0], [2.0, 2.0]]\n1:[[{rank}, 4]]")
    out = tmp_path / "a.npz"
    assert run("trace", "convert", tmp_path, out, "--k", 1).stdout.strip() == str(out)
    np.testing.assert_array_equal(load_trace(out).counts, [[[[5, 3], [5, 3]], [[0, 4], [1, 4]]]])
    assert re.search(r"moves at each step +- ", run("trace", "show", out).stdout)  # of a single step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "R1", "a.npz", "--k", "17"], "error: k: 17 is more than experts = 16"),
        (["generate", "skewed", "a.npz", "--peak", "9"], "error: peak: 9.0 is not in 1 to 8"),
        (["generate", "R5", "none/a.npz"], "error: none/a.npz: cannot be written"),
        (["generate", "R0", "a.npz"], "'R0' is not"),
        (["convert", "none", "a.npz"], "error: none: cannot be listed"),
        (["show", "none.npz"], "error: none.npz: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert message in run("trace", *arguments, code=2).output


def test_a_trace_in_a_config(tmp_path: Path):
    out = tmp_path / "a.npz"
    run("trace", "generate", "R2", out, "--steps", 3, "--layers", 2, "--sources", 4, "--experts", 8)
    replay = ["model.ffn.router.kind=replay", f"model.ffn.router.trace={out}"]
    found = run("audit", "debug", "--ranks", 2, *replay, "parallel.experts.kind=owned", "--json")
    assert json.loads(found.stdout)["passed"]
    message = run("inspect", "debug", *replay, "model.ffn.num_experts=4", code=2).output
    assert message.startswith(
        f"error: model.ffn.router.trace: {out} has 8 experts, the layer num_experts = 4"
    )
    message = run("inspect", "debug", replay[0], "model.ffn.router.trace=none.npz", code=2).output
    assert message.startswith("error: model.ffn.router.trace: none.npz: cannot be read")
