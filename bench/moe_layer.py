"""One MoE layer, forward and backward, against dense products of equal FLOPs and the MoE blocks of transformers
(all but `batched_mm`, which copies weights for every assignment).

Same weights and tokens on all sides; outputs and gradients are compared before anything is timed. Results:
bench/results/moe_layer.md, with suffixes for a busy core and for bf16 alone.

    python bench/moe_layer.py [--threads 1 2] [--rounds 9] [--dtypes float32 bfloat16] [--shapes 0 1 2] [--busy]

`--busy` keeps one core occupied by another process meanwhile.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peers import LayerPeer, LayerTensors, layer_peers
from timing import Timings, interleave, refuse_other_results, table, write_result
from torch import Tensor

from moesaic.kernels.backend import Backend
from moesaic.moe import MoE, RouterInput, TopKRouter
from moesaic.train.device import tune_host

SHAPES = [(512, 1024, 8, 2, 4096), (512, 256, 64, 8, 4096), (1024, 512, 32, 4, 2048)]
"""D, F, E, K, T."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference over the largest value, between two ways to round."""
SLOW = "batched_mm"
"""Copies weights for every assignment: gigabytes at these sizes."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    arguments.add_argument("--busy", action="store_true")
    options = arguments.parse_args()
    tune_host()
    sections = []
    with spinning(processes=int(options.busy)):
        for shape in (SHAPES[i] for i in options.shapes):
            for dtype in (getattr(torch, name) for name in options.dtypes):
                calls = candidates(shape, dtype)
                timed = [
                    interleave(calls, rounds=options.rounds, threads=threads) for threads in options.threads
                ]
                sections.append(section(shape, dtype, timed))
                print(sections[-1], flush=True)
    command = "python bench/moe_layer.py " + " ".join(sys.argv[1:])
    name = "moe_layer_busy" if options.busy else "moe_layer"
    name += "_bfloat16" if options.dtypes == ["bfloat16"] else ""
    write_result(name, "One MoE layer, forward and backward", command.strip(), max(options.threads), sections)


@contextmanager
def spinning(*, processes: int) -> Iterator[None]:
    """That many processes that do nothing but take processor time."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def candidates(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, by name; ValueError where two of them compute different things."""
    D, F, E, K, T = shape
    torch.manual_seed(0)
    ours = MoE(MoE.Config(num_experts=E, hidden=F, router=TopKRouter.Config(k=K)), D)
    assert ours.bank is not None
    x, grad = torch.randn(T, D).to(dtype), torch.randn(T, D).to(dtype)
    separate_logits(ours.router.gate, x)
    ours.to(dtype)
    weights = LayerTensors(ours.router.gate.detach(), ours.bank.w1.detach(), ours.bank.w2.detach())
    peers = {name: peer for name, peer in layer_peers(D, F, E, K, dtype=dtype).items() if SLOW not in name}

    def our_layer(x: Tensor) -> Tensor:
        return ours(x, ours.route(RouterInput(tokens=x, mode="train")))

    def on_backend(backend: Backend) -> tuple[Tensor, Tensor]:
        ours.zero_grad()
        before, ours.experts.backend = ours.experts.backend, backend
        try:
            return outputs(our_layer, x, grad)
        finally:
            ours.experts.backend = before

    def our_results(backend: Backend) -> list[Tensor]:
        seen = on_backend(backend)
        assert ours.bank is not None
        found = [p.grad for p in (ours.router.gate, ours.bank.w1, ours.bank.w2) if p.grad is not None]
        return [*seen, *(gradient.clone() for gradient in found)]

    want = our_results("auto")
    compare("plain torch", our_results("torch"), want, dtype)
    for name, peer in peers.items():
        peer.load(weights)
        seen, found = outputs(peer, x, grad), peer.gradients()
        compare(name, [*seen, found.gate, found.w1, found.w2], want, dtype)
    calls: dict[str, Callable[[], object]] = {"dense products": dense_products(shape, dtype)}
    calls["moesaic"] = lambda: on_backend("auto")
    calls["moesaic, plain torch"] = lambda: on_backend("torch")
    for name, peer in peers.items():
        calls[name] = lambda peer=peer: (peer.zero_grad(), outputs(peer, x, grad))
    return calls


def outputs(layer: Callable[[Tensor], Tensor] | LayerPeer, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output and the gradient of its input; gradients of weights are left where they are."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(grad)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@torch.no_grad()
def separate_logits(gate: Tensor, x: Tensor) -> None:
    """Every token's logits are its first E features, E distinct numbers in random order, exact in bf16: layers that
    round logits differently would otherwise send tokens to different experts."""
    E = len(gate)
    gate.copy_(torch.eye(E, gate.shape[1]))
    x[:, :E] = torch.rand(len(x), E).argsort(-1) / (E / 4) - 2


def compare(name: str, got: Sequence[Tensor], want: Sequence[Tensor], dtype: torch.dtype) -> None:
    for what, theirs, ours in zip(("y", "x", "gate", "w1", "w2"), got, want, strict=True):
        refuse_other_results(f"{name}, {what}", theirs, ours, TOLERANCE[dtype])


def dense_products(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
    """The matrix products of a dense SwiGLU with the arithmetic of the active experts: three forward, six backward."""
    D, F, _, K, T = shape
    x, hidden = torch.randn(T, D).to(dtype), torch.randn(T, K * F).to(dtype)
    w1, w2 = torch.randn(2 * K * F, D).to(dtype), torch.randn(D, K * F).to(dtype)
    both = torch.randn(T, 2 * K * F).to(dtype)

    def products() -> None:
        x @ w1.T, hidden @ w2.T
        x @ w2, both @ w1, x.T @ hidden, both.T @ x

    return products


def section(shape: tuple[int, ...], dtype: torch.dtype, timed: list[Timings]) -> str:
    """One table: a row per candidate, time and ratio per number of threads."""
    D, F, E, K, T = shape
    header = [""]
    for timings in timed:
        header += [f"ms, {timings.threads} thr.", "/ dense"]
    rows = []
    for name in timed[0].seconds:
        cells = [name]
        for timings in timed:
            cells += [
                timings.time(name).text(scale=1e3, digits=0),
                timings.ratio(name, "dense products").text(),
            ]
        rows.append(cells)
    kind = str(dtype).removeprefix("torch.")
    return f"## D {D}, F {F}, E {E}, K {K}, T {T}, {kind}\n\n{table(header, rows)}"


if __name__ == "__main__":
    main()
