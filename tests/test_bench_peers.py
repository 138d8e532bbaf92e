"""The peers of the benchmarks compute what they are compared on, and the timing counts what it says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BENCH = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    """A file of bench/, which is no package: its scripts import each other by bare names."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


peers, timing = load("peers"), load("timing")


def loop_over_tokens(x: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, k: int) -> Tensor:
    """The layer as its papers write it, token by token."""
    outputs = []
    for token in x:
        scores = (gate @ token).softmax(0)
        chosen = scores.topk(k)
        weights = chosen.values / chosen.values.sum()
        parts = [
            weight * (w2[e] @ (F.silu(w1[e, 0] @ token) * (w1[e, 1] @ token)))
            for weight, e in zip(weights, chosen.indices, strict=True)
        ]
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


def weights(D: int, hidden: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    made = torch.randn(E, D), torch.randn(E, 2, hidden, D) / D**0.5, torch.randn(E, D, hidden) / hidden**0.5
    return tuple(tensor.double().requires_grad_() for tensor in made)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("T", "D", "hidden", "E", "k"), [(33, 16, 24, 5, 2), (9, 8, 12, 4, 4), (1, 8, 4, 3, 1)]
)
def test_layer_peers_equal_a_loop_over_tokens(T: int, D: int, hidden: int, E: int, k: int):
    pytest.importorskip("transformers")
    gate, w1, w2 = weights(D, hidden, E)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(T, D, dtype=torch.float64)
    expected = loop_over_tokens(x, gate, w1, w2, k)
    wanted = torch.autograd.grad((expected * upstream).sum(), (x, gate, w1, w2))
    candidates = peers.layer_peers(D, hidden, E, k)
    assert len(candidates) == 9
    for name, peer in candidates.items():
        peer.load(peers.LayerTensors(gate, w1, w2))
        mine = x.detach().float().requires_grad_()
        output = peer(mine)
        output.backward(upstream.float())
        assert mine.grad is not None
        found = peer.gradients()
        for what, got, want in zip(
            ("output", "x", "gate", "w1", "w2"),
            (output, mine.grad, found.gate, found.w1, found.w2),
            (expected, *wanted),
            strict=True,
        ):
            error = (got - want).abs().max() / want.abs().max().clamp(min=1e-3)
            assert error < 2e-6, f"{name}: {what} differs by {error:.1e}"
        peer.zero_grad()
        with pytest.raises(ValueError, match="no gradients"):
            peer.gradients()


def test_layer_peers_use_the_implementation_they_name(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    used = []
    for kind in ("grouped_mm", "batched_mm"):
        original = ALL_EXPERTS_FUNCTIONS[kind]

        def spy(*args, kind=kind, original=original):
            used.append(kind)
            return original(*args)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, kind, spy)
    gate, w1, w2 = weights(8, 4, 3)
    for peer in peers.layer_peers(8, 4, 3, 1).values():
        peer.load(peers.LayerTensors(gate, w1, w2))
        peer(torch.randn(5, 8))
    assert used == ["grouped_mm", "batched_mm"] * 3


def architecture(**changes: object):
    shape = {
        "vocab": 61,
        "dim": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "experts": 4,
        "k": 2,
        "hidden": 16,
    }
    return peers.Architecture(**(shape | {"seq_len": 24} | changes))


def trained(architecture: object, steps: int = 3, **recipe: object) -> list[float]:
    """The losses of some steps from the same start on the same tokens."""
    torch.manual_seed(5)
    trainer = peers.plain_transformers_trainer(architecture, peers.Recipe(warmup=1, lr=1e-2, **recipe))
    tokens = torch.randint(0, 61, (4, 24), generator=torch.Generator().manual_seed(7))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    return [trainer.step(tokens, targets).item() for _ in range(steps)]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_variants_of_the_trainer_agree(qk_norm: bool):
    pytest.importorskip("transformers")
    shape = architecture(qk_norm=qk_norm)
    losses = trained(shape, 6)
    assert losses[0] == pytest.approx(
        torch.tensor(61.0).log().item(), rel=0.02
    )  # a fresh model knows nothing
    assert losses[-1] < losses[0] - 0.1
    for change in ({"experts": "eager"}, {"experts": "batched_mm"}, {"fused": False}, {"micro_batches": 2}):
        assert trained(shape, 6, **change) == pytest.approx(losses, rel=1e-4), change
    assert trained(shape, 6, precision="bf16") == pytest.approx(losses, rel=0.02)
    assert trained(shape, 6, balance=1.0) != losses


def test_the_trainer_builds_the_named_architecture():
    pytest.importorskip("transformers")
    trainer = peers.plain_transformers_trainer(architecture(), peers.Recipe())
    attention = (
        32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 8
    )  # queries, keys and values, output, the norms of 8-wide heads
    experts = 4 * 3 * 16 * 32 + 4 * 32
    assert trainer.parameters() == 61 * 32 + 2 * (attention + experts + 2 * 32) + 32
    untied = peers.plain_transformers_trainer(
        architecture(tied_embeddings=False, qk_norm=False), peers.Recipe()
    )
    assert untied.parameters() == trainer.parameters() + 61 * 32 - 2 * 2 * 8


def test_interleave_takes_turns_and_restores_threads():
    order = []
    timings = timing.interleave(
        {name: lambda name=name: order.append((name, torch.get_num_threads())) for name in "abc"},
        rounds=2,
        warmup=1,
        threads=2,
    )
    assert [name for name, _ in order] == list("cbaabccba")
    assert {threads for _, threads in order} == {2}
    assert torch.get_num_threads() == 1
    assert [len(seconds) for seconds in timings.seconds.values()] == [2, 2, 2]


def test_ratios_are_formed_within_a_round():
    timings = timing.Timings({"slow": [2.0, 20.0, 200.0, 4.0], "fast": [1.0, 10.0, 100.0, 1.0]}, threads=1)
    ratio = timings.ratio("slow", "fast")
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.5)
    assert timings.time("fast").median == 5.5
    assert timing.comparison(timings, "fast", amount=11.0) == (
        "|      |                       ms | tokens/s |      time / fast |\n"
        "| ---- | -----------------------: | -------: | ---------------: |\n"
        "| slow | 12000.0 (3500.0-65000.0) |        1 | 2.00 (2.00-2.50) |\n"
        "| fast |  5500.0 (1000.0-32500.0) |        2 |                1 |"
    )


def test_results_name_their_command_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    path = timing.write_result("layer", "The layer", "python bench/layer.py", 2, ["one", "two"])
    lines = path.read_text().split("\n\n")
    assert lines[:2] == ["# The layer", "Command: `python bench/layer.py`"]
    assert f"torch {torch.__version__}" in lines[2]
    assert "2 threads" in lines[2]
    assert lines[3:] == ["one", "two\n"]


def test_a_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] cells"):
        timing.table(["a", "b"], [["1"]])
