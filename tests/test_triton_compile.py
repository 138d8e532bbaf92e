"""Every shipped Triton kernel compiles for a Hopper GPU that is not here: no spills, shared memory within limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCH = Path(__file__).resolve().parents[1] / "bench"


def problems(*targets: str) -> dict[str, list[str]]:
    """What is wrong with a variant, by its name and target. In a process of its own: kernels that are interpreted here
    cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "triton_table.py", "--json", "--targets", *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)
    assert results, "no kernel is shipped"
    return {f"{r['name']} {r['target']}": r["problems"] for r in results if r["problems"]}


def test_every_variant_compiles_for_hopper() -> None:
    assert problems("sm_90") == {}


@pytest.mark.slow
def test_every_variant_compiles_for_all_targets() -> None:
    assert problems("sm_80", "sm_100", "gfx942") == {}
