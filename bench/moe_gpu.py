"""One MoE layer on a GPU, forward and backward: ours, dense products of equal FLOPs, and what else is installed.

Every candidate gets the same tokens, weights, experts and gates. No speed is printed for one whose output or gradients
differ. FLOPs are those of the chosen experts, 6 * T * K * D * F forward and three times that with backward. Ceilings
are measured first. Results: bench/results/moe_gpu.md, written only on a GPU.

    python bench/moe_gpu.py [--shapes OLMoE] [--loads balanced] [--rounds 5] [--dry]
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleave, table, write_result
from torch import Tensor

from moesaic.kernels.backend import Backend
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.kernels.plan import plan_choice
from moesaic.moe import MoE, RouterInput, TopKRouter


@dataclass(frozen=True)
class Shape:
    """T tokens, D width, F hidden width of an expert, E experts, K of them per token."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def flops(self, *, backward: bool) -> float:
        return 6.0 * self.T * self.K * self.D * self.F * (3 if backward else 1)

    def least_bytes(self, size: int, *, backward: bool) -> float:
        """Weights and tokens read once, results written once; `size`: bytes of a number."""
        tokens, weights = self.T * self.D, 3 * self.E * self.D * self.F
        return size * (2 * tokens + weights + (backward and 3 * tokens + 2 * weights))

    def our_bytes(self, size: int, *, backward: bool) -> float:
        """The same, and what our kernels write for each other, once written and once read."""
        rows = self.T * self.K
        forward = rows * (2 * self.F + 2 * self.F + 2 * self.D)  # hidden (only written), activation, outputs
        # hidden, its gradient (read twice), the activation again, and the rows of the input's gradient
        both = forward + rows * (2 * self.F + 6 * self.F + 2 * self.F + 2 * self.D)
        return self.least_bytes(size, backward=backward) + size * (both if backward else forward)


SHAPES = {
    "Mixtral-8x7B": Shape(8192, 4096, 14336, 8, 2),
    "OLMoE": Shape(16384, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(32768, 2048, 768, 128, 8),
    "DeepSeek-V3, 32 experts": Shape(8192, 7168, 2048, 32, 8),
}
DRY = {"tiny": Shape(48, 32, 16, 8, 2)}
LOADS = ("balanced", "max 4x mean", "all to the same")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference over the largest value."""
ABSENT = {
    "sonicmoe": "SonicMoE",
    "megablocks": "MegaBlocks",
    "liger_kernel.ops.fused_moe": "Liger",
}
"""Peers without an adapter here: none could be checked against an installed version."""


@dataclass(frozen=True)
class Inputs:
    """What every candidate gets."""

    shape: Shape
    x: Tensor
    experts: Tensor
    gates: Tensor
    w1: Tensor
    w2: Tensor
    grad: Tensor

    def leaves(self) -> list[Tensor]:
        return [t.requires_grad_() for t in (self.x, self.gates, self.w1, self.w2)]


Candidate = Callable[[Inputs], Tensor]


def choose(shape: Shape, load: str, device: torch.device) -> Tensor:
    """(T, K) experts, distinct for each token, whose largest load is 1 or 4 times the mean, or all there is."""
    T, E, K = shape.T, shape.E, shape.K
    slots = torch.arange(T * K, device=device).view(T, K)
    if load == "all to the same":
        return slots % K
    if load == "balanced" or E <= K:
        return slots % E
    others = 1 + slots % (E - 1)
    often = torch.arange(T, device=device) * min(4 * K / E, 1.0)
    chosen = often.floor() != (often + min(4 * K / E, 1.0)).floor()
    others[chosen, 0] = 0
    return others


def make_inputs(shape: Shape, load: str, device: torch.device, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    T, D, width, E, K = shape.T, shape.D, shape.F, shape.E, shape.K
    draw = {"device": device, "dtype": dtype}
    gates = torch.rand(T * K, device=device)
    w1, w2 = torch.randn(E, 2, width, D, **draw) / D**0.5, torch.randn(E, D, width, **draw) / width**0.5
    x, grad = torch.randn(T, D, **draw), torch.randn(T, D, **draw)
    return Inputs(shape, x, choose(shape, load, device), gates, w1, w2, grad)


def ours(backend: Backend) -> Candidate:
    def run(inputs: Inputs) -> Tensor:
        plan = plan_choice(inputs.experts, inputs.shape.E, backend=backend)
        return expert_mlp(inputs.x, inputs.gates, inputs.w1, inputs.w2, plan, kind="swiglu", backend=backend)

    return run


def our_layer(inputs: Inputs) -> Candidate:
    """The module, router included; its choice is then replaced, so that the load is the one asked for."""
    shape = inputs.shape
    with torch.device("meta"):
        moe = MoE(
            MoE.Config(num_experts=shape.E, hidden=shape.F, router=TopKRouter.Config(k=shape.K)), shape.D
        )
    gate = torch.randn(shape.E, shape.D, device=inputs.x.device, dtype=inputs.x.dtype)
    moe.router.to_empty(device=inputs.x.device)
    assert moe.bank is not None
    with torch.no_grad():
        moe.router.gate.data = gate
    for name in ("w1", "w2"):
        setattr(moe.bank, name, torch.nn.Parameter(getattr(inputs, name), requires_grad=True))

    def run(inputs: Inputs) -> Tensor:
        routing = moe.route(RouterInput(tokens=inputs.x, mode="train"))
        gates = inputs.gates + 0 * routing.weights
        routing = dataclasses.replace(routing, experts=inputs.experts.flatten(), weights=gates)
        assert moe.bank is not None
        moe.bank.w1.grad = moe.bank.w2.grad = None
        return moe(inputs.x, routing)

    return run


def loop(inputs: Inputs) -> Tensor:
    """Expert by expert, as models are first written."""
    y = torch.zeros_like(inputs.x, dtype=torch.promote_types(inputs.x.dtype, torch.float32))
    gates = inputs.gates.view_as(inputs.experts)
    for expert, (first, second) in enumerate(zip(inputs.w1.unbind(), inputs.w2.unbind(), strict=True)):
        tokens, slots = torch.where(inputs.experts == expert)
        gate, up = (inputs.x[tokens] @ matrix.T for matrix in first)
        out = (F.silu(gate) * up) @ second.T
        y = y.index_add(0, tokens, out * gates[tokens, slots][:, None])
    return y.to(inputs.x.dtype)


def scattermoe(inputs: Inputs) -> Candidate:
    mlp = import_module("scattermoe.mlp")
    shape = inputs.shape
    with torch.device("meta"):
        module = mlp.GLUMLP(shape.D, shape.F, shape.E, shape.K, activation=torch.nn.SiLU())

    def run(inputs: Inputs) -> Tensor:
        module.experts.weight = torch.nn.Parameter(inputs.w1.flip(1).flatten(1, 2))  # up first
        module.output_experts.weight = torch.nn.Parameter(inputs.w2)
        gates = inputs.gates.view_as(inputs.experts).to(inputs.x.dtype)
        return module(inputs.x, gates, inputs.experts)

    return run


def transformers(inputs: Inputs) -> Candidate:
    from peers import layer_peers

    shape = inputs.shape
    with torch.device("meta"):
        peer = layer_peers(shape.D, shape.F, shape.E, shape.K, dtype=inputs.x.dtype)["Qwen3-MoE grouped_mm"]
    experts: Any = peer.block.experts
    experts.gate_up_proj = torch.nn.Parameter(inputs.w1.flatten(1, 2))
    experts.down_proj = torch.nn.Parameter(inputs.w2)

    def run(inputs: Inputs) -> Tensor:
        experts.gate_up_proj.grad = experts.down_proj.grad = None
        gates = inputs.gates.view_as(inputs.experts).to(inputs.x.dtype)
        return experts(inputs.x, inputs.experts, gates)

    return run


def dense(inputs: Inputs) -> tuple[Callable[[], object], Callable[[], object]]:
    """torch.matmul of equal FLOPs: forward, and forward with backward."""
    shape = inputs.shape
    rows, kind = shape.T * shape.K, {"device": inputs.x.device, "dtype": inputs.x.dtype}
    x, hidden, both = (torch.randn(rows, n, **kind) for n in (shape.D, shape.F, 2 * shape.F))
    w1, w2 = torch.randn(2 * shape.F, shape.D, **kind), torch.randn(shape.D, shape.F, **kind)

    def forward() -> object:
        return x @ w1.T, hidden @ w2.T

    def all_of_it() -> object:
        return forward(), x @ w2, both @ w1, x.T @ hidden, both.T @ x

    return forward, all_of_it


def candidates(inputs: Inputs) -> tuple[dict[str, Candidate], list[str]]:
    """What runs here, and why others do not."""
    found: dict[str, Candidate] = {
        "moesaic": ours("auto"),
        "F.grouped_mm": ours("torch"),
        "Python loop": loop,
    }
    skipped = []
    makers = {"moesaic, with router": our_layer, "ScatterMoE": scattermoe, "transformers": transformers}
    for name, make in makers.items():
        try:
            found[name] = make(inputs)
        except Exception as error:
            skipped.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    for module, name in ABSENT.items():
        try:
            import_module(module)
            skipped.append(f"{name}: installed, but there is no adapter for it here")
        except Exception as error:
            skipped.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
    return found, skipped


def difference(got: list[Tensor | None], want: list[Tensor | None]) -> float:
    """The largest max|a - b| / max|b| of all pairs; infinite where something is not finite."""
    errors = [0.0]
    for one, other in zip(got, want, strict=True):
        if one is not None and other is not None:
            error = (one.float() - other.float()).abs().max() / other.float().abs().max()
            errors.append(float(error) if bool(error.isfinite()) else float("inf"))
    return max(errors)


def results_of(candidate: Candidate, inputs: Inputs) -> list[Tensor | None]:
    """Output and gradients of tokens, gates and weights; None for weights of which a peer has copies of its own."""
    leaves = inputs.leaves()
    y = candidate(inputs)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.grad, allow_unused=True)]


def step(candidate: Candidate, inputs: Inputs) -> Callable[[], object]:
    def call() -> None:
        for leaf in inputs.leaves():
            leaf.grad = None
        candidate(inputs).backward(inputs.grad)

    return call


def forward_only(candidate: Candidate, inputs: Inputs) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return candidate(inputs)

    return call


def measure(inputs: Inputs, rounds: int, ceiling: float) -> tuple[str, list[str]]:
    """A table of everything that computes the same, and notes on what does not."""
    found, notes = candidates(inputs)
    want = results_of(loop, inputs)
    for name in list(found):
        try:
            error = difference(results_of(found[name], inputs), want)
        except Exception as error_:
            notes.append(f"{name}: {type(error_).__name__}: {str(error_)[:100]}")
            del found[name]
            continue
        if error > TOLERANCE[inputs.x.dtype]:
            notes.append(f"{name}: differs by {error:.1e}; no speed for another function")
            del found[name]
    del want
    rows = {name: [name] for name in ["dense products", *found]}
    products = dense(inputs)
    for backward in (False, True):
        run = step if backward else forward_only
        calls: dict[str, Callable[[], object]] = {"dense products": products[backward]}
        calls |= {name: run(candidate, inputs) for name, candidate in found.items()}
        memory = {name: peak(call) for name, call in calls.items()}
        timings = interleave(calls, rounds=rounds, threads=torch.get_num_threads())
        for name in calls:
            rate = inputs.shape.flops(backward=backward) / timings.time(name).median
            share = f"{rate / ceiling:.0%}" if ceiling else "-"
            took = timings.time(name).text(scale=1e3, digits=2)
            rows[name] += [took, f"{rate / 1e12:.0f}", share, f"{memory[name] / 2**30:.1f}"]
    head = ["ms", "TFLOP/s", "of ceiling", "GiB"]
    header = ["", *(f"forward {h}" for h in head), *(f"with backward {h}" for h in head)]
    size = inputs.x.element_size()
    for backward, what in ((False, "forward"), (True, "with backward")):
        moved = inputs.shape.our_bytes(size, backward=backward)
        least = inputs.shape.least_bytes(size, backward=backward)
        notes.append(
            f"moesaic {what}: tensors of {moved / 1e9:.2f} GB cross memory; no fewer than {least / 1e9:.2f}"
        )
    return table(header, list(rows.values())), notes


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most, beyond those that were before; compiles what the call needs."""
    if not torch.cuda.is_available():
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings() -> tuple[float, float]:
    """Bytes per second of a copy on the device, read and written, and FLOP/s of a large bf16 product."""
    source, n = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_(), 8192
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timings = interleave({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, rounds=9, warmup=3)
    return 2 * source.numel() / timings.time("copy").median, 2.0 * n**3 / timings.time("product").median


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments.add_argument("--loads", nargs="+", default=list(LOADS), choices=list(LOADS))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument(
        "--dry", action="store_true", help="a tiny shape on the CPU; measures nothing of use"
    )
    options = arguments.parse_args()
    if not options.dry and not torch.cuda.is_available():
        sys.exit(
            "moe_gpu: no CUDA device here, so there is nothing to measure (--dry runs the code on the CPU)"
        )
    device = torch.device("cpu" if options.dry else "cuda")
    dtype = torch.float32 if options.dry else torch.bfloat16
    shapes = DRY if options.dry else {name: SHAPES[name] for name in options.shapes}
    sections, ceiling = [], 0.0
    if not options.dry:
        bandwidth, ceiling = ceilings()
        sections.append(
            f"Ceilings: copy {bandwidth / 1e12:.2f} TB/s, bf16 product of 8192 cubed {ceiling / 1e12:.0f} TFLOP/s."
        )
        print(sections[0], flush=True)
    for name, shape in shapes.items():
        if not options.dry:
            write(sections)
        for load in options.loads:
            inputs = make_inputs(shape, load, device, dtype)
            most = (
                torch.bincount(inputs.experts.flatten(), minlength=shape.E).max()
                * shape.E
                / inputs.experts.numel()
            )
            text, notes = measure(inputs, options.rounds, ceiling)
            title = f"## {name}: T {shape.T}, D {shape.D}, F {shape.F}, E {shape.E}, K {shape.K}; {load}"
            notes.insert(0, f"largest load {float(most):.1f} times the mean")
            sections.append("\n\n".join([title, text, "\n".join(f"- {note}" for note in notes)]))
            print(sections[-1], flush=True)
            del inputs
    if not options.dry:
        write(sections)


def write(sections: list[str]) -> None:
    """The result so far: a run that is cut short leaves what it has."""
    if torch.cuda.is_available() and len(sections) > 1:
        write_result(
            "moe_gpu", "One MoE layer on a GPU", "python bench/moe_gpu.py", torch.get_num_threads(), sections
        )


if __name__ == "__main__":
    main()
