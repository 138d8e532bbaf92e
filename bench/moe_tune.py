"""Launch constants of the Triton kernels for many rows, on a GPU: the shipped ones of each product against others.

One product gets other constants at a time, and whole steps are timed, forward and backward, at balanced load. Constants
with which the kernels fail or compute something else get no time. Results: bench/results/moe_tune.md.

    python bench/moe_tune.py [--shapes Qwen3-30B-A3B] [--rounds 5]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import torch
from moe_gpu import SHAPES, TOLERANCE, Inputs, difference, make_inputs, ours, results_of, step
from timing import interleave, table, write_result

from moesaic.kernels.triton.expert_mlp import constants
from moesaic.kernels.triton.grouped import Blocks

OTHERS = {
    "hidden": [
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 8, 4, parts=4, tma=True),
        Blocks(128, 64, 64, 4, 3, 2, parts=4, tma=True),
    ],
    "product": [
        Blocks(128, 128, 64, 4, 3, 2),
        Blocks(128, 256, 64, 8, 3, tma=True),
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 8, 3, 2, tma=True),
    ],
    "deep product": [
        Blocks(128, 256, 64, 8, 3),
        Blocks(128, 256, 64, 8, 4, tma=True),
        Blocks(128, 128, 64, 4, 3, 2, tma=True),
    ],
    "gradient": [
        Blocks(128, 256, 64, 8, 3, parts=4),
        Blocks(128, 128, 64, 8, 3, parts=4, tma=True),
        Blocks(128, 128, 64, 8, 4, parts=4, tma=True),
    ],
    "outer": [
        Blocks(128, 256, 64, 8, 4),
        Blocks(128, 128, 64, 4, 3, 2),
        Blocks(128, 128, 64, 8, 3, 2),
    ],
}
"""What else to try, by product. All tiles of one table have the same rows: they share a list of tiles."""


def tune(
    inputs: Inputs, choices: dict[str, Blocks], others: Mapping[str, Sequence[Blocks]], rounds: int
) -> list[list[str]]:
    """Product, tile, launch and time of a step, for the constants in `choices`, which are put back, and the others."""
    want = results_of(ours("triton"), inputs)
    rows = []
    for role, tried in others.items():
        shipped = choices[role]
        for blocks in [shipped, *tried]:
            choices[role] = blocks
            try:
                error = difference(results_of(ours("triton"), inputs), want)
                if error > TOLERANCE[inputs.x.dtype]:
                    raise ValueError(f"differs by {error:.1e}")
                timings = interleave({"step": step(ours("triton"), inputs)}, rounds=rounds, warmup=2)
                took = timings.time("step").text(scale=1e3, digits=2)
            except Exception as failure:
                took = f"{type(failure).__name__}: {failure}".splitlines()[0][:60]
            finally:
                choices[role] = shipped
            rows.append([role, f"{blocks.m} x {blocks.n} x {blocks.k}", launch(blocks, shipped), took])
    return rows


def launch(blocks: Blocks, shipped: Blocks) -> str:
    text = f"{blocks.warps} warps, {blocks.stages} stages, {blocks.per_sm} per SM, {blocks.parts} parts"
    return text + (", TMA" if blocks.tma else "") + (", shipped" if blocks is shipped else "")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--shapes", nargs="+", default=["Qwen3-30B-A3B"], choices=list(SHAPES))
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    if not torch.cuda.is_available():
        sys.exit("moe_tune: no CUDA device here, so there is nothing to measure")
    sections = []
    for name in options.shapes:
        shape = SHAPES[name]
        inputs = make_inputs(shape, "balanced", torch.device("cuda"), torch.bfloat16)
        choices = constants(inputs.x.device, inputs.x.dtype, shape.T * shape.K // shape.E)
        rows = tune(inputs, choices, OTHERS, options.rounds)
        header = ["product", "tile", "launch", "ms of a step"]
        sections.append(f"## {name}, balanced\n\n{table(header, rows)}")
        print(sections[-1], flush=True)
        write_result(
            "moe_tune",
            "Launch constants on a GPU",
            "python bench/moe_tune.py " + " ".join(sys.argv[1:]),
            torch.get_num_threads(),
            sections,
        )


if __name__ == "__main__":
    main()
