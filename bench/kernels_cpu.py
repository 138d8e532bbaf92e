"""The kernels of the CPU against plain torch code, and how their time grows.

Outputs and gradients are compared before anything is timed. Results: bench/results/kernels_cpu.md, written when every
section ran; what `--only` names is printed.

    python bench/kernels_cpu.py [--only tables] [--rounds 9] [--threads 1]
"""

import argparse
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from auction import auction_section
from timing import Timings, interleave, refuse_other_results, table, write_result
from torch import Tensor

from moesaic.kernels import native
from moesaic.kernels.combine import sum_rows
from moesaic.kernels.embedding_bag import weighted_bag
from moesaic.kernels.neurons import neuron_mix
from moesaic.kernels.pages import ask_for_large_pages
from moesaic.kernels.plan import plan_choice
from moesaic.kernels.topk import choose
from moesaic.moe import MoE, RouterInput, TopKRouter
from moesaic.train.device import tune_host

Calls = dict[str, Callable[[], object]]
TOLERANCE = 1e-5
"""Largest difference over the largest value, between two orders of sums in fp32."""

D, HEADS, PER_HEAD, KEY_DIM, T = 256, 8, 16, 128, 2048
LARGE, SMALL = 1024**2, 128**2
"""Rows of a table: squares, as product keys have them."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    tune_host()
    print(native.status())
    sections = []
    for name in options.only:
        for text in SECTIONS[name](options.rounds, options.threads):
            print(text, flush=True)
            sections.append(text)
    if set(options.only) == set(SECTIONS):
        command = f"python bench/kernels_cpu.py --rounds {options.rounds} --threads {options.threads}"
        write_result("kernels_cpu", "Kernels of the CPU", command, options.threads, sections)


def compare(name: str, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """ValueError where outputs or gradients differ; sparse ones are compared row by row."""
    for i, pair in enumerate(zip(got, want, strict=True)):
        mine, known = (t.detach().coalesce() if t.is_sparse else t.detach() for t in pair)
        if mine.is_sparse:
            if not torch.equal(mine.indices(), known.indices()):
                raise ValueError(f"{name}: gradient {i} is of other rows; no times for different functions")
            mine, known = mine.values(), known.values()
        refuse_other_results(f"{name}, result {i}", mine, known, TOLERANCE)


def with_gradients(call: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of the leaves."""
    y = call()
    return y, *torch.autograd.grad(y, leaves, grad)


# tables: reads of rows, whose time must not grow with the table


def tables(rounds: int, threads: int) -> list[str]:
    """Single neurons and weighted bags on a small and a large table, forward and backward with row-sparse gradients."""
    per_token = HEADS * PER_HEAD
    sizes = f"D {D}, {HEADS} heads of {PER_HEAD} ({per_token} slots), T {T}, float32, random slots"
    growth, peers = [], []
    for pages in ("2 MiB", "4 KiB"):
        timings, timed_peers = time_tables(pages, rounds, threads)
        peers += timed_peers
        for what in ("forward", "forward and backward"):
            growth.append(
                [
                    f"{what}, pages of {pages}",
                    *(
                        timings.time(f"{what} {rows}").text(scale=1e6 / T, digits=1)
                        for rows in (SMALL, LARGE)
                    ),
                    timings.ratio(f"{what} {LARGE}", f"{what} {SMALL}").text(),
                ]
            )
    scored = interleave(
        {f"keys {rows}": scoring(rows) for rows in (SMALL, LARGE)}, rounds=rounds, threads=threads
    )
    growth.append(
        [
            "scoring product keys, forward",
            *(scored.time(f"keys {rows}").text(scale=1e6 / T, digits=1) for rows in (SMALL, LARGE)),
            scored.ratio(f"keys {LARGE}", f"keys {SMALL}").text(),
        ]
    )
    header = ["us per token", f"N {SMALL:,}", f"N {LARGE:,}", "large / small"]
    peer_header = [
        "ms per call, N " + f"{LARGE:,}, pages of 2 MiB",
        "moesaic",
        "plain torch",
        "torch / moesaic",
    ]
    notes = (
        f"{sizes}. Gradients of tables are row-sparse. Scoring is apart: {HEADS} queries of {KEY_DIM} against "
        "two sets of sub-keys, plain torch. Pages of 2 MiB: the tables were allocated with `ask_for_large_pages`."
    )
    plain = (
        "Plain torch: `F.embedding_bag` with `per_sample_weights`, and for neurons `F.embedding` and einsum, both with "
        "sparse gradients (not coalesced: torch leaves that to the optimizer)."
    )
    return [
        f"## Tables: a million single neurons (PEER), and weighted bags\n\n{notes}\n\n{table(header, growth)}",
        f"{plain}\n\n{table(peer_header, peers)}",
    ]


def time_tables(pages: str, rounds: int, threads: int) -> tuple[Timings, list[list[str]]]:
    """Times of neurons by call and rows; with large pages also rows of the comparison with plain torch."""
    large = pages == "2 MiB"
    pairs = {rows: [new_table(rows, large=large) for _ in range(2)] for rows in (SMALL, LARGE)}
    calls: Calls = {}
    for rows, pair in pairs.items():
        forward, both = neuron_calls(*pair)["moesaic"]
        calls[f"forward {rows}"], calls[f"forward and backward {rows}"] = forward, both
    timings = interleave(calls, rounds=rounds, threads=threads)
    if not large:
        return timings, []
    compared = []
    for name, candidates in (("neurons", neuron_calls(*pairs[LARGE])), ("bag", bag_calls(pairs[LARGE][1]))):
        compare(f"plain {name}", candidates["plain"][1](), candidates["moesaic"][1]())
        for i, what in enumerate(("forward", "forward and backward")):
            both_ways: Mapping[str, Callable[[], object]] = {who: call[i] for who, call in candidates.items()}
            taken = interleave(both_ways, rounds=max(3, rounds // 2), warmup=1, threads=threads)
            compared.append(
                [
                    f"{name}, {what}",
                    *(taken.time(who).text(scale=1e3, digits=0) for who in ("moesaic", "plain")),
                    taken.ratio("plain", "moesaic").text(),
                ]
            )
    return timings, compared


Pair = tuple[Callable[[], object], Callable[[], tuple[Tensor, ...]]]
"""Forward alone, and with gradients."""


def new_table(rows: int, *, large: bool) -> Tensor:
    memory = torch.empty(rows, D)
    if large:
        ask_for_large_pages(memory)
    return memory.normal_(0, D**-0.5).requires_grad_()


def reads(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, slots, weights and the gradient of the output."""
    torch.manual_seed(0)
    weights = torch.randn(T, HEADS, PER_HEAD).softmax(-1).flatten(1).requires_grad_()
    slots = torch.randint(0, rows, (T, HEADS * PER_HEAD))
    return torch.randn(T, D).requires_grad_(), slots, weights, torch.randn(T, D)


def neuron_calls(u: Tensor, v: Tensor) -> dict[str, Pair]:
    """Ours, and the plain composition."""
    x, slots, weights, grad = reads(u.shape[0])

    def ours() -> Tensor:
        return neuron_mix(x, u, v, slots, weights, sparse_grad=True)

    def plain() -> Tensor:
        before = torch.einsum("td,tsd->ts", x, F.embedding(slots, u, sparse=True))
        return torch.einsum("ts,tsd->td", F.gelu(before) * weights, F.embedding(slots, v, sparse=True))

    return pairs_of({"moesaic": ours, "plain": plain}, [x, u, v, weights], grad)


def bag_calls(values: Tensor) -> dict[str, Pair]:
    """Ours, and torch's."""
    _, slots, weights, grad = reads(values.shape[0])

    def ours() -> Tensor:
        return weighted_bag(values, slots, weights, sparse_grad=True)

    def plain() -> Tensor:
        return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights, sparse=True)

    return pairs_of({"moesaic": ours, "plain": plain}, [values, weights], grad)


def pairs_of(
    calls: Mapping[str, Callable[[], Tensor]], leaves: list[Tensor], grad: Tensor
) -> dict[str, Pair]:
    def alone(call: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(call)

    return {
        name: (alone(call), lambda call=call: with_gradients(call, leaves, grad))
        for name, call in calls.items()
    }


def scoring(rows: int) -> Callable[[], object]:
    """The slots that product keys pick: the best of the sums of the best of two halves."""
    root = round(rows**0.5)
    halves = [torch.randn(HEADS, root, KEY_DIM // 2) for _ in range(2)]
    queries = torch.randn(HEADS, T, KEY_DIM)

    def score() -> tuple[Tensor, Tensor]:
        parts = [q @ keys.mT for q, keys in zip(queries.chunk(2, -1), halves, strict=True)]
        (one, i), (two, j) = (part.topk(PER_HEAD, -1) for part in parts)
        sums = (one[..., :, None] + two[..., None, :]).flatten(-2)
        best, place = sums.topk(PER_HEAD, -1)
        first, second = i.gather(-1, place // PER_HEAD), j.gather(-1, place % PER_HEAD)
        return first * root + second, best.softmax(-1)

    return score


LAYER = (512, 256, 64, 8, 4096)
"""D, F, E, K, T of the layer whose parts are timed."""


def routing(rounds: int, threads: int) -> list[str]:
    """What is not arithmetic of experts, each part on its own, against the whole layer, forward and backward.

    The layer gathers and sums within its kernel, out of the cache: apart from it, these parts can only take longer.
    """
    return [routing_of(dtype, rounds, threads) for dtype in (torch.float32, torch.bfloat16)]


def routing_of(dtype: torch.dtype, rounds: int, threads: int) -> str:
    width, hidden, experts, k, tokens = LAYER
    torch.manual_seed(0)
    layer = MoE(MoE.Config(num_experts=experts, hidden=hidden, router=TopKRouter.Config(k=k)), width).to(
        dtype
    )
    x, grad = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    logits = torch.randn(tokens, experts, requires_grad=True)
    weights_grad = torch.randn(tokens, k)
    chosen, weights, _ = choose(logits, torch.zeros(experts), k)
    plan, gates = plan_choice(chosen, experts), weights.detach().flatten()
    rows = torch.randn(tokens * k, width).to(dtype)

    def whole() -> object:
        leaf = x.detach().requires_grad_()
        routing = layer.route(RouterInput(tokens=leaf, mode="train"))
        return layer(leaf, routing).backward(grad)

    calls: Calls = {
        "whole layer": whole,
        "scores and choice": lambda: choose(logits, torch.zeros(experts), k)[1].backward(weights_grad),
        "plan": lambda: plan_choice(chosen, experts),
        "rows of x and of its gradient": lambda: [x.index_select(0, plan.tokens) for _ in range(2)],
        "sums over rows, forward and backward": lambda: [
            sum_rows(rows, plan.where, plan.offsets, scales, per_token=k) for scales in (gates, None)
        ],
    }
    timings = interleave(calls, rounds=rounds, threads=threads)
    shares = [
        [
            name,
            timings.time(name).text(scale=1e3, digits=1),
            timings.ratio(name, "whole layer").text(scale=100, digits=1),
        ]
        for name in calls
    ]
    title = f"Parts of a layer, D {width}, F {hidden}, E {experts}, K {k}, T {tokens}, "
    title += f"{str(dtype).removeprefix('torch.')}, {threads} thr."
    return f"## {title}\n\n{table(['', 'ms', '% of the layer'], shares)}"


def assignment(rounds: int, threads: int) -> list[str]:
    """Balanced assignment against scipy, which takes minutes: one round."""
    return [auction_section(1, threads)]


SECTIONS: dict[str, Callable[[int, int], list[str]]] = {
    "routing": routing,
    "assignment": assignment,
    "tables": tables,
}
"""What can be timed, by name: from rounds and threads to Markdown."""

if __name__ == "__main__":
    main()
