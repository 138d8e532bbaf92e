"""Choosing by measurement: once per shape, kept on disk, and never by something that cannot run."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moesaic.kernels import backend as backends
from moesaic.kernels import choice, expert_mlp
from moesaic.kernels.library import library_serves
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


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), RuntimeError("too many groups")])
def test_what_fails_loses(error: Exception) -> None:
    candidates = {"fails": lambda: fail(error), "slow": lambda: time.sleep(0.02)}
    assert choice.fastest("a shape", candidates) == "slow"
    assert json.loads(choice.choices_file().read_text())["a shape"]["ms"]["fails"] is None


def test_where_all_fail_the_first_reason_is_raised() -> None:
    candidates = {"one": lambda: fail(RuntimeError("first")), "other": lambda: fail(RuntimeError("second"))}
    with pytest.raises(RuntimeError, match="first"):
        choice.fastest("a shape", candidates)
    assert not choice.choices_file().exists()


def layer_inputs() -> tuple[torch.Tensor, ...]:
    """x, gates, w1 and w2 of 3 experts."""
    torch.manual_seed(0)
    return torch.randn(6, 16), torch.rand(12), torch.randn(3, 2, 16, 16), torch.randn(3, 16, 16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_layer_that_is_computed_again_can_be_measured(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputation counts what is saved; a measurement amid it saves other things."""
    x, *rest = layer_inputs()
    plan = plan_choice(torch.randint(0, 3, (6, 2)), 3)

    def gradient() -> torch.Tensor:
        leaf = x.detach().requires_grad_()

        def layer(x: torch.Tensor) -> torch.Tensor:
            return expert_mlp.expert_mlp(x.tanh(), rest[0], rest[1], rest[2], plan, kind="swiglu")

        checkpoint(layer, leaf, use_reentrant=reentrant).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    want = gradient()
    monkeypatch.setattr(expert_mlp, "MEASURED", ("cpu",))
    assert torch.allclose(gradient(), want, atol=1e-5)
    assert choice.choices_file().exists()


def test_nothing_is_measured_without_gradients_or_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_mlp, "MEASURED", ("cpu",))
    x, gates, w1, w2 = layer_inputs()
    experts = torch.randint(0, 3, (6, 2))
    plan = plan_choice(experts, 3)
    with torch.inference_mode():
        expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = (x.shape, gates.shape, w1.shape, w2.shape)
        inputs = [torch.empty(shape) for shape in shapes]
        y = expert_mlp.expert_mlp(inputs[0], inputs[1], inputs[2], inputs[3], plan, kind="swiglu")
    assert y.shape == x.shape
    assert not choice.choices_file().exists()
    expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu")
    (entry,) = json.loads(choice.choices_file().read_text()).values()
    used: list[str] = []
    real = expert_mlp.engine_of
    monkeypatch.setattr(
        expert_mlp, "engine_of", lambda name, *given: (used.append(name), real(name, *given))[1]
    )
    with torch.inference_mode():
        expert_mlp.expert_mlp(x, gates, w1, w2, plan, kind="swiglu")
    assert used == [entry["chosen"]]  # what is known is taken


def test_no_kernel_of_a_gpu_gets_tensors_without_storage() -> None:
    """As while memory is estimated: it would read from address 0."""
    if reason := backends.triton_refusal(torch.device("cuda")):
        pytest.skip(reason)
    x = FakeTensor(FakeTensorMode(), torch.empty(6, 16, device="meta"), torch.device("cuda:0"))
    assert x.is_cuda
    assert {backends.engine(backend, x) for backend in ("auto", "triton", "torch")} == {"torch"}


def test_libraries_are_not_asked_for_more_than_they_take_on_a_gpu() -> None:
    mode = FakeTensorMode()

    def serves(groups: int, rows: int) -> bool:
        shapes = ((groups,), (rows, 4096), (groups, 64, 4096))
        tensors = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
        return library_serves(*(FakeTensor(mode, tensor, torch.device("cuda:0")) for tensor in tensors))

    assert serves(1023, 2**19 - 1)
    assert not serves(1024, 8)
    assert not serves(8, 2**19)  # 2^31 numbers


def test_experts_are_measured_where_there_is_more_than_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here between Triton's interpreter and torch, of which the latter is bound to be faster."""
    if backends.triton_refusal(torch.device("cpu")):
        pytest.skip(f"{backends.triton_refusal(torch.device('cpu'))}")
    monkeypatch.setattr(expert_mlp, "MEASURED", ("cpu",))
    x, gates, w1, w2 = layer_inputs()
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
