"""The experts of a layer in Triton: seven kernels forward and backward, none of which waits for the host.

Forward: hidden layer with its non-linearity, second product, weighted sum. Backward: gradient of the hidden layer, two
weight gradients, gradient of the rows and its sum. Constants are read from a table, not searched for at the start.

Dims: T tokens, R rows, D width, F hidden width, G input matrices, E experts.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.kernels.triton.combine import combine, combine_kernel, gate_gradient_kernel, gate_gradients
from moesaic.kernels.triton.grouped import (
    GROUP_M,
    Blocks,
    cut_kernel,
    cut_rows,
    outer,
    outer_kernel,
    product,
    product_kernel,
)
from moesaic.kernels.triton.hidden import (
    hidden_gradient,
    hidden_gradient_kernel,
    hidden_kernel,
    hidden_layer,
)
from moesaic.kernels.triton.variant import INTERPRETED, Variant

if TYPE_CHECKING:
    from moesaic.kernels.expert_mlp import Routes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(
    x: Tensor, w1: Tensor, w2: Tensor, counts: Tensor, routes: "Routes | None", kind: str, backend: Any
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its non-linearity."""
    tokens = None if routes is None else routes.tokens
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    if rows == 0:
        return torch.zeros_like(x), x.new_empty(0, w1.shape[1] * w1.shape[2])
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    table = constants(x.dtype, rows // w1.shape[0])
    with torch.cuda.device_of(x):
        tiles = cut_rows(counts, rows, table["hidden"].m)
        first = table["hidden" if w1.shape[1] == 2 else "hidden, one matrix"]
        hidden, active = hidden_layer(x, w1, tokens, tiles, rows, first, kind=kind)
        out = product(active, w2, tiles, deep(table, active), transposed=True)
        if routes is not None:
            out = combine(out, routes.where, routes.offsets, routes.gates, routes.per_token)
    return out, hidden


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    hidden: Tensor,
    counts: Tensor,
    routes: "Routes | None",
    kind: str,
    backend: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, w1, w2 and the gates."""
    rows = hidden.shape[0]
    if rows == 0:
        grad_gates = None if routes is None else torch.zeros_like(routes.gates)
        return torch.zeros_like(x), torch.zeros_like(w1), torch.zeros_like(w2), grad_gates
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    table = constants(x.dtype, rows // w1.shape[0])
    tokens, order, gates = (None,) * 3 if routes is None else (routes.tokens, routes.order, routes.gates)
    with torch.cuda.device_of(x):
        tiles = cut_rows(counts, rows, table["hidden"].m)
        grad_hidden, active, partial = hidden_gradient(
            grad, w2, hidden, tokens, order, gates, tiles, table["gradient"], kind=kind
        )
        grad_gates = None if routes is None else gate_gradients(partial, routes.where, routes.gates.dtype)
        grad_w2 = outer(grad, active, tokens, counts, tiles.starts, table["outer"], gather="left")
        del active, partial
        grad_w1 = outer(grad_hidden, x, tokens, counts, tiles.starts, table["outer"], gather="right")
        grad_x = product(
            grad_hidden, w1.flatten(1, 2), tiles, deep(table, grad_hidden), transposed=False
        )
        if routes is not None:
            grad_x = combine(grad_x, routes.where, routes.offsets, None, routes.per_token)
    return grad_x, grad_w1.view_as(w1), grad_w2, grad_gates


DEEP = 1024
"""From so many inputs on a product's epilogue is short beside it, and one large tile per multiprocessor is best."""
TABLES = {
    # On a GPU try first: 4 stages of the large tiles on Hopper; "gradient" with 4 warps; per_sm 2 with 8 warps.
    "many rows": {
        "hidden": Blocks(128, 128, 64, 8, 3),
        "hidden, one matrix": Blocks(128, 256, 64, 8, 3),
        "product": Blocks(128, 128, 64, 4, 3, 2),
        "deep product": Blocks(128, 256, 64, 8, 3),
        "gradient": Blocks(128, 128, 64, 8, 3),
        "outer": Blocks(128, 256, 64, 8, 3),
    },
    "some rows": {
        "hidden": Blocks(64, 128, 64, 4, 3, 2),
        "hidden, one matrix": Blocks(64, 256, 64, 4, 3, 2),
        "product": Blocks(64, 128, 64, 4, 3, 2),
        "deep product": Blocks(64, 256, 64, 4, 3, 2),
        "gradient": Blocks(64, 128, 64, 4, 3, 2),
        "outer": Blocks(128, 128, 32, 4, 4, 2),
    },
    "few rows": {
        "hidden": Blocks(16, 64, 128, 4, 3, 2),
        "hidden, one matrix": Blocks(16, 128, 128, 4, 3, 2),
        "product": Blocks(16, 128, 128, 4, 3, 2),
        "deep product": Blocks(16, 128, 128, 4, 3, 2),
        "gradient": Blocks(16, 128, 128, 4, 3, 2),
        "outer": Blocks(128, 128, 16, 4, 4, 2),
    },
    "fp32": dict.fromkeys(
        ("hidden", "hidden, one matrix", "product", "deep product", "gradient", "outer"),
        Blocks(64, 64, 16, 4, 2, 2),
    ),
    "interpreted": dict.fromkeys(
        ("hidden", "hidden, one matrix", "product", "deep product", "gradient", "outer"),
        Blocks(16, 32, 32, 4, 1),
    ),
}


def constants(dtype: torch.dtype, rows_per_expert: int) -> dict[str, Blocks]:
    """Launch constants of every product."""
    if INTERPRETED:
        return TABLES["interpreted"]
    if dtype == torch.float32:  # exact products run outside of the tensor cores
        return TABLES["fp32"]
    if rows_per_expert >= 96:
        return TABLES["many rows"]
    return TABLES["some rows"] if rows_per_expert >= 24 else TABLES["few rows"]


def deep(table: dict[str, Blocks], rows: Tensor) -> Blocks:
    """The constants of a product, by its number of inputs."""
    return table["deep product" if rows.shape[1] >= DEEP else "product"]


def variants() -> list[Variant]:
    """Every kernel with every set of constants in the table, for even sizes."""
    found = []
    for size, table in TABLES.items():
        if size != "interpreted":
            dtype = "fp32" if size == "fp32" else "bf16"
            found += [variant(size, role, blocks, dtype) for role, blocks in table.items()]
    found += [variant("many rows", "hidden", TABLES["many rows"]["hidden"], "fp16")]
    small = {
        "expert_mlp cut": (
            cut_kernel,
            {"counts": "*i64", "table": "*i64", "used": "*i64", "starts": "*i64"}
            | {"groups": "i32", "limit": "i32"},
            {"BLOCK_M": 128, "BLOCK": 1024},
        ),
        "expert_mlp combine": (
            combine_kernel,
            {"rows": "*bf16", "where": "*i64", "offsets": "*i64", "weights": "*fp32", "out": "*bf16", "D": "i32"},
            {"PER_TOKEN": 8, "WEIGHTED": True, "BLOCK": 1024},
        ),
        "expert_mlp combine ragged": (
            combine_kernel,
            {"rows": "*bf16", "where": "*i64", "offsets": "*i64", "weights": "*i64", "out": "*bf16", "D": "i32"},
            {"PER_TOKEN": 0, "WEIGHTED": False, "BLOCK": 1024},
        ),
        "expert_mlp gate gradient": (
            gate_gradient_kernel,
            {"partial": "*fp32", "where": "*i64", "out": "*fp32", "R": "i32", "tiles": "i32"},
            {"BLOCK": 256},
        ),
    }
    for name, (kernel, signature, fixed) in small.items():
        found.append(Variant(name, kernel, signature, fixed, aligned=frozenset({"D"})))
    return found


KERNELS = {
    "hidden": (hidden_kernel, {"KIND": "swiglu", "GATED": True, "GATHER": True, "EVEN_K": True}),
    "hidden, one matrix": (hidden_kernel, {"KIND": "gelu", "GATED": False, "GATHER": True, "EVEN_K": True}),
    "product": (product_kernel, {"TRANSPOSED": True, "EVEN_K": True, "EVEN_N": True}),
    "deep product": (product_kernel, {"TRANSPOSED": False, "EVEN_K": True, "EVEN_N": True}),
    "gradient": (
        hidden_gradient_kernel,
        {"KIND": "swiglu", "GATED": True, "ROUTED": True, "EVEN_K": True, "EVEN_N": True},
    ),
    "outer": (outer_kernel, {"GATHER_LEFT": True, "GATHER_RIGHT": False, "EVEN_M": True, "EVEN_N": True}),
}
"""The kernel of each role, and the constants that sizes and inputs decide."""
INTEGERS = ("tokens", "order", "table", "used", "starts", "counts")
SCALARS = ("limit", "R", "D", "F", "K", "O", "M", "groups")
WIDE = ("gates", "partial")


def variant(size: str, role: str, blocks: Blocks, dtype: str) -> Variant:
    kernel, fixed = KERNELS[role]
    fixed = {**fixed, "UPCAST": False, "GROUP_M": GROUP_M, **blocks.constants()}
    kinds = dict.fromkeys(INTEGERS, "*i64") | dict.fromkeys(SCALARS, "i32") | dict.fromkeys(WIDE, "*fp32")
    signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in fixed}
    aligned = frozenset(name for name in ("D", "F", "K", "O", "M") if name in signature)
    named = f"expert_mlp {role}, {size}" + (f", {dtype}" if dtype == "fp16" else "")
    return Variant(
        named, kernel, signature, fixed, blocks.warps, blocks.stages, aligned, matrix=dtype != "fp32"
    )
