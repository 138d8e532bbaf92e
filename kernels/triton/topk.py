"""Token choice: a program takes a few tokens with all their experts, and finds the best one K times.

A score and the expert it belongs to are one 64-bit number, score above and expert below: one maximum finds both, no
expert is found twice whatever the scores are, and the lower index wins among equals. Computes in fp32.

Dims: T tokens, E experts, K experts per token, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.variant import Variant

MOST_EXPERTS, MOST_CHOSEN = 512, 64
"""Beyond these the torch reference runs: a program holds all experts of a token in registers."""
STAGES = 1  # nothing to load ahead: the loops run over registers
GONE = tl.constexpr(-(2**62))
"""Below the key of every score."""
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _keys(scores, index):
    """Numbers of the order of (score, -index). NaN counts as infinity, -0 as 0."""
    scores = tl.where(scores == scores, scores, INFINITY)
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) * 65536 + (65535 - index)


@triton.jit
def _falling(x):
    """e^x, zero below the normal numbers."""
    return tl.where(x < -87.0, 0.0, tl.exp(x))


@triton.jit
def _shares(x, inside, SIGMOID: tl.constexpr):
    """Softmax of rows, over what is inside: of x, or with SIGMOID of log(sigmoid(x)), without a logarithm."""
    highest = tl.max(tl.where(inside, x, -INFINITY), axis=1)
    if SIGMOID:
        highest = tl.minimum(highest, 0.0)
        size = _falling(tl.where(x < 0, x, 0.0) - highest[:, None]) / (1 + _falling(-tl.abs(x)))
    else:
        size = _falling(x - highest[:, None])
    size = tl.where(inside, size, 0.0)
    return size / tl.sum(size, axis=1)[:, None]


@triton.jit
def _sigmoid(x):
    tail = _falling(-tl.abs(x))
    return tl.where(x < 0, tail, 1.0) / (1 + tail)


@triton.jit
def _choose(
    logits,  # (T, E)
    bias,  # (E,)
    weights,  # (T, K)
    probabilities,  # (T, E)
    experts,  # (T, K)
    T,
    E,
    scale,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    AFTER: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    x = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=0.0).to(tl.float32)
    shares = _shares(x, (e < E)[None, :], SIGMOID)
    tl.store(probabilities + t[:, None] * E + e[None, :], shares, mask=inside)
    scores = _sigmoid(x) if SIGMOID else shares
    selection = scores + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    keys = tl.where((e < E)[None, :], _keys(selection, e[None, :]), GONE)
    if KEPT < GROUPS:
        group = (e // (E // GROUPS))[None, :]
        g = tl.arange(0, BLOCK_G)[None, :]
        selection = tl.where(selection == selection, selection, INFINITY)
        totals = tl.zeros((ROWS, BLOCK_G), tl.float32)
        for index in range(GROUPS):
            own = tl.where(group == index, keys, GONE)
            first = tl.max(own, axis=1)[:, None]
            second = tl.max(tl.where(own == first, GONE, own), axis=1)[:, None]
            total = tl.sum(tl.where(keys == first, selection, 0.0), axis=1)
            if E > GROUPS:
                total += tl.sum(tl.where(keys == second, selection, 0.0), axis=1)
            totals = tl.where(g == index, total[:, None], totals)
        of_groups = tl.where(g < GROUPS, _keys(totals, g), GONE)
        allowed = tl.zeros((ROWS, BLOCK_E), tl.int32)
        for _ in range(KEPT):
            found = tl.max(of_groups, axis=1)[:, None]
            allowed = tl.where(group == 65535 - (found & 65535), 1, allowed)
            of_groups = tl.where(of_groups == found, GONE, of_groups)
        lowest = tl.where(
            (e < E)[None, :], _keys(tl.full((ROWS, BLOCK_E), -INFINITY, tl.float32), e[None, :]), GONE
        )
        keys = tl.where(allowed == 1, keys, lowest)
    column = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int64)
    picked = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for k in range(K):
        found = tl.max(keys, axis=1)[:, None]
        here = keys == found
        value = tl.sum(tl.where(here, x if AFTER else scores, 0.0), axis=1)
        chosen = tl.where(column == k, 65535 - (found & 65535), chosen)
        picked = tl.where(column == k, value[:, None], picked)
        keys = tl.where(here, GONE, keys)
    if AFTER:
        picked = _shares(picked, column < K, SIGMOID)
    places = t[:, None] * K + column
    mask = (t < T)[:, None] & (column < K)
    tl.store(experts + places, chosen, mask=mask)
    tl.store(weights + places, picked * scale, mask=mask)


@triton.jit
def _choose_backward(
    grad_weights,  # (T, K), or anything without WEIGHTED
    grad_probabilities,  # (T, E), or anything without WHOLE
    logits,  # (T, E), or anything without SIGMOID
    weights,  # (T, K)
    probabilities,  # (T, E)
    experts,  # (T, K)
    grad_logits,  # (T, E)
    T,
    E,
    scale,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    AFTER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    inside = (t < T)[:, None] & (e < E)
    cells = t[:, None] * E + e
    shares = tl.load(probabilities + cells, mask=inside, other=0.0)
    grad = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if WHOLE:
        product = tl.load(grad_probabilities + cells, mask=inside, other=0.0) * shares
        grad = product - shares * tl.sum(product, axis=1)[:, None]
    if WEIGHTED:
        column = tl.arange(0, BLOCK_K)[None, :]
        mask = (t < T)[:, None] & (column < K)
        places = t[:, None] * K + column
        weight = tl.load(weights + places, mask=mask, other=0.0)
        total = tl.sum(tl.load(grad_weights + places, mask=mask, other=0.0) * weight, axis=1)
        if not AFTER and not SIGMOID:  # the weights are probabilities
            grad -= shares * total[:, None]
        share = total[:, None] / scale if AFTER else 0.0
        rows = (t < T)[:, None]
        for k in range(K):
            here = e == tl.load(experts + t[:, None] * K + k, mask=rows, other=0)
            one = tl.load(weights + t[:, None] * K + k, mask=rows, other=0.0)
            of_one = tl.load(grad_weights + t[:, None] * K + k, mask=rows, other=0.0)
            grad += tl.where(here, one * (of_one - share), 0.0)
    if SIGMOID:
        grad *= _sigmoid(-tl.load(logits + cells, mask=inside, other=0.0).to(tl.float32))
    tl.store(grad_logits + cells, grad, mask=inside)


def serves(logits: Tensor, k: int) -> bool:
    """Whether the kernels are made for these sizes and compute as exactly as the reference."""
    return logits.dtype != torch.float64 and logits.shape[1] <= MOST_EXPERTS and k <= MOST_CHOSEN


def blocks(num_experts: int, k: int) -> dict[str, int]:
    """Tokens of a program, and sizes as powers of two."""
    width = max(16, power_of_two(num_experts))
    rows = max(1, 256 * warps(num_experts) // width)
    return {"ROWS": rows, "BLOCK_E": width, "BLOCK_K": power_of_two(k)}


def power_of_two(size: int) -> int:
    """The next one, or the size itself."""
    return 1 << (size - 1).bit_length()


def warps(num_experts: int) -> int:
    """One where it holds all experts of one token only: K maxima between several would wait for each other."""
    return 4 if num_experts <= 64 else 1


@on_its_device
def choose(
    logits: Tensor, bias: Tensor, k: int, sigmoid: bool, after: bool, groups: int, kept: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and probabilities in fp32, and experts."""
    tokens, num_experts = logits.shape
    experts = logits.new_empty(tokens, k, dtype=torch.int64)
    weights = logits.new_empty(tokens, k, dtype=torch.float32)
    probabilities = logits.new_empty(tokens, num_experts, dtype=torch.float32)
    sizes = blocks(num_experts, k)
    if tokens:
        _choose[(-(-tokens // sizes["ROWS"]),)](
            logits.contiguous(),
            bias.contiguous(),
            weights,
            probabilities,
            experts,
            tokens,
            num_experts,
            scale,
            K=k,
            SIGMOID=sigmoid,
            AFTER=after,
            GROUPS=groups,
            KEPT=kept,
            **sizes,
            BLOCK_G=power_of_two(groups),
            num_warps=warps(num_experts),  # type: ignore[call-arg]  # of the launcher
            num_stages=STAGES,  # type: ignore[call-arg]  # of the launcher
        )
    return weights, probabilities, experts


@on_its_device
def choose_backward(
    probabilities: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    after: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits in fp32. Only sigmoids have `logits`. Grads: of weights and probabilities."""
    grad_weights, grad_probabilities = grads
    (tokens, num_experts), k = probabilities.shape, experts.shape[1]
    grad_logits = torch.empty_like(probabilities)
    sizes = blocks(num_experts, k)
    if tokens:
        _choose_backward[(-(-tokens // sizes["ROWS"]),)](
            weights if grad_weights is None else grad_weights,
            probabilities if grad_probabilities is None else grad_probabilities,
            probabilities if logits is None else logits,
            weights,
            probabilities,
            experts,
            grad_logits,
            tokens,
            num_experts,
            scale,
            K=k,
            SIGMOID=logits is not None,
            AFTER=after,
            WEIGHTED=grad_weights is not None,
            WHOLE=grad_probabilities is not None,
            **sizes,
            num_warps=warps(num_experts),  # type: ignore[call-arg]  # of the launcher
            num_stages=STAGES,  # type: ignore[call-arg]  # of the launcher
        )
    return grad_logits


def variants() -> list[Variant]:
    """Sizes of published models, both scores, with and without groups."""
    rest = {"T": "i32", "E": "i32", "scale": "fp32"}
    outputs = {"weights": "*fp32", "probabilities": "*fp32", "experts": "*i64"}
    found = []
    for num_experts, k, sigmoid, after, groups, kept, kind in [
        (8, 2, False, True, 1, 1, "fp32"),
        (64, 8, False, False, 1, 1, "fp32"),
        (64, 8, True, False, 1, 1, "fp32"),
        (128, 8, False, True, 1, 1, "bf16"),
        (256, 8, True, True, 8, 4, "fp32"),
        (512, 10, False, True, 1, 1, "fp32"),
        (512, 64, True, True, 1, 1, "fp32"),
    ]:
        sizes = {"K": k, "SIGMOID": sigmoid, "AFTER": after, **blocks(num_experts, k)}
        aligned = frozenset({"E"}) if num_experts % 16 == 0 else frozenset()
        case = f"{num_experts}_{k}_{'sigmoid' if sigmoid else 'softmax'}"
        found += [
            Variant(
                name=f"topk_forward_{case}",
                kernel=_choose,
                signature={"logits": f"*{kind}", "bias": "*fp32", **outputs, **rest},
                constants={
                    **sizes,
                    "GROUPS": groups,
                    "KEPT": kept,
                    "BLOCK_G": power_of_two(groups),
                },
                warps=warps(num_experts),
                stages=STAGES,
                aligned=aligned,
            ),
            Variant(
                name=f"topk_backward_{case}",
                kernel=_choose_backward,
                signature={
                    "grad_weights": "*fp32",
                    "grad_probabilities": "*fp32",
                    "logits": f"*{kind}",
                    **outputs,
                    "grad_logits": "*fp32",
                    **rest,
                },
                constants={**sizes, "WEIGHTED": True, "WHOLE": True},
                warps=warps(num_experts),
                stages=STAGES,
                aligned=aligned,
            ),
        ]
    return found
