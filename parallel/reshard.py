"""Give experts new owners: a permutation of the rows of the slot tables, weights and optimizer state alike.

Dims: S slots of this rank, L length of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.parallel.placement import OwnerMap
from moesaic.parallel.ranks import waiting_for
from moesaic.parallel.slots import Owned, SlotTable, slots_of

SLAB = 64 << 20
"""Bytes that a rank sends, and receives, at once."""

Place = tuple[int, int]
"""Rank and slot."""


@dataclass(frozen=True)
class Move:
    """One row from where it is to where it will be."""

    source: Place
    target: Place


@torch.no_grad()
def reshard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    new: OwnerMap,
    *,
    slab: int = SLAB,
) -> int:
    """Move the experts of a model to their new owners; collective over the owners. Returns how many moved.

    Gradients must have been cleared. Rows travel in portions of `slab` bytes (but a row at least), one tensor of a
    table after the other: beside the portions, memory holds the old and the new rows of one of them.
    """
    slots = slots_of(model)
    if slots is None:
        raise ValueError("a model whose experts have no owners cannot give them new ones")
    group, old, moved = slots.group, slots.owners, 0
    rank = dist.get_rank(group)
    for table in slots:
        if table.master.grad is not None:
            raise ValueError("experts with gradients cannot move; clear the gradients first")
        moves = moves_of(table, old, new)
        if all(move.source == move.target for move in moves):
            continue
        moved += sum(move.source[0] != move.target[0] for move in moves)
        count = sum(move.target[0] == rank for move in moves)
        state = optimizer.state.get(table.master, {}) if optimizer is not None else {}
        whole = [kind for kind, tensor in state.items() if tensor.shape == table.master.shape]
        for kind in whole:
            state[kind] = permuted(state[kind], moves, count, group, slab)
        table.master.data = permuted(table.master.data, moves, count, group, slab)
        table.owned = {part.bank: part for part in layout(table, new, rank)}
    slots.owners = new
    for name, bank in slots.banks.items():
        bank.own(new.owners[name])
    return moved


def layout(table: SlotTable, owners: OwnerMap, rank: int) -> list[Owned]:
    """Which slots of a rank hold what: bank after bank, ascending by expert."""
    found, first = [], 0
    for part in table.owned.values():
        experts = owners.experts(part.bank, rank)
        found.append(Owned(part.bank, part.num_experts, experts, first))
        first += len(experts)
    return found


def moves_of(table: SlotTable, old: OwnerMap, new: OwnerMap) -> list[Move]:
    """Where every row of a table goes, those that stay included; the same list on every rank."""
    before = {
        (part.bank, expert): (rank, part.first + index)
        for rank in range(old.ranks)
        for part in layout(table, old, rank)
        for index, expert in enumerate(part.experts)
    }
    return [
        Move(before[part.bank, expert], (rank, part.first + index))
        for rank in range(new.ranks)
        for part in layout(table, new, rank)
        for index, expert in enumerate(part.experts)
    ]


def portions(moves: Sequence[Move], ranks: int, most: int) -> list[list[Move]]:
    """Moves between ranks in portions in which no rank sends or receives more than `most` rows."""
    found: list[list[Move]] = []
    loads: list[tuple[list[int], list[int]]] = []
    for move in moves:
        source, target = move.source[0], move.target[0]
        if source == target:
            continue
        fits = (i for i, (out, into) in enumerate(loads) if out[source] < most and into[target] < most)
        place = next(fits, len(found))
        if place == len(found):
            found.append([])
            loads.append(([0] * ranks, [0] * ranks))
        found[place].append(move)
        loads[place][0][source] += 1
        loads[place][1][target] += 1
    return found


def permuted(rows: Tensor, moves: Sequence[Move], slots: int, group: dist.ProcessGroup, slab: int) -> Tensor:
    """The rows that this rank has after the moves."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    result = rows.new_empty(slots, *rows.shape[1:])
    stay = [(m.source[1], m.target[1]) for m in moves if m.source[0] == m.target[0] == rank]
    if stay:
        here, there = zip(*stay, strict=True)
        result[list(there)] = rows[list(here)]
    most = max(1, slab // max(1, rows.shape[1] * rows.element_size()))
    for portion in portions(moves, ranks, most):
        sends = [
            [m.source[1] for m in portion if m.source[0] == rank and m.target[0] == r] for r in range(ranks)
        ]
        comes = [
            [m.target[1] for m in portion if m.target[0] == rank and m.source[0] == r] for r in range(ranks)
        ]
        leaving = rows[[slot for part in sends for slot in part]]
        arriving = rows.new_empty(sum(map(len, comes)), *rows.shape[1:])
        with waiting_for("experts that move", group):
            dist.all_to_all_single(arriving, leaving, [*map(len, comes)], [*map(len, sends)], group=group)
        result[[slot for part in comes for slot in part]] = arriving
    return result
