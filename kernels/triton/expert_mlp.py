"""The experts of a layer in Triton: seven kernels forward and backward, none of which waits for the host.

Forward: hidden layer with its non-linearity, second product, weighted sum. Backward: gradient of the hidden layer, two
weight gradients, gradient of the rows and its sum. Constants are read from a table, not searched for at the start.

Dims: T tokens, R rows, D width, F hidden width, G input matrices, E experts.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.kernels.triton.combine import (
    TILE,
    combine,
    combine_kernel,
    gate_gradient_kernel,
    gate_gradients,
)
from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.grouped import (
    GROUP_M,
    Blocks,
    box,
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
    from moesaic.kernels.plan import Routes


@on_its_device
def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    counts: Tensor,
    routes: "Routes | None",
    kind: str,
    backend: Any,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the hidden layer before its non-linearity, or nothing where it is not to be kept."""
    tokens = None if routes is None else routes.tokens
    rows = x.shape[0] if tokens is None else tokens.shape[0]
    x, w1, w2, counts = x.contiguous(), w1.contiguous(), w2.contiguous(), counts.contiguous()
    table = constants(x.device, x.dtype, rows // w1.shape[0])
    tiles = cut_rows(counts, rows, table["hidden"].m)
    first = table["hidden" if w1.shape[1] == 2 else "hidden, one matrix"]
    hidden, active = hidden_layer(x, w1, tokens, tiles, rows, first, kind=kind)
    out = product(active, w2, tiles, deep(table, active), transposed=True)
    if routes is not None:
        gates = routes.gates.contiguous()
        out = combine(out, routes.where, routes.offsets, gates, routes.per_token)
    return out, hidden if keep else hidden.new_empty(0)


@on_its_device
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
    x, w1, w2, counts = x.contiguous(), w1.contiguous(), w2.contiguous(), counts.contiguous()
    table = constants(x.device, x.dtype, rows // w1.shape[0])
    tokens, order, gates = (
        (None,) * 3 if routes is None else (routes.tokens, routes.order, routes.gates.contiguous())
    )
    tiles = cut_rows(counts, rows, table["hidden"].m)
    blocks = table["gradient"]
    if x.shape[1] % blocks.k or w2.shape[2] % blocks.n:
        blocks = table.get("gradient, uneven", blocks)
    grad_hidden, active, partial = hidden_gradient(
        grad, w2, hidden, tokens, order, gates, tiles, blocks, kind=kind
    )
    grad_gates = None if routes is None else gate_gradients(partial, routes.where, routes.gates.dtype)
    grad_w2 = outer(grad, active, tokens, counts, tiles.starts, table["outer"], gather="left")
    del active, partial
    grad_w1 = outer(grad_hidden, x, tokens, counts, tiles.starts, table["outer"], gather="right")
    grad_x = product(grad_hidden, w1.flatten(1, 2), tiles, deep(table, grad_hidden), transposed=False)
    if routes is not None:
        grad_x = combine(grad_x, routes.where, routes.offsets, None, routes.per_token)
    return grad_x, grad_w1.view_as(w1), grad_w2, grad_gates


DEEP = 1024
"""From so many inputs on a product's epilogue is short beside it, and one large tile per multiprocessor is best."""
ROLES = ("hidden", "hidden, one matrix", "product", "deep product", "gradient", "outer")
TABLES = {
    # For Hopper's asynchronous tensor cores: 3 buffers of 48 KiB once, or of 32 KiB twice. Registers are what limits:
    # these are the largest tiles that do not spill. Tiles copied by TMA free those that hold addresses, except in
    # "gradient", which then spills with 4 warps. What a GPU should be asked is in bench/moe_tune.py: 4 stages;
    # "gradient" with 256 columns, which reads less from L2 but overlaps no epilogue; "hidden" with 64, the reverse.
    "many rows": {
        "hidden": Blocks(128, 128, 64, 8, 3, parts=4, tma=True),
        "hidden, one matrix": Blocks(128, 256, 64, 8, 3, tma=True),
        "product": Blocks(128, 128, 64, 4, 3, 2, tma=True),
        "deep product": Blocks(128, 256, 64, 8, 3, tma=True),
        "gradient": Blocks(128, 128, 64, 4, 3, 2, parts=4),
        "gradient, uneven": Blocks(128, 128, 64, 8, 3, parts=4),  # masks take registers too
        "outer": Blocks(128, 256, 64, 8, 3),
    },
    "many rows, other GPUs": {
        "hidden": Blocks(128, 64, 64, 8, 3),
        "hidden, one matrix": Blocks(128, 128, 64, 8, 3),
        "product": Blocks(128, 128, 64, 8, 3),
        "deep product": Blocks(128, 128, 64, 8, 3),
        "gradient": Blocks(128, 128, 64, 8, 3, parts=4),
        "outer": Blocks(128, 128, 64, 8, 3),
    },
    "some rows": {
        "hidden": Blocks(64, 64, 64, 4, 4, 2),
        "hidden, one matrix": Blocks(64, 128, 64, 4, 4, 2),
        "product": Blocks(64, 128, 64, 4, 4, 2),
        "deep product": Blocks(64, 128, 64, 4, 4, 2),
        "gradient": Blocks(64, 64, 64, 4, 4, 2),
        "outer": Blocks(128, 128, 32, 8, 4, 2),
    },
    "few rows": {
        "hidden": Blocks(16, 64, 128, 4, 3, 3),
        "hidden, one matrix": Blocks(16, 128, 128, 4, 3, 3),
        "product": Blocks(16, 128, 128, 4, 3, 3),
        "deep product": Blocks(16, 128, 128, 4, 3, 3),
        "gradient": Blocks(16, 128, 128, 4, 3, 2),
        "outer": Blocks(128, 128, 16, 8, 4, 2),
    },
    "fp32": dict.fromkeys(ROLES, Blocks(64, 64, 16, 4, 2, 2)) | {"outer": Blocks(64, 64, 32, 4, 2, 2)},
    "interpreted": dict.fromkeys(ROLES, Blocks(16, 32, 32, 4, 1, parts=4, tma=True)),
    "many rows, interpreted": dict.fromkeys(ROLES, Blocks(64, 64, 32, 4, 1)),
}
TARGETS = {"many rows": ("sm_90",), "many rows, other GPUs": ("sm_80", "sm_100", "gfx942")}


def constants(device: torch.device, dtype: torch.dtype, rows_per_expert: int) -> dict[str, Blocks]:
    """Launch constants of every product."""
    if INTERPRETED:
        return TABLES["interpreted" if rows_per_expert < 64 else "many rows, interpreted"]
    if dtype == torch.float32:  # exact products run outside of the tensor cores
        return TABLES["fp32"]
    if rows_per_expert >= 96:
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
        return TABLES["many rows" if hopper else "many rows, other GPUs"]
    return TABLES["some rows" if rows_per_expert >= 24 else "few rows"]


def deep(table: dict[str, Blocks], rows: Tensor) -> Blocks:
    """The constants of a product, by its number of inputs."""
    return table["deep product" if rows.shape[1] >= DEEP else "product"]


def variants() -> list[Variant]:
    """Every kernel with every set of constants in the table, and those that sizes may add for many rows."""
    found = []
    for size, table in TABLES.items():
        if "interpreted" not in size:
            dtype = "fp32" if size == "fp32" else "bf16"
            found += [variant(size, role, table[role], dtype) for role in ROLES]
    many = TABLES["many rows"]
    uneven = {"EVEN_K": False, "EVEN_M": False, "EVEN_N": False}
    for role in ROLES:
        blocks = many.get(f"{role}, uneven", many[role])
        found.append(variant("many rows", role, replace(blocks, tma=False), "bf16", "uneven", uneven))
        if blocks.tma:
            found.append(variant("many rows", role, blocks, "bf16", "uneven, TMA", uneven))
    ones = uneven | dict.fromkeys(SCALARS, 1)  # arguments that are 1 are constants to the compiler
    found += [variant("few rows", role, TABLES["few rows"][role], "bf16", "ones", ones) for role in ROLES]
    found += [
        variant("many rows", "hidden", many["hidden"], "fp16", "fp16"),
        variant(
            "many rows", "deep product", many["deep product"], "bf16", "transposed", {"TRANSPOSED": True}
        ),
        variant("many rows", "product", many["product"], "bf16", "as stored", {"TRANSPOSED": False}),
        variant(
            "many rows", "outer", many["outer"], "bf16", "right", {"GATHER_LEFT": False, "GATHER_RIGHT": True}
        ),
    ]
    cut = dict.fromkeys(("counts", "table", "used", "starts"), "*i64") | {"groups": "i32", "limit": "i32"}
    found.append(Variant("expert_mlp cut", cut_kernel, cut, {"BLOCK_M": 128, "BLOCK": 1024}))
    rows = {"rows": "*bf16", "where": "*i64", "offsets": "*i64", "weights": "*fp32", "out": "*bf16"}
    rows |= {"T": "i32", "D": "i32"}
    for name, fixed in (
        ("", {"PER_TOKEN": 8, "WEIGHTED": True}),
        (" ragged", {"PER_TOKEN": 0, "WEIGHTED": False}),
    ):
        fixed |= {"BLOCK_T": 1, "BLOCK_D": TILE}
        found.append(
            Variant("expert_mlp combine" + name, combine_kernel, rows, fixed, aligned=frozenset({"D"}))
        )
    parts = {"partial": "*fp32", "where": "*i64", "out": "*fp32", "R": "i32", "tiles": "i32"}
    found.append(Variant("expert_mlp gate gradient", gate_gradient_kernel, parts, {"BLOCK": 256}))
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
SCALARS = ("limit", "R", "D", "F", "K", "OUT", "M", "groups")
WIDE = ("gates", "partial")


def variant(
    size: str,
    role: str,
    blocks: Blocks,
    dtype: str,
    more: str = "",
    other: Mapping[str, bool | int] | None = None,
) -> Variant:
    kernel, fixed = KERNELS[role]
    fixed = fixed | {name: value for name, value in (other or {}).items() if name in kernel.arg_names}
    fixed = {**fixed, "UPCAST": False, "GROUP_M": GROUP_M, **blocks.constants()}
    if "KIND" in fixed:
        fixed["PARTS"] = blocks.parts
    if "TMA" in kernel.arg_names:
        fixed["TMA"] = blocks.tma
    kinds: dict[str, str] = dict.fromkeys(INTEGERS, "*i64")
    kinds |= dict.fromkeys(SCALARS, "i32") | dict.fromkeys(WIDE, "*fp32")
    if blocks.tma:
        tile = box(blocks, transposed=bool(fixed.get("TRANSPOSED", "hidden" in role)))
        kinds |= dict.fromkeys(("w1", "w2", "weights"), f"tensordesc<{dtype}{tile}>")
        kinds["rows"] = f"tensordesc<{dtype}{[blocks.m, blocks.k]}>"
    signature = {name: kinds.get(name, f"*{dtype}") for name in kernel.arg_names if name not in fixed}
    aligned = frozenset(name for name in ("D", "F", "K", "OUT", "M") if name in signature)
    named = f"expert_mlp {role}, {size}" + (f", {more}" if more else "")
    return Variant(
        named,
        kernel,
        signature,
        fixed,
        blocks.warps,
        blocks.stages,
        aligned,
        matrix=dtype != "fp32",
        targets=TARGETS.get(size, ()),
    )
