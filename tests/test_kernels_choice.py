"""Choosing by measurement: once per shape, kept on disk, and never by something that cannot run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.kernels import backend as backends
from moesaic.kernels import choice, expert_mlp
from moesaic.kernels.plan import plan_choice


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    return tmp_path


def sleeper(calls: list[str], name: str, seconds: float) -> Callable[[], None]:
    def run() -> None:
        calls.append(name)
        time.sleep(seconds)

    return run


def test_the_fastest_is_chosen_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    candidates = {"slow": sleeper(calls, "slow", 0.05), "fast": sleeper(calls, "fast", 0)}
    assert choice.fastest("a shape", candidates) == "fast"
    measured = len(calls)
    assert choice.fastest("a shape", candidates) == "fast"
    monkeypatch.setattr(choice, "_chosen", {})  # as in a new process
    assert choice.fastest("a shape", candidates) == "fast"
    assert len(calls) == measured
    assert choice.fastest("another shape", candidates) == "fast"
    assert len(calls) == 2 * measured
    entries = json.loads(choice.choices_file().read_text())
    assert set(entries) == {"a shape", "another shape"}
    assert entries["a shape"]["ms"]["slow"] >= 50


def test_a_choice_that_no_longer_runs_is_made_again() -> None:
    choice.choices_file().parent.mkdir(parents=True)
    choice.choices_file().write_text(json.dumps({"a shape": {"chosen": "gone"}}))
    assert choice.fastest("a shape", {"here": lambda: None}) == "here"


@pytest.mark.parametrize("text", ["", "[1]", '{"a shape": 3}', "{"])
def test_a_damaged_file_is_measured_again(text: str) -> None:
    choice.choices_file().parent.mkdir(parents=True)
    choice.choices_file().write_text(text)
    assert choice.fastest("a shape", {"here": lambda: None}) == "here"
    assert json.loads(choice.choices_file().read_text())["a shape"]["chosen"] == "here"


def test_a_folder_that_cannot_be_written_does_not_matter(own_cache: Path) -> None:
    (own_cache / "kernels").write_text("a file where the folder should be")
    assert choice.fastest("a shape", {"here": lambda: None}) == "here"


def test_what_runs_out_of_memory_loses() -> None:
    def too_big() -> None:
        raise torch.OutOfMemoryError("planted")

    assert choice.fastest("a shape", {"big": too_big, "slow": lambda: time.sleep(0.02)}) == "slow"


def test_experts_are_measured_where_there_is_more_than_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here between Triton's interpreter and torch, of which the latter is bound to be faster."""
    if backends.triton_refusal(torch.device("cpu")):
        pytest.skip(f"{backends.triton_refusal(torch.device('cpu'))}")
    monkeypatch.setattr(expert_mlp, "MEASURED", ("cpu",))
    x, gates = torch.randn(6, 16), torch.rand(12)
    w1, w2 = torch.randn(3, 2, 16, 16), torch.randn(3, 16, 16)
    plan = plan_choice(torch.randint(0, 3, (6, 2)), 3)
    y = expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu")
    (entry,) = json.loads(choice.choices_file().read_text()).items()
    assert "swiglu D 16 F 16 E 3 R 16 torch.float32" in entry[0]
    assert entry[1]["chosen"] == "torch"
    assert set(entry[1]["ms"]) == {"triton", "torch"}
    assert torch.equal(y, expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu", backend="torch"))


def test_float64_is_not_measured_where_one_backend_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_mlp, "MEASURED", ("cpu",))
    x, gates = torch.randn(6, 16).double(), torch.rand(12).double()
    w1, w2 = torch.randn(3, 2, 16, 16).double(), torch.randn(3, 16, 16).double()
    plan = plan_choice(torch.randint(0, 3, (6, 2)), 3)
    expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu")
    assert not choice.choices_file().exists()


def test_all_but_the_experts_products_runs_with_megablocks() -> None:
    """It takes bf16 only, and no integers: a plan is none of its business."""
    experts = torch.randint(0, 3, (6, 2))
    assert torch.equal(plan_choice(experts, 3, backend="megablocks").order, plan_choice(experts, 3).order)
