"""Sparse collectives, over one level and two: laws that hold for any owners and wishes, and cases written out."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.collectives import Collectives, Flat, Transfer
from moesaic.parallel.placement import Topology
from moesaic.parallel.spawn import run_ranks
from moesaic.parallel.two_level import Moves, TwoLevel, gather_moves, reduce_moves

LENGTH = 5  # no multiple of 2 or 4: two levels must pad


@dataclass(frozen=True)
class Case:
    """Who owns and who wants what, with a row of each expert and one of each copy."""

    wanted: np.ndarray  # (P, E)
    owners: tuple[int, ...]
    x: Tensor  # (E, L)
    y: Tensor  # (P, E, L)


def case(wanted: Any, owners: Sequence[int], length: int = LENGTH, seed: int = 0) -> Case:
    """What a rank owns it does not want; values are integers, whose sums are exact in any order."""
    wanted = np.array(wanted, bool)
    ranks, experts = wanted.shape
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(-9, 10, (ranks + 1, experts, length), generator=random).double()
    owned = np.arange(ranks)[:, None] == np.asarray(owners)
    return Case(wanted & ~owned, tuple(owners), values[0], values[1:])


def cases(ranks: int) -> list[Case]:
    rng = np.random.default_rng(ranks)
    found = []
    for seed, (experts, density, length) in enumerate(
        [(1, 1.0, 5), (1, 0.5, 1), (3, 0.0, 5), (2, 0.4, 8), (7, 1.0, 5), *[(9, 0.3, 3), (6, 0.6, 5)] * 4]
    ):
        owners = rng.integers(0, ranks, experts)
        if seed % 3 == 2:
            owners[:] = rng.integers(0, ranks)  # all owned by one, nothing by the others
        found.append(case(rng.random((ranks, experts)) < density, owners.tolist(), length, seed))
    return found


def gather(by: Collectives, of: Case, rank: int) -> Transfer:
    def rows(experts: Sequence[int]) -> Tensor:
        assert all(of.owners[expert] == rank for expert in experts)
        return of.x[list(experts)]

    return by.all_gather(rows, of.wanted, of.owners)


def reduce(by: Collectives, of: Case, rank: int) -> Transfer:
    def rows(experts: Sequence[int]) -> Tensor:
        assert of.wanted[rank, list(experts)].all()
        return of.y[rank, list(experts)]

    return by.reduce_scatter(rows, of.wanted, of.owners)


def summed(transfer: Transfer, like: Tensor) -> Tensor:
    """What arrived, added up in its order: (E, L)."""
    arrived = transfer.finish()
    assert len(arrived.experts) == len(arrived.rows)
    total = torch.zeros_like(like)
    for expert, row in zip(arrived.experts, arrived.rows, strict=True):
        total[expert] += row
    return total


def hold_laws(by: Collectives, of: Case, rank: int, group: dist.ProcessGroup | None = None) -> None:
    """Everything that must be true for one case; `rank` is this one's among the owners."""
    coming, going = gather(by, of, rank), reduce(by, of, rank)  # both under way
    here = coming.finish()
    assert sorted(here.experts) == np.flatnonzero(of.wanted[rank]).tolist()
    assert torch.equal(here.rows, of.x[list(here.experts)])

    owned = torch.tensor([owner == rank for owner in of.owners])[:, None]
    total = summed(going, of.x)
    wanted = torch.from_numpy(of.wanted)[:, :, None]
    assert torch.equal(total, (of.y * wanted).sum(0) * owned)

    ones = Case(of.wanted, of.owners, of.x, torch.ones_like(of.y))
    assert torch.equal(summed(reduce(by, ones, rank), of.x), wanted.sum(0) * owned * torch.ones_like(of.x))

    products = torch.stack([(here.rows * of.y[rank, list(here.experts)]).sum(), (of.x * total).sum()])
    dist.all_reduce(products, group=group)
    assert products[0] == products[1]  # adjoint


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_laws_of_one_level(ranks: int) -> None:
    def on_a_rank() -> None:
        by, group = Flat(world()), dist.get_rank()
        two = TwoLevel(world(), Topology(ranks, 1))
        for of in cases(ranks):
            hold_laws(by, of, group)
            hold_laws(two, of, group)

    run_ranks(on_a_rank, ranks)


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def test_laws_on_four_ranks() -> None:
    def on_a_rank() -> None:
        rank = dist.get_rank()
        flat = Flat(world())
        levels = {size: TwoLevel(world(), Topology(4, size)) for size in (1, 2, 4)}
        for of in cases(4):
            hold_laws(flat, of, rank)
            for size, by in levels.items():
                before = by.bytes_across
                gather(by, of, rank).finish()
                across = torch.tensor(by.bytes_across - before)
                dist.all_reduce(across)
                node = np.array(of.owners) // size
                crossings = sum(
                    bool(of.wanted[place * size : (place + 1) * size, expert].any())
                    for place in range(4 // size)
                    for expert in range(len(of.owners))
                    if node[expert] != place
                )
                piece = -(-of.x.shape[1] // size)
                assert across == crossings * size * piece * 8
                hold_laws(by, of, rank)

    run_ranks(on_a_rank, 4)


def test_copies_of_the_model_have_groups_of_their_own() -> None:
    def on_a_rank() -> None:
        copies = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        copy, rank = divmod(dist.get_rank(), 2)
        group = copies[copy]
        assert isinstance(group, dist.ProcessGroup)
        for size in (1, 2):
            by = TwoLevel(group, Topology(2, size))
            mine = range(copy * 2, copy * 2 + 2)
            near = list(mine) if size == 2 else [dist.get_rank()]
            across = [dist.get_rank()] if size == 2 else list(mine)
            assert [dist.get_process_group_ranks(made) for made in by.groups] == [near, across]
            for of in cases(2)[copy : copy + 6]:  # each copy its own
                hold_laws(by, of, rank, group)

    run_ranks(on_a_rank, 4)


def test_order_of_sums_is_fixed() -> None:
    """Rows of very different sizes, so that another order has other bits; ranks are late at random."""
    rng = np.random.default_rng(0)
    ranks, owners = 4, (0, 1, 2, 3, 3, 0)
    plain = case(np.ones((ranks, len(owners))), owners)
    sizes = 10.0 ** rng.integers(-4, 5, plain.y.shape)
    y = torch.from_numpy(rng.standard_normal(plain.y.shape) * sizes).float()
    of = Case(plain.wanted, owners, plain.x.float(), y)

    def on_a_rank() -> list[list[Tensor]]:
        rank, late = dist.get_rank(), random.Random(dist.get_rank())
        found = []
        for by in [Flat(world()), *(TwoLevel(world(), Topology(4, size)) for size in (4, 2, 1))]:
            again = []
            for turn in range(4):
                time.sleep(late.random() * 0.02 if turn else 0)
                going = reduce(by, of, rank)
                time.sleep(late.random() * 0.02 if turn else 0)
                again.append(summed(going, of.x))
            found.append(again)
        return found

    for rank, found in enumerate(run_ranks(on_a_rank, ranks)):
        for size, again in zip((4, 4, 2, 1), found, strict=True):
            expected = torch.zeros_like(of.x)
            for expert, owner in enumerate(owners):
                if owner != rank:
                    continue
                nodes = [range(start, start + size) for start in range(0, ranks, size)]
                for other in nodes[rank // size]:
                    if other != rank:
                        expected[expert] += y[other, expert]
                away = torch.zeros(LENGTH)
                for node in nodes[: rank // size] + nodes[rank // size + 1 :]:
                    of_node = torch.zeros(LENGTH)
                    for other in node:
                        of_node += y[other, expert]
                    away += of_node
                expected[expert] += away
            for result in again:
                assert torch.equal(result, expected)


def test_bf16_rows_are_summed_in_fp32() -> None:
    def on_a_rank() -> list[tuple[torch.dtype, list[float]]]:
        mine = torch.tensor([[0.0], [1.0], [256.0], [1.0]])[dist.get_rank()].bfloat16()
        wanted = np.array([[False], [True], [True], [True]])
        found = []
        for size in (4, 2, 1):
            by = TwoLevel(world(), Topology(4, size))
            arrived = by.reduce_scatter(lambda experts: mine.expand(len(experts), 3), wanted, (0,)).finish()
            found.append((arrived.rows.dtype, arrived.rows[:, 0].tolist()))
        return found

    # in bf16, 256 + 1 is 256
    found = run_ranks(on_a_rank, 4)[0]
    assert found == [(torch.float32, rows) for rows in ([1, 256, 1], [1, 257], [258])]


def test_bytes_of_a_case() -> None:
    """One expert of rank 0 that all want: 5 float64 are 40 bytes, and two slices of 24."""
    of = case([[0], [1], [1], [1]], [0])

    def on_a_rank() -> list[int]:
        flat, two, rank = Flat(world()), TwoLevel(world(), Topology(4, 2)), dist.get_rank()
        found = []
        for start in (gather, reduce):
            start(flat, of, rank).finish()
            start(two, of, rank).finish()
            found += [flat.bytes, two.bytes, two.bytes_across]
            flat.bytes = two.bytes = two.bytes_across = 0
        return found

    found = list(zip(*run_ranks(on_a_rank, 4), strict=True))
    gathered, reduced = found[:3], found[3:]
    # a whole row to rank 1; slice 0 from rank 0 to 2 to 3, slice 1 from rank 1 to 3 to 2
    assert gathered == [(120, 0, 0, 0), (48 + 24, 24, 24, 24), (24, 24, 0, 0)]
    # a whole row from rank 1; slices between 2 and 3; sums to 0 and 1; the one of rank 1 to 0
    assert reduced == [(0, 40, 40, 40), (0, 48 + 24, 24 + 24, 24 + 24), (0, 0, 24, 24)]


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.experts\.levels: .*6 ranks.* 4 per node.*`levels: one`"):
        TwoLevel(None, Topology(6, 4))  # type: ignore[arg-type]


# plans, for more ranks than can run here


def plan_case(ranks: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, Topology]:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(1, 40))
    owners = rng.integers(0, ranks, experts)
    wanted = rng.random((ranks, experts)) < rng.choice([0.02, 0.3, 1.0])
    wanted[owners, np.arange(experts)] = False
    return wanted, owners, Topology(ranks, size)


def peers(rank: int, topology: Topology, turn: int) -> list[int]:
    """The ranks of the group of an exchange: within the node, across, within."""
    size = topology.ranks_per_node
    if turn == 1:
        return list(range(rank % size, topology.ranks, size))
    return list(range(rank // size * size, rank // size * size + size))


def consistent(plans: list[list[Moves]], topology: Topology) -> None:
    """What is sent is what is expected."""
    assert len({len(plan) for plan in plans}) == 1
    for rank, plan in enumerate(plans):
        for turn, moves in enumerate(plan):
            group = peers(rank, topology, turn)
            assert len(moves.send) == len(moves.receive) == len(group)
            for place, other in enumerate(group):
                expected = plans[other][turn].receive[group.index(rank)]
                assert (moves.send[place] == expected).all()


def crossings(plans: list[list[Moves]]) -> np.ndarray:
    """How often each piece crosses to another node, over all."""
    return sum(
        (plan[1].send.sum(0) for plan in plans if len(plan) > 1), np.zeros(plans[0][0].send.shape[1:], int)
    )


SIZES = [(8, 4), (8, 8), (8, 1), (16, 4), (64, 8)]


@pytest.mark.parametrize(("ranks", "size"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_plans_bring_copies(ranks: int, size: int, seed: int) -> None:
    wanted, owners, topology = plan_case(ranks, size, seed)
    plans = [gather_moves(wanted, owners.tolist(), topology, rank) for rank in range(ranks)]
    consistent(plans, topology)
    nodes = topology.nodes()
    away = [(wanted[nodes == node].any(0)) & (nodes[owners] != node) for node in range(ranks // size)]
    assert (crossings(plans) == np.sum(away, axis=0)[:, None]).all()  # once per expert and node
    assert len(plans[0]) == (3 if np.any(away) else 1)

    has = [np.repeat((owners == rank)[:, None], size, 1) for rank in range(ranks)]
    came = [np.zeros((len(owners), size), int) for _ in range(ranks)]
    for turn in range(len(plans[0])):
        arrived = []
        for rank, plan in enumerate(plans):
            assert not (plan[turn].send & ~has[rank]).any()  # nobody sends what has not come
            arrived.append(plan[turn].receive.sum(0))
        assert max(pieces.max() for pieces in arrived) <= 1
        has = [pieces > 0 for pieces in arrived]
        if turn != 1:  # slices of other nodes' experts only pass through
            came = [before + pieces for before, pieces in zip(came, arrived, strict=True)]
    for rank in range(ranks):
        assert (came[rank][wanted[rank]] == 1).all()


@pytest.mark.parametrize(("ranks", "size"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_plans_bring_gradients_back(ranks: int, size: int, seed: int) -> None:
    wanted, owners, topology = plan_case(ranks, size, seed)
    plans = [reduce_moves(wanted, owners.tolist(), topology, rank) for rank in range(ranks)]
    consistent(plans, topology)
    copies = [gather_moves(wanted, owners.tolist(), topology, rank) for rank in range(ranks)]
    assert (crossings(plans) == crossings(copies)).all()

    rng = np.random.default_rng(seed)
    y = rng.integers(-99, 100, (ranks, len(owners), size)) * wanted[:, :, None]
    mine = owners == np.arange(ranks)[:, None]
    held = y
    total = np.zeros_like(y)
    for turn in range(len(plans[0])):
        arrived = np.zeros_like(held)
        for rank, plan in enumerate(plans):
            for place, other in enumerate(peers(rank, topology, turn)):
                arrived[other] += held[rank] * plan[turn].send[place]
        if turn != 1:
            total += arrived * mine[:, :, None]
        # what has not reached its owner goes on
        held = arrived if turn else arrived * ~mine[:, :, None]
    assert (total == y.sum(0) * mine[:, :, None]).all()
