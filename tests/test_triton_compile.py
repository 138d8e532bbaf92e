"""Shipped Triton kernels compile for GPUs that are not here: no spills, shared memory within limits, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parents[1] / "bench"


TABLE = BENCH / "results" / "triton_compile.md"


def table(*arguments: str) -> list[dict[str, Any]]:
    """What the compiler says. In a process of its own: kernels that are interpreted here cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "triton_table.py", "--json", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def problems(*arguments: str) -> dict[str, list[str]]:
    """What is wrong with a variant, by its name and target."""
    results = table(*arguments)
    assert results, "no such kernel is shipped"
    return {f"{r['name']} {r['target']}": r["problems"] for r in results if r["problems"]}


@pytest.mark.slow
def test_a_kernel_compiles_for_hopper() -> None:
    assert problems("--only", "expert_mlp hidden, many rows, fp16", "--targets", "sm_90") == {}


def test_the_committed_table_lists_what_is_shipped() -> None:
    """And nothing in it has a problem: `python bench/triton_table.py --write` makes it."""
    rows = [
        line.strip("|").split("|")
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if "sm_90 " in line
    ]
    listed = {row[0].strip(): row[-1].strip() for row in rows}
    code = (
        "import triton_table as t\n"
        "print(*(v.name for v in t.variants() if 'sm_90' in (v.targets or ['sm_90'])), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")])}
    names = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert set(listed) == {name for name in names if name}
    assert not any(listed.values())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_variant_compiles_for_all_targets() -> None:
    assert problems() == {}
