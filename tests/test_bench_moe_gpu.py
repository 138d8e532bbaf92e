"""The benchmark for GPUs, as far as a machine without one can tell: its arithmetic, its refusals, its last line."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moesaic.kernels.backend import triton_refusal

BENCH = Path(__file__).resolve().parents[1] / "bench"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module("moe_gpu")


def test_flops_and_bytes_of_a_known_layer(bench: ModuleType) -> None:
    shape = bench.Shape(T=2, D=3, F=5, E=7, K=2)
    products = 2 * (2 * 2) * 3 * 5 * 3  # multiply and add, rows, width, hidden width, three matrices
    assert shape.flops(backward=False) == products
    assert shape.flops(backward=True) == 3 * products
    assert shape.least_bytes(2, backward=False) == 2 * (6 + 3 * 7 * 15 + 6)
    assert shape.our_bytes(2, backward=False) - shape.least_bytes(2, backward=False) == 2 * 4 * (
        4 * 5 + 2 * 3
    )


@pytest.mark.parametrize(
    ("load", "largest"), [("balanced", 1.0), ("max 4x mean", 4.0), ("all to the same", 8.0)]
)
def test_loads_are_what_they_are_called(bench: ModuleType, load: str, largest: float) -> None:
    experts = bench.choose(bench.Shape(T=64, D=1, F=1, E=16, K=2), load, CPU)
    assert all(len(set(row)) == 2 for row in experts.tolist())
    counts = torch.bincount(experts.flatten(), minlength=16)
    assert counts.max() * 16 / counts.sum() == largest


def test_a_candidate_that_differs_gets_no_speed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs):
        return bench.loop(inputs) * 1.01

    def broken(inputs):
        return bench.loop(inputs) * float("nan")

    found = {"right": bench.loop, "wrong": wrong, "broken": broken, "raises": lambda inputs: 1 / 0}
    monkeypatch.setattr(bench, "candidates", lambda inputs: (found, []))
    inputs = bench.make_inputs(bench.DRY["tiny"], "balanced", CPU, torch.float32)
    text, notes = bench.measure(inputs, 1, 0.0)
    assert "right" in text
    for name, reason in {
        "wrong": "differs by",
        "broken": "differs by inf",
        "raises": "division by zero",
    }.items():
        assert name not in text
        assert any(note.startswith(name) and reason in note for note in notes)


def test_every_candidate_of_this_machine_computes_the_same(bench: ModuleType) -> None:
    inputs = bench.make_inputs(bench.DRY["tiny"], "max 4x mean", CPU, torch.float32)
    found, _ = bench.candidates(inputs)
    assert {"moesaic", "moesaic, with router", "F.grouped_mm", "Python loop"} <= set(found)
    want = bench.results_of(bench.loop, inputs)
    for name, candidate in found.items():
        assert bench.difference(bench.results_of(candidate, inputs), want) < 1e-4, name


def test_constants_that_fail_get_no_time_and_shipped_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    if refusal := triton_refusal(CPU):
        pytest.skip(str(refusal))
    monkeypatch.syspath_prepend(str(BENCH))
    bench, tuner = import_module("moe_gpu"), import_module("moe_tune")
    inputs = bench.make_inputs(bench.DRY["tiny"], "balanced", CPU, torch.float32)
    choices = tuner.constants(CPU, torch.float32, 12)
    shipped = dict(choices)
    right, wrong = replace(shipped["product"], k=16), replace(shipped["product"], k=24)  # no power of two
    rows = tuner.tune(inputs, choices, {"product": [right, wrong]}, rounds=1)
    assert choices == shipped
    assert [row[2].endswith("shipped") for row in rows] == [True, False, False]
    assert [row[3][0].isdigit() for row in rows] == [True, True, False]
    assert "Error" in rows[2][3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    scripts = [[sys.executable, BENCH / f"{name}.py"] for name in ("moe_gpu", "moe_tune")]
    for command in (*scripts, ["sh", BENCH / "gpu.sh"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert not done.stdout
        assert "no CUDA device here" in done.stderr
        assert done.stderr.count("\n") == 1
