"""Balanced assignment on GPUs: one launch per price round, then one program that moves what is left over.

The steps are those of kernels/auction.py, in the same integers. Nothing waits for the host: rounds after the first with
exact quotas return at once, and so does the repair where there is nothing to move.

Dims: T tokens, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from moesaic.kernels.auction import FAR, LEVELS, PER_LEVEL, PRICE_LIMIT, ROUNDS, UNREACHED
from moesaic.kernels.triton.device import on_its_device
from moesaic.kernels.triton.variant import Variant

NOTHING, DITHERED, PLAIN, LAST = 0, 1, 2, 3
"""Kinds of rounds: before the first, with dither, without, and the choice at the best prices."""
KINDS = (
    [(NOTHING, DITHERED)]
    + [(DITHERED, DITHERED)] * (LEVELS * PER_LEVEL - 1)
    + [(DITHERED, PLAIN)]
    + [(PLAIN, PLAIN)] * (ROUNDS - 1)
    + [(PLAIN, LAST)]
)
"""Kind of the round before, and of the round, one by one."""
TILE = 4096
"""Scores that a program holds at once."""
SCAN = 2048
"""Tokens that the repair looks at together."""
WARPS = 8
LAUNCH: dict[str, Any] = {"num_warps": WARPS}


@triton.jit(do_not_specialize=["turn"])
def round_kernel(
    values,
    dither,
    quota,
    scale,
    state,  # (rounds, 4, E): price, step, last sign, best price
    counts,  # (rounds, E)
    fewest,  # (rounds,)
    choice,
    turn,
    T,
    E,
    BEFORE: tl.constexpr,
    KIND: tl.constexpr,
    PER_LEVEL: tl.constexpr,
    PRICE_LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Prices from the counts of the round before, by every program for itself; then the choices of its tokens."""
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    wanted = tl.load(quota + e, mask=inside, other=0)
    typical = tl.load(scale)
    price = tl.zeros((BLOCK_E,), tl.int32)
    step = tl.zeros((BLOCK_E,), tl.int32) + tl.maximum(typical >> 10, 1)
    last = tl.zeros((BLOCK_E,), tl.int32)
    least = T + 1
    best = price
    if BEFORE != 0:
        row = state + (turn - 1) * 4 * E + e
        price = tl.load(row, mask=inside, other=0)
        count = tl.load(counts + (turn - 1) * E + e, mask=inside, other=0)
        over = count - wanted
        if BEFORE == 1:
            amplitude = tl.maximum(typical >> ((turn - 1) // PER_LEVEL), 1).to(tl.int64)
            size = (amplitude * tl.abs(over) // tl.maximum(2 * (count + wanted), 1)).to(tl.int32)
            change = tl.where(over < 0, -size, size)
            best = price
        else:
            step = tl.load(row + E, mask=inside, other=0)
            last = tl.load(row + 2 * E, mask=inside, other=0)
            best = tl.load(row + 3 * E, mask=inside, other=0)
            least = tl.load(fewest + turn - 1)
            excess = tl.sum(tl.maximum(over, 0))
            best = tl.where(excess < least, price, best)
            least = tl.minimum(excess, least)
            sign = tl.where(over > 0, 1, tl.where(over < 0, -1, 0))
            turned = sign * last
            step = tl.where(turned < 0, step >> 1, tl.where(turned > 0, step + (step >> 1), step))
            step = tl.minimum(tl.maximum(step, 1), typical)
            last = sign
            change = sign * step
        price = tl.minimum(tl.maximum(price + change, -PRICE_LIMIT), PRICE_LIMIT)
    if KIND == 3:
        price = best
    elif tl.program_id(0) == 0:
        row = state + turn * 4 * E + e
        tl.store(row, price, mask=inside)
        tl.store(row + E, step, mask=inside)
        tl.store(row + 2 * E, last, mask=inside)
        tl.store(row + 3 * E, best, mask=inside)
        tl.store(fewest + turn, least)
    if KIND != 2 or least > 0:
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        tile = t.to(tl.int64)[:, None] * E + e[None, :]
        mask = (t < T)[:, None] & inside[None, :]
        net = tl.load(values + tile, mask=mask, other=0) - price[None, :]
        if KIND == 1:
            amplitude = tl.maximum(typical >> (turn // PER_LEVEL), 1)
            net += tl.load(dither + tile, mask=mask, other=0).to(tl.int32) * (amplitude >> 8)
        net = tl.where(inside[None, :], net, -2147483647)
        top = tl.max(net, axis=1)
        first = tl.min(tl.where(net == top[:, None], e[None, :], BLOCK_E), axis=1)
        chosen = (first[:, None] == e[None, :]) & mask
        count = tl.sum(chosen.to(tl.int32), axis=0)
        tl.atomic_add(
            counts + turn * E + e, count, mask=inside & (count > 0)
        )  # integers: any order is the same
        if KIND == 3:
            tl.store(choice + t, first, mask=t < T)


@triton.jit
def _cheapest(
    values, tokens, begin, end, expert, E, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """What the cheapest move to every expert costs, for the tokens of `expert` listed from begin to end."""
    e = tl.arange(0, BLOCK_E)
    cost = tl.full((BLOCK_E,), FAR, tl.int32)
    for i in range(begin, end, ROWS):
        at = i + tl.arange(0, ROWS)
        there = at < end
        t = tl.load(tokens + at, mask=there, other=0).to(tl.int64)
        own = tl.load(values + t * E + expert, mask=there, other=0)
        mask = there[:, None] & (e < E)[None, :]
        loss = own[:, None] - tl.load(values + t[:, None] * E + e[None, :], mask=mask, other=0)
        cost = tl.minimum(cost, tl.min(tl.where(mask, loss, FAR), axis=0))
    return cost


@triton.jit
def cost_kernel(
    values, tokens, offsets, cost, E, FAR: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One row of the costs: from this program's expert to every other."""
    expert = tl.program_id(0)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    row = _cheapest(values, tokens, begin, end, expert, E, FAR, ROWS, BLOCK_E)
    e = tl.arange(0, BLOCK_E)
    tl.store(cost + expert.to(tl.int64) * E + e, row, mask=e < E)


@triton.jit
def _fits(values, choice, t, T, E, source, sink, loss):
    """Whether tokens are with `source` and lose `loss` by going to `sink`."""
    there = tl.load(choice + t, mask=t < T, other=-1) == source
    row = values + t.to(tl.int64) * E
    have, get = tl.load(row + source, mask=there, other=0), tl.load(row + sink, mask=there, other=0)
    return there & (have - get == loss)


@triton.jit
def repair_kernel(
    values,
    choice,
    quota,
    counts,
    cost,  # (E, E)
    distances,  # scratch (E,)
    parents,  # scratch (E,)
    members,  # scratch (T,)
    T,
    E,
    FAR: tl.constexpr,
    UNREACHED: tl.constexpr,
    SCAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LOG_E: tl.constexpr,
):
    """A single program. Barriers stand wherever one thread reads what another one wrote."""
    e = tl.arange(0, BLOCK_E)
    inside = e < E
    wanted = tl.load(quota + e, mask=inside, other=0)
    count = tl.load(counts + e, mask=inside, other=0)
    excess = tl.sum(tl.maximum(count - wanted, 0))
    while excess > 0:
        # Bellman-Ford from all experts with too many; a key is a distance and the expert that it comes over
        distance = tl.where(count > wanted, 0, UNREACHED).to(tl.int64)
        parent = tl.full((BLOCK_E,), -1, tl.int32)
        improved = excess
        while improved > 0:
            tl.debug_barrier()
            tl.store(distances + e, distance, mask=inside)
            tl.debug_barrier()
            key = tl.full((BLOCK_E,), 2 * UNREACHED * BLOCK_E, tl.int64)
            for i in range(0, E, ROWS):
                at = i + tl.arange(0, ROWS)
                start = tl.load(distances + at, mask=at < E, other=UNREACHED)
                tokens = tl.load(counts + at, mask=at < E, other=0)
                mask = (tokens > 0)[:, None] & inside[None, :]
                loss = tl.load(cost + at.to(tl.int64)[:, None] * E + e[None, :], mask=mask, other=0)
                way = tl.where(mask, start[:, None] + loss, 2 * UNREACHED) * BLOCK_E + at[:, None]
                key = tl.minimum(key, tl.min(way, axis=0))
            reached = key >> LOG_E
            better = inside & (reached < tl.minimum(distance, UNREACHED // 2))
            distance = tl.where(better, reached, distance)
            parent = tl.where(better, (key & (BLOCK_E - 1)).to(tl.int32), parent)
            improved = tl.sum(better.to(tl.int32))
        tl.store(parents + e, parent, mask=inside)
        tl.debug_barrier()
        nearest = tl.min(tl.where(count < wanted, distance, 2 * UNREACHED) * BLOCK_E + e)
        sink = (nearest & (BLOCK_E - 1)).to(tl.int32)
        source = sink
        before = tl.load(parents + sink)
        while before >= 0:
            source = before
            before = tl.load(parents + source)
        # how many tokens can go along the path together: at least one
        moved = tl.sum(tl.where(e == source, count - wanted, 0))
        moved = tl.minimum(moved, tl.sum(tl.where(e == sink, wanted - count, 0)))
        to = sink
        before = tl.load(parents + sink)
        while (before >= 0) & (moved > 1):
            loss = tl.load(cost + before.to(tl.int64) * E + to)
            fitting = tl.zeros((SCAN,), tl.int32)
            for i in range(0, T, SCAN):
                fits = _fits(values, choice, i + tl.arange(0, SCAN), T, E, before, to, loss)
                fitting += fits.to(tl.int32)
            moved = tl.minimum(moved, tl.sum(fitting))
            to = before
            before = tl.load(parents + to)
        # from the sink backwards, so that nobody moves twice
        to = sink
        before = tl.load(parents + sink)
        while before >= 0:
            loss = tl.load(cost + before.to(tl.int64) * E + to)
            done = moved * 0
            for i in range(0, T, SCAN):
                t = i + tl.arange(0, SCAN)
                fits = _fits(values, choice, t, T, E, before, to, loss).to(tl.int32)
                rank = done + tl.cumsum(fits, axis=0)
                tl.store(choice + t, tl.zeros_like(t) + to, mask=(fits > 0) & (rank <= moved))
                done += tl.sum(fits)
            to = before
            before = tl.load(parents + to)
        count += tl.where(e == sink, moved, 0) - tl.where(e == source, moved, 0)
        excess -= moved
        tl.debug_barrier()
        tl.store(counts + e, count, mask=inside)
        # what moving costs now, for the experts on the path
        at_expert = sink
        while at_expert >= 0:
            found = moved * 0
            for i in range(0, T, SCAN):
                t = i + tl.arange(0, SCAN)
                there = tl.load(choice + t, mask=t < T, other=-1) == at_expert
                rank = found + tl.cumsum(there.to(tl.int32), axis=0) - 1
                tl.store(members + rank, t, mask=there)
                found += tl.sum(there.to(tl.int32))
            tl.debug_barrier()
            row = _cheapest(values, members, 0, found, at_expert, E, FAR, ROWS, BLOCK_E)
            tl.store(cost + at_expert.to(tl.int64) * E + e, row, mask=inside)
            tl.debug_barrier()
            at_expert = tl.load(parents + at_expert)


@on_its_device
def assign(
    values: Int[Tensor, "T E"], scale: Int[Tensor, ""], dither: Int[Tensor, "T E"], quota: Int[Tensor, " E"]
) -> Int[Tensor, " T"]:
    """The balanced assignment of integer values; see kernels/auction.py for what they are."""
    T, E = values.shape
    values, scale, quota = values.int().contiguous(), scale.int(), quota.int()
    dither = dither.to(torch.int8).contiguous()
    state, fewest = values.new_empty(len(KINDS), 4, E), values.new_empty(len(KINDS))
    counts, choice = values.new_zeros(len(KINDS), E), values.new_empty(T)
    tokens = _sizes(E)["ROWS"]
    for turn, (before, kind) in enumerate(KINDS):
        round_kernel[(triton.cdiv(T, tokens),)](
            values, dither, quota, scale, state, counts, fewest, choice, turn, T, E,
            **_round_constants(E, before, kind), **LAUNCH,
        )  # fmt: skip
    count = counts[-1]
    order = choice.argsort(stable=True).int()
    offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
    cost = values.new_empty(E, E)
    cost_kernel[(E,)](values, order, offsets, cost, E, **_cost_constants(E), **LAUNCH)
    distances, parents = values.new_empty(E, dtype=torch.int64), values.new_empty(E)
    repair_kernel[(1,)](
        values, choice, quota, count, cost, distances, parents, order, T, E,
        **_repair_constants(E), **LAUNCH,
    )  # fmt: skip
    return choice.long()


def _sizes(experts: int) -> dict[str, int]:
    block = max(1 << (experts - 1).bit_length(), 2)
    return {"BLOCK_E": block, "ROWS": max(TILE // block, 1)}


def _round_constants(experts: int, before: int, kind: int) -> dict[str, int]:
    sizes = _sizes(experts)
    return {
        "BEFORE": before,
        "KIND": kind,
        "PER_LEVEL": PER_LEVEL,
        "PRICE_LIMIT": PRICE_LIMIT,
        "BLOCK_T": sizes["ROWS"],
        "BLOCK_E": sizes["BLOCK_E"],
    }


def _cost_constants(experts: int) -> dict[str, int]:
    return {"FAR": FAR, **_sizes(experts)}


def _repair_constants(experts: int) -> dict[str, int]:
    log = _sizes(experts)["BLOCK_E"].bit_length() - 1
    return {"UNREACHED": UNREACHED, "SCAN": SCAN, "LOG_E": log, **_cost_constants(experts)}


def variants() -> list[Variant]:
    """Rounds of every kind, costs and repair, for 16 to 512 experts."""
    round_types = dict.fromkeys(["values", "quota", "scale", "state", "counts", "fewest", "choice"], "*i32")
    round_types |= {"dither": "*i8", "turn": "i32", "T": "i32", "E": "i32"}
    cost_types = dict.fromkeys(["values", "tokens", "offsets", "cost"], "*i32") | {"E": "i32"}
    repair_types = dict.fromkeys(
        ["values", "choice", "quota", "counts", "cost", "parents", "members"], "*i32"
    )
    repair_types |= {"distances": "*i64", "T": "i32", "E": "i32"}
    aligned = frozenset(["T", "E"])
    nvidia = ("sm_80", "sm_90", "sm_100")  # on other GPUs plain torch serves
    made = []

    def add(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, int]) -> None:
        made.append(Variant(name, kernel, signature, constants, WARPS, aligned=aligned, targets=nvidia))

    for experts in (16, 64, 128, 512):
        for before, kind in sorted(set(KINDS)):
            constants = _round_constants(experts, before, kind)
            name = f"auction_round_{before}{kind}_e{experts}"
            add(name, round_kernel, round_types, constants)
        constants = _cost_constants(experts)
        name = f"auction_cost_e{experts}"
        add(name, cost_kernel, cost_types, constants)
        constants = _repair_constants(experts)
        name = f"auction_repair_e{experts}"
        add(name, repair_kernel, repair_types, constants)
    return made
